"""Weights to and from Hugging Face's files: names, layouts, quantized tensor_formats and configs, checked."""
