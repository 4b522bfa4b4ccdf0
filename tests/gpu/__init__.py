"""What needs a CUDA GPU: checks (`pytest -m gpu`) and the benchmark on one (`python -m gpu`)."""
