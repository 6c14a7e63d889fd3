"""What modules compute during training beside their output: auxiliary losses and per-step counters."""
