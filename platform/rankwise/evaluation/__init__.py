"""Metrics, the evaluator, the comparison across ranks."""
