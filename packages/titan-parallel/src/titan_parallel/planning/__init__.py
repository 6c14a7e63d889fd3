"""Dry run of a training step: memory, FLOPs and communication of each rank. Entry point: `titan_parallel.plan`."""
