"""Figures of notebooks 02 to 05."""
