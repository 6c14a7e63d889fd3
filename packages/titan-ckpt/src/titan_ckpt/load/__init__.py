"""Loading: find, compare, read."""
