"""Runs, metrics and the model registry. With the flavor the only user of the MLflow client."""
