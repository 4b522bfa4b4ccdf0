"""Registered adapters in a vLLM server: what to start it with, and a plugin that fetches them by name.

The plugin is imported by every process of a vLLM server, so nothing here imports torch or MLflow before it is asked.
"""
