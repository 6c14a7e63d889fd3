"""Roles of modules: what each module of a model is, and whether a mesh can split it."""
