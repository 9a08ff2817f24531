"""The embedded language model: its files, and the texts that it was trained on."""
