"""Probes of a model, made once before training: is it token-wise, and can it be cut into pipeline stages?"""
