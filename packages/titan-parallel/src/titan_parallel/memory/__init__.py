"""Memory: activation checkpointing, compilation, allocation of meta models."""
