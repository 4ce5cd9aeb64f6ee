"""A YAML-configured, multi-algorithm LLM fine-tuning engine in which every run proves itself."""

__version__ = "0.1.0"
