"""One training step: micro-batches, losses, statistics, gradient norm."""
