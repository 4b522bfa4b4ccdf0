"""rankwise: an experiment platform for QLoRA fine-tuning on MLflow."""

__version__ = "0.2.0"
