"""Weight initialization that is bitwise the same on any mesh."""
