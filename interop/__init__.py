"""Checkpoints of Megatron and Hugging Face, read and written."""
