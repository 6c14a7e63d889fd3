"""Text to token batches: tokenizers, sources, packing, elastic order, exact state."""
