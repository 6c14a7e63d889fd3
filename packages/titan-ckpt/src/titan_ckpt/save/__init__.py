"""Saving: staging, planning, writing, publishing."""
