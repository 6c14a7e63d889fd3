"""The device mesh of a run, its process groups and collectives."""
