"""Notebook 10: how fast, and why."""
