"""Weights to and from Hugging Face's files: names, layouts, quantised forms and configs, checked."""
