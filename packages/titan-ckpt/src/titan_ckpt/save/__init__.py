"""Saving: staging, write plan, writing, publishing."""
