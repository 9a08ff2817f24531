"""Least squares from sums: ridge regression of many targets, on more rows than fit in memory, with
cross-validation.

- Σxxᵀ, Σxyᵀ and their like are all that least squares needs. They are kept in float64 about a shift
  near the mean of x, so that little cancels; a fold of rows has its own, so that leaving it out is
  a subtraction.
- Σxxᵀ does not depend on the targets: it is summed, and its eigenvectors are found, once for all of
  them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridges that cross-validation chooses from, as shares of the mean eigenvalue of the second moments
of x."""


class Linear(NamedTuple):
    """y = x · weight + bias; weight: [p, m], bias: [m], float64."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, p], of any float type; returns [n, m], float64."""
        return torch.addmm(self.bias, x.double(), self.weight)


class Moments:
    """Sums from which targets y, [n, m], are regressed on x, [n, p], in `folds` groups of rows;
    float64.

    shift: [p], near the mean of x. What is kept: p² + p·m numbers a fold, however many rows there
    are.
    """

    def __init__(self, shift: torch.Tensor, m: int, folds: int = 1):
        self.shift, self.folds = shift.double(), folds
        p = len(shift)
        self.n, self.x, self.xx = self._zeros(), self._zeros(p), self._zeros(p, p)
        self.y, self.xy, self.yy = self._zeros(m), self._zeros(p, m), self._zeros(m)
        self.complete = False
        self._known: dict[tuple[bool, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self.folds, *shape, dtype=torch.float64, device=self.shift.device)

    def again(self, m: int) -> Moments:
        """Moments of other targets on the same rows, to be given once more: Σxxᵀ is taken over, and
        not computed again."""
        other = Moments(self.shift, m, self.folds)
        other.n, other.x, other.xx = self.n, self.x, self.xx
        other.complete, other._known = True, self._known
        return other

    def add(self, x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor | None = None) -> None:
        """Take in rows. fold: the group of each, [n]; default: group 0."""
        x, y = x.double() - self.shift, y.double()
        if not self.complete:
            self._known.clear()
        for number in [0] if fold is None else fold.unique().tolist():
            mine = slice(None) if fold is None else fold == number
            some, theirs = x[mine], y[mine]
            if not self.complete:
                self.n[number] += len(some)
                self.x[number] += some.sum(0)
                self.xx[number].addmm_(some.T, some)
            self.y[number] += theirs.sum(0)
            self.xy[number].addmm_(some.T, theirs)
            self.yy[number] += theirs.square().sum(0)

    def _spectrum(self, bias: bool, left_out: int | None) -> tuple[torch.Tensor, ...]:
        """(eigenvalues, eigenvectors, Xᵀy in their basis, what is subtracted of the shifted x, and
        of y) of all other folds."""
        kept = [fold for fold in range(self.folds) if fold != left_out]
        n, x, xx, y, xy = (sums[kept].sum(0) for sums in (self.n, self.x, self.xx, self.y, self.xy))
        if not n > 0:
            raise ValueError("no rows to fit a linear map to: add some, of two folds at least")
        if bias:
            centre, centre_y = x / n, y / n
            gram, cross = xx - torch.outer(x, centre), xy - torch.outer(x, centre_y)
        else:  # about zero, not about the shift
            centre, centre_y = -self.shift, torch.zeros_like(y)
            gram = xx + torch.outer(x, self.shift) + torch.outer(self.shift, x)
            gram = gram + n * torch.outer(self.shift, self.shift)
            cross = xy + torch.outer(self.shift, y)
        if (bias, left_out) not in self._known:
            self._known[bias, left_out] = torch.linalg.eigh(gram / n)
        values, vectors = self._known[bias, left_out]
        return values, vectors, vectors.T @ cross / n, centre, centre_y

    def _solve(self, spectrum: tuple[torch.Tensor, ...], ridge: float | torch.Tensor) -> Linear:
        values, vectors, cross, centre, centre_y = spectrum
        # else x has nothing in that direction
        varies = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        ridge = torch.as_tensor(ridge, dtype=torch.float64, device=values.device)
        penalised = values[:, None] + ridge * values.mean()
        weight = vectors @ torch.where(varies[:, None], cross / penalised, 0.0)
        return Linear(weight, centre_y - (self.shift + centre) @ weight)

    def fit(self, ridge: float | torch.Tensor = 0.0, bias: bool = True) -> Linear:
        """Least squares of all rows, with a penalty on the weights.

        ridge: a number or one for each target, [m], as a share of the mean eigenvalue of x's second
        moments. Raises ValueError if there are no rows.
        """
        return self._solve(self._spectrum(bias, None), ridge)

    def squared_error(self, fit: Linear, fold: int) -> torch.Tensor:
        """Σ (y − fit(x))² over the rows of a fold, for each target, [m], from the sums alone."""
        every = self.n, self.x, self.xx, self.y, self.xy, self.yy
        n, x, xx, y, xy, yy = (sums[fold] for sums in every)
        weight, bias = fit.weight, fit.bias + self.shift @ fit.weight  # of the shifted x
        linear = 2 * ((weight * xy).sum(0) + bias * y)
        return yy - linear + (weight * (xx @ weight)).sum(0) + bias * (2 * x @ weight + n * bias)

    def best_ridge(
        self, group: torch.Tensor, ridges: Sequence[float] = RIDGES, bias: bool = True
    ) -> torch.Tensor:
        """The ridge of each target, [m], of least squared error on folds that are left out in turn.

        group: of each target, [m], int64 from 0; targets of a group share their ridge. ridges: to
        choose from; one is taken as it is. Raises ValueError with rows in fewer than two folds.
        """
        if len(ridges) == 1:
            return torch.full_like(group, ridges[0], dtype=torch.float64)
        used = (self.n > 0).nonzero().squeeze(-1).tolist()
        if len(used) < 2:
            raise ValueError(
                f"cross-validation needs rows in at least two folds, got {len(used)}: give `split` "
                "more folds"
            )
        errors = self.shift.new_zeros(len(ridges), int(group.max()) + 1)
        for fold in used:
            spectrum = self._spectrum(bias, fold)
            for number, ridge in enumerate(ridges):
                error = self.squared_error(self._solve(spectrum, ridge), fold)
                errors[number].index_add_(0, group, error)
        best = errors.argmin(0)[group]
        return torch.tensor(ridges, dtype=torch.float64, device=group.device)[best]
