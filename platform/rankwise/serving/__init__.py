"""Serving registered adapters with vLLM: the `vllm serve` line, and a plugin that fetches adapters by name.

Every process of a vLLM server imports `plugin`, which imports torch and MLflow only at the first request.
"""
