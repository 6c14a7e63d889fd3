"""Data parallelism by FSDP2: sharded, replicated, or both."""
