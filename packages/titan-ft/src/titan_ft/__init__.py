"""Replica groups that come and go, for anyone's training loop."""
