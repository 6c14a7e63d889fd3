"""Any nn.Module on a device mesh, from a table of roles."""
