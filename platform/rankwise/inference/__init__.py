"""Generation with several adapters in one batch."""
