"""fedpeft: federated fine-tuning of language models on data that may not leave its owners."""

__version__ = "0.1.0"
