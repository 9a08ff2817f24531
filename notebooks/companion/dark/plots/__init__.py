"""Figures of notebooks 06 and 07."""
