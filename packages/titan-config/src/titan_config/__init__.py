"""A typed config that builds the object that owns it: JSON, diff and a command line included."""
