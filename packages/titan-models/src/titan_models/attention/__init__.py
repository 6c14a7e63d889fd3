"""Attention layers, masks and kernels."""
