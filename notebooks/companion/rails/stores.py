"""Activations at several places of a model, from as few passes over the text as there can be."""

from __future__ import annotations

from collections.abc import Sequence

from jumprelu.activations import Activations
from jumprelu.corpus import Tokens
from jumprelu.harvest import harvest
from jumprelu.lm import LM

from .cache import remember


def harvest_places(
    lm: LM, tokens: Tokens, places: Sequence[tuple[str, int]], dtype: str
) -> list[Activations]:
    """A store for each (site, layer) of `places`, in their order; kept as :func:`remember` does.

    Sites that are wanted at the same layers share a pass of the model, and so do the layers of a
    site: three layers of the residual stream and two sites of one layer take two passes, not five.
    dtype: on disk, see :func:`jumprelu.harvest`, which also says what is raised.
    """
    layers_of: dict[str, set[int]] = {}
    for site, layer in places:
        layers_of.setdefault(site, set()).add(layer)
    sites_at: dict[tuple[int, ...], list[str]] = {}
    for site, layers in sorted(layers_of.items()):
        sites_at.setdefault(tuple(sorted(layers)), []).append(site)
    stores: dict[tuple[str, int], Activations] = {}
    for layers, sites in sites_at.items():
        stores |= remember(harvest, lm, tokens, site=sites, layer=list(layers), dtype=dtype)
    return [stores[site, layer] for site, layer in places]
