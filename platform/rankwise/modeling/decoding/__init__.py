"""Batch decoding: many prompts over one base, each with its own adapter."""
