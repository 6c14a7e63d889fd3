"""Roles of modules and parameters, and checks that a mesh can split them."""
