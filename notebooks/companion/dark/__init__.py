"""Notebooks 06 and 07: how linear an SAE's error is, and what the rest is."""
