"""Notebook 08: a small Gemma Scope, and the released one."""
