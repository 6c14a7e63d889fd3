"""The training loop: optimizer, schedule, loss, metrics, validation, profiling."""
