"""Speed and memory of the packed engine against what a user would do without it; `python -m benchmarks` runs it."""
