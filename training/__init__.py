"""One training run: ranks, watchdog, checkpoints, the update, what is logged, what it costs."""
