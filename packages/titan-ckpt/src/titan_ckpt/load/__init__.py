"""Loading: find and verify a checkpoint, check compatibility, read tensors."""
