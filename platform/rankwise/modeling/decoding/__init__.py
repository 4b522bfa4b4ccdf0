"""Batch decoding: several prompts, each with its own adapter, in one batch."""
