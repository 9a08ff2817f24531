"""Notebooks 02 to 05: a training run, sparsity against fidelity, feature frequency, ablations."""
