"""What else an SAE's error is compared with: the breakdown of FVU by width, predictions of its norm
from other numbers and of its vector from another place, and reconstructions that are linear by
construction.

Source: Engels et al. 2024 (arXiv 2410.14670). The decomposition itself is in
:mod:`jumprelu.dark.darkmatter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from jumprelu.activations import Activations
from jumprelu.dark.darkmatter import Reconstruct, Rows, Split, TokenNorms, stream
from jumprelu.dark.regression import RIDGES, Linear, Moments

from ..rails.scaling import PowerLaw, fit_power_law

# ---- across widths


class Breakdown(NamedTuple):
    """FVU by width and where it comes from; each [widths], and the law that was fitted to it."""

    fvu: np.ndarray
    absent: np.ndarray
    """FVU above the law's offset: features that a wider SAE would learn."""
    linear: np.ndarray
    """The offset minus `nonlinear`: what stays at any width, and is linear in x."""
    nonlinear: np.ndarray
    """FVU of the nonlinear error, the mean over widths."""
    law: PowerLaw


def breakdown(
    widths: Sequence[int], fvu: Sequence[float], fvu_nonlinear: Sequence[float]
) -> Breakdown:
    """Split FVU into features not yet learned, linear and nonlinear error (Engels et al. 2024).

    FVU(W) is fitted by scale · W^(−exponent) + offset. Raises ValueError as
    :func:`fit_power_law` does: three widths at least.
    """
    law = fit_power_law(widths, fvu, offset=True)
    values, level = np.asarray(fvu, dtype=float), float(np.mean(fvu_nonlinear))
    ones = np.ones_like(values)
    return Breakdown(values, values - law.offset, (law.offset - level) * ones, level * ones, law)


# ---- predictions of a number, and of a vector


class Predicted(NamedTuple):
    """Sums over each document for testing, D of them, of a number or a vector by token that was
    predicted; float64."""

    tokens: torch.Tensor
    """[D]"""
    sum: torch.Tensor
    """Σ of the number, [D], or of the vector, [D, d]; or of what is left of it where something is
    known anyway."""
    square: torch.Tensor
    """Σ of its squared length, [D]."""
    residual: torch.Tensor
    """Σ of the squared length of what the prediction misses, [D]."""
    given: bool = False
    """Whether something is known anyway."""

    def r2(self, weights: torch.Tensor) -> torch.Tensor:
        """R², pooled over the dimensions of a vector; where something is known anyway, the share of
        what that leaves which is explained besides. weights: [draws, D], returns [draws]."""
        total = weights @ self.square
        if not self.given:
            squared = (weights @ self.sum).square()
            squared = squared.sum(-1) if squared.ndim > 1 else squared
            total = total - squared / (weights @ self.tokens)
        return 1 - weights @ self.residual / total


def predict_scalar(
    y: torch.Tensor, features: torch.Tensor, tokens: TokenNorms, given: torch.Tensor | None = None
) -> Predicted:
    """A number by token, y: [n], predicted from `features`, [n, q], by least squares with a bias.

    given: [n, r], features that are known anyway: R² is then the share of what these leave
    unexplained that `features` explain. Fitted and tested on the documents that `tokens` were;
    tokens with a NaN count in neither.
    """
    ones = torch.ones(len(y), 1, dtype=torch.float64)
    before = ones if given is None else torch.cat([ones, given.double()], -1)
    after = torch.cat([before, features.double()], -1)
    known = y.isfinite() & after.isfinite().all(-1)
    fitting, testing = known & (tokens.fold >= 0), known & (tokens.fold < 0)
    documents = tokens.document[tokens.fold < 0].unique()
    document = torch.searchsorted(documents, tokens.document[testing])
    sums = []
    for regressors in (before, after):
        solution = torch.linalg.lstsq(
            regressors[fitting], y[fitting, None].double(), driver="gelsd"
        ).solution
        missed = y[testing].double() - (regressors[testing] @ solution).squeeze(-1)
        by_document = torch.zeros(3, len(documents), dtype=torch.float64)
        sums.append(
            by_document.index_add_(
                1, document, torch.stack([torch.ones_like(missed), missed, missed.square()])
            )
        )
    return Predicted(sums[0][0], sums[0][1], sums[0][2], sums[1][2], given is not None)


@torch.no_grad()
def regress_errors(
    acts: Activations,
    sae: Reconstruct,
    linear: Linear,
    source: Activations,
    through: Reconstruct,
    parts: Split,
    ridges: Sequence[float] = RIDGES,
) -> dict[str, Predicted]:
    """SaeError and its two parts, predicted from `through` of the activations at another place,
    such as an SAE's output there.

    acts, source: stores of the same tokens in the same order; linear: of `sae` (:func:`decompose`).
    Fitted and tested on the documents of `parts`, with a bias; a ridge each. Returns "error",
    "linear" and "nonlinear". Raises ValueError for stores of different tokens. Source: Engels et
    al. 2024, the maps from earlier components.
    """

    def pairs(which: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, Rows]]:
        for here, there in zip(
            stream(acts, parts, which), stream(source, parts, which), strict=True
        ):
            if not (
                torch.equal(here.ids, there.ids) and torch.equal(here.document, there.document)
            ):
                raise ValueError(
                    "the two stores hold different tokens, or their shards differ: harvest both "
                    "from the same rows of tokens, with the same shard_rows"
                )
            error, predicted = here.x.double() - sae(here.x).double(), linear(here.x)
            targets = torch.cat([error, predicted, error - predicted], -1)
            yield through(there.x).double(), targets, here

    names, d_in = ("error", "linear", "nonlinear"), acts.d_in
    moments: Moments | None = None
    for regressors, targets, rows in pairs("fit"):
        moments = moments or Moments(regressors.mean(0), targets.shape[1], parts.folds)
        moments.add(regressors, targets, rows.fold)
    group = torch.arange(len(names)).repeat_interleave(d_in)
    fit = moments.fit(moments.best_ridge(group, ridges))
    many = len(parts.fold)
    shapes = [(), (len(names), d_in), (len(names),), (len(names),)]
    sums = [torch.zeros(many, *shape, dtype=torch.float64) for shape in shapes]
    for regressors, targets, rows in pairs("test"):
        missed = (targets - fit(regressors)).unflatten(-1, (len(names), d_in))
        targets = targets.unflatten(-1, (len(names), d_in))
        values = (
            torch.ones(len(targets), dtype=torch.float64),
            targets,
            targets.square().sum(-1),
            missed.square().sum(-1),
        )
        for total, value in zip(sums, values, strict=True):
            total.index_add_(0, rows.document, value)
    tested = parts.fold < 0
    tokens, total, square, residual = (one[tested] for one in sums)
    return {
        name: Predicted(tokens, total[:, n], square[:, n], residual[:, n])
        for n, name in enumerate(names)
    }


# ---- controls


def linear_controls(
    acts: Activations, parts: Split, components: Sequence[int]
) -> dict[str, Linear]:
    """Reconstructions that are linear, from the documents for fitting: the mean (a dead SAE), half
    of x about the mean (shrinkage alone), and the first principal components, as many as each of
    `components` says."""
    moments = Moments(acts.rows(256).double().mean(0), 0)
    for rows in stream(acts, parts, "fit"):
        moments.add(rows.x, rows.x[:, :0])
    offset = moments.x[0] / moments.n[0]
    mean = moments.shift + offset
    vectors = torch.linalg.eigh(
        moments.xx[0] / moments.n[0] - torch.outer(offset, offset)
    ).eigenvectors
    eye = torch.eye(len(mean), dtype=torch.float64)
    maps = {"mean only": 0 * eye, "shrunk by half": 0.5 * eye}
    maps |= {f"{k} principal components": vectors[:, -k:] @ vectors[:, -k:].T for k in components}
    return {name: Linear(weight, mean - mean @ weight) for name, weight in maps.items()}
