"""Initial weights, the same on any mesh."""
