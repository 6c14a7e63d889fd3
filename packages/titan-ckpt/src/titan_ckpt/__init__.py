"""Distributed checkpoints that can be trusted: async, atomic, verified, resharding, Hugging Face in and out."""
