"""A run before it runs: what each rank would hold, compute and send. `titan_parallel.plan` is what to call."""
