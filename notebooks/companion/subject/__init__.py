"""Notebook 00: is the shipped language model worth studying?"""
