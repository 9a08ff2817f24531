"""Runs that differ in their seed only: where they are in a table, and statistics between them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

Statistic = Callable[[Any, torch.Tensor], torch.Tensor]
"""(sums over the documents of a test, weights of documents [draws, D]) → [draws]."""


def settings(table: pd.DataFrame) -> dict[tuple[object, int], list[int]]:
    """Positions of runs that differ in their seed only.

    table: a row a run, columns architecture and seed; the n-th run of each seed belong together.
    Returns (architecture, number within its seed) → positions of rows.
    """
    number = table.groupby(["architecture", "seed"], sort=False).cumcount()
    places: dict[tuple[object, int], list[int]] = {}
    for position, key in enumerate(zip(table.architecture, number, strict=True)):
        places.setdefault(key, []).append(position)
    return places


def statistic_at(
    table: pd.DataFrame,
    tests: Sequence[Any],
    name: str,
    statistic: Statistic,
    value: float,
    by: str = "l0",
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """A statistic of an architecture where column `by` of its runs has one value, for each seed a
    function of weights of documents, as :func:`companion.rails.repeats.over_seeds` takes.

    table: a row a run, columns architecture, seed and `by`; tests: of each run. Linear in log `by`
    between the two runs that enclose the value (the same two, whatever documents are drawn); NaN in
    a seed whose runs do not reach it.
    """
    found = []
    runs = table.assign(position=range(len(table)))
    for _, curve in runs[runs.architecture == name].groupby("seed"):
        curve = curve.sort_values(by)
        place = np.interp(
            np.log(value), np.log(curve[by]), np.arange(len(curve)), left=np.nan, right=np.nan
        )
        ordered = [tests[position] for position in curve.position]
        found.append(functools.partial(_between, statistic, ordered, float(place)))
    return found


def difference(
    one: Callable[[torch.Tensor], torch.Tensor],
    other: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:
    """One statistic minus another, on the same weights of documents; [draws]."""
    return one(weights) - other(weights)


def _between(
    statistic: Statistic, tests: Sequence[Any], place: float, weights: torch.Tensor
) -> torch.Tensor:
    """The statistic at a place between two of `tests`: 1.5 is the middle of numbers 1 and 2."""
    if math.isnan(place):
        return torch.full(weights.shape[:1], math.nan, dtype=torch.float64)
    lower = min(int(place), len(tests) - 2) if len(tests) > 1 else 0
    upper = min(lower + 1, len(tests) - 1)
    return torch.lerp(
        statistic(tests[lower], weights), statistic(tests[upper], weights), place - lower
    )
