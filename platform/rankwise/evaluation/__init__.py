"""Metrics, evaluation of adapters, comparison across ranks, and the gate for promotions."""
