"""Activations of known documents, an SAE with errors, and least squares on all rows at once."""

from __future__ import annotations

import torch

from jumprelu.activations import activations_from_tensor
from jumprelu.sae import SAE

D_IN, DOCUMENTS, OF_EACH = 6, 40, 50


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def direct(x, y, bias=True):
    """Least squares on all rows at once, by a QR decomposition."""
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    rows = torch.cat([x, ones], 1) if bias else x
    solution = torch.linalg.lstsq(rows, y, driver="gelsd").solution
    if bias:
        return solution[:-1], solution[-1]
    return solution, torch.zeros(y.shape[1], dtype=torch.float64)


def store_of_documents(folder):
    """A store of `DOCUMENTS` documents that differ, with numbers that have gaps."""
    g = generator(8)
    x = torch.randn(DOCUMENTS * OF_EACH, D_IN, generator=g) @ torch.randn(D_IN, D_IN, generator=g)
    document = torch.arange(DOCUMENTS).repeat_interleave(OF_EACH) * 3 + 11
    x += torch.randn(DOCUMENTS, D_IN, generator=g).repeat_interleave(OF_EACH, 0) + 2
    return activations_from_tensor(x, folder / "store", document, shard_rows=333)


def sae_with_errors():
    atoms = torch.randn(16, D_IN, generator=generator(2))
    atoms /= atoms.norm(dim=-1, keepdim=True)
    b_dec, threshold = torch.full((D_IN,), 0.3), torch.full((16,), 0.4)
    return SAE(atoms.T * 0.7, torch.zeros(16), atoms, b_dec, threshold)


def whole(acts):
    """All activations of a store, and their documents."""
    shards = list(acts.shards())
    x = torch.cat([shard.activations for shard in shards])
    return x, torch.cat([shard.document for shard in shards])
