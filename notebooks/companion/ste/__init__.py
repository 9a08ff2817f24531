"""Notebook 01: where the straight-through estimator comes from, and its best bandwidth."""
