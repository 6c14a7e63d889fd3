"""Conversion of weights to and from Hugging Face checkpoints: names, layouts, tensor formats and config checks."""
