"""Private torch APIs that this package uses, with the reason and the versions tried."""
