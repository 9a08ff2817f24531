"""Notebook 09: can the latents be read, and what do they do?"""
