"""When gradients go bad, the run returns to its last good checkpoint and goes on past those data."""

from collections import Counter
from copy import copy
from functools import partial

import configurator
import diffusion
from training import checkpoint
from training.distributed import on_all_ranks
from training.log import warn
from training.update import is_bad


class Guard:
    """Counts steps with a bad gradient; too many in a row take the run back to a checkpoint before them."""

    def __init__(self, run, state, network, optimizer, average=None):
        self.run, self.state, self.network, self.optimizer = run, state, network, optimizer
        self.average = average
        self.worst = 0  # most bad steps in a row since a checkpoint was read: norms arrive several at a time
        self.returns = Counter()  # to each checkpoint folder

    def count(self, norm):
        """Count a step by its gradient's norm; returns whether its update happened."""
        if not is_bad(norm, self.run.cfg.skip_norm):
            self.state.bad_in_a_row = 0
            return True
        self.state.bad_in_a_row += 1
        self.worst = max(self.worst, self.state.bad_in_a_row)
        return False

    def must_go_back(self):
        """Whether there were too many bad steps in a row."""
        return self.worst >= self.run.cfg.max_skips

    def restore(self, folder, record):
        """Read a checkpoint of this run: weights, the optimizer's state, and where the run stood."""
        ranks = self.run.ranks
        on_all_ranks(ranks, checkpoint.restore, folder, record, self.network, self.optimizer, self.average,
                     ranks)
        self.state.restore(record, diffusion.figure_names(self.run.process) + ["grad_norm"])
        self.worst = self.state.bad_in_a_row

    def go_back(self, saver, log):
        """Return to the newest checkpoint from before the bad steps, and go on past the data since."""
        run, state, step, worst = self.run, self.state, self.state.step, self.worst
        trouble = "the gradient was not finite or above skip_norm"
        saver.wait()
        try:
            folder, record = checkpoint.load_newest(
                run.folder, partial(warn, run.ranks), run.ranks,
                fit=lambda saved: saved.get("bad_in_a_row") == 0)
        except FileNotFoundError:
            configurator.fail(f"step {step}: {trouble} in {worst} steps in a row, and there is no checkpoint "
                              "from before; lower --lr")
        except OSError as problem:
            configurator.fail(f"step {step}: {trouble} in {worst} steps in a row, and {problem}")
        self.returns[folder] += 1
        if self.returns[folder] > 3:
            configurator.fail(f"step {step}: went back to {folder} three times, and again {trouble}; "
                              "lower --lr")
        before = copy(state)
        self.restore(folder, record)
        saver.forget_after(folder)
        first, last = state.next_sample, before.next_sample - 1
        log.event("back", f"{worst} steps skipped in a row by step {step}: back to {folder}, "
                          f"past samples {first:,} to {last:,}",
                  from_step=step, first_sample=first, last_sample=last)
        if log.journal:
            log.journal.back_to(state.step)
        state.passed_samples += before.next_sample - state.next_sample
        state.next_sample = before.next_sample
