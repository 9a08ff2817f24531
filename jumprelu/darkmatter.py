"""SAE dark matter: how much of what an SAE leaves unexplained is a linear function of the activation.

    SaeError(x) = x − Sae(x)      LinearError(x) = Bx + c, its best linear prediction      NonlinearError = SaeError − LinearError

(Engels et al. 2024, arXiv 2410.14670; its abstract and scripts were read.) Two questions to an SAE: how well do ‖SaeError‖² and
SaeError itself follow from x by least squares, on documents that the fit did not see?

Notable here:
- no error vector is ever stored. Least squares needs sums only, :class:`Moments`: Σxxᵀ, Σxyᵀ and their like, in float64, about a
  shift near the mean of x, so that little cancels. Σxxᵀ is summed once for all SAEs and targets.
- tokens of one document are alike, so documents are split, never tokens (:func:`split`): maps are fitted on some, all that is
  reported is of others, and intervals come from drawing those again (:func:`bootstrap`).
- x is the regressor, so the residual of x − Sae(x) is that of −Sae(x): NonlinearError says how far the SAE is from linear, and
  nothing else. A dead SAE has none.
- R² of a vector has two definitions: "pooled" divides sums over all dimensions, the authors' scripts average each one's R².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .activations import Activations
from .intervals import Interval, mean_interval
from .scaling import PowerLaw, fit_power_law

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridges that cross-validation chooses from, as shares of the mean eigenvalue of the second moments of x."""

NORMS = ("x", "sae", "error", "linear", "nonlinear")
"""Vectors whose squared norm is predicted from x: x, Sae(x), SaeError and its two parts."""

ROWS = 2048
"""Tokens that are worked on at a time."""

Reconstruct = Callable[[torch.Tensor], torch.Tensor]
"""Raw activations [n, d_in] to reconstructions [n, d_in]: an SAE, or a control."""


# ---- least squares from sums ------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """y = x · weight + bias; weight: [p, m], bias: [m], float64."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, p], of any float type; returns [n, m], float64."""
        return torch.addmm(self.bias, x.double(), self.weight)


class Moments:
    """Sums from which targets y, [n, m], are regressed on x, [n, p], in `folds` groups of rows; float64.

    shift: [p], near the mean of x. What is kept: p² + p·m numbers a fold, however many rows there are.
    """

    def __init__(self, shift: torch.Tensor, m: int, folds: int = 1):
        self.shift, self.folds = shift.double(), folds
        p = len(shift)
        self.n, self.x, self.xx = self._zeros(), self._zeros(p), self._zeros(p, p)
        self.y, self.xy, self.yy = self._zeros(m), self._zeros(p, m), self._zeros(m)
        self.complete = False

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self.folds, *shape, dtype=torch.float64, device=self.shift.device)

    def again(self, m: int) -> Moments:
        """Moments of other targets on the same rows, to be given once more: Σxxᵀ is taken over, and not computed again."""
        other = Moments(self.shift, m, self.folds)
        other.n, other.x, other.xx, other.complete = self.n, self.x, self.xx, True
        return other

    def add(self, x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor | None = None) -> None:
        """Take in rows. fold: the group of each, [n]; default: group 0."""
        x, y = x.double() - self.shift, y.double()
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
        """(eigenvalues, eigenvectors, Xᵀy in their basis, what is subtracted of the shifted x, and of y) of all other folds."""
        kept = [fold for fold in range(self.folds) if fold != left_out]
        n, x, xx, y, xy = (sums[kept].sum(0) for sums in (self.n, self.x, self.xx, self.y, self.xy))
        if not n > 0:
            raise ValueError("no rows to fit a linear map to: add some first, of at least two folds for cross-validation")
        if bias:
            centre, centre_y = x / n, y / n
            gram, cross = xx - torch.outer(x, centre), xy - torch.outer(x, centre_y)
        else:  # about zero, not about the shift
            centre, centre_y = -self.shift, torch.zeros_like(y)
            gram = xx + torch.outer(x, self.shift) + torch.outer(self.shift, x) + n * torch.outer(self.shift, self.shift)
            cross = xy + torch.outer(self.shift, y)
        values, vectors = torch.linalg.eigh(gram / n)
        return values, vectors, vectors.T @ cross / n, centre, centre_y

    def _solve(self, spectrum: tuple[torch.Tensor, ...], ridge: float | torch.Tensor) -> Linear:
        values, vectors, cross, centre, centre_y = spectrum
        varies = values > values[-1] * len(values) * torch.finfo(torch.float64).eps  # else x has nothing in that direction
        penalised = values[:, None] + torch.as_tensor(ridge, dtype=torch.float64) * values.mean()
        weight = vectors @ torch.where(varies[:, None], cross / penalised, 0.0)
        return Linear(weight, centre_y - (self.shift + centre) @ weight)

    def fit(self, ridge: float | torch.Tensor = 0.0, bias: bool = True) -> Linear:
        """Least squares of all rows, with a penalty on the weights.

        ridge: a number or one for each target, [m], as a share of the mean eigenvalue of x's second moments. Raises ValueError
        if there are no rows.
        """
        return self._solve(self._spectrum(bias, None), ridge)

    def squared_error(self, fit: Linear, fold: int) -> torch.Tensor:
        """Σ (y − fit(x))² over the rows of a fold, for each target, [m], from the sums alone."""
        n, x, xx, y, xy, yy = (sums[fold] for sums in (self.n, self.x, self.xx, self.y, self.xy, self.yy))
        weight, bias = fit.weight, fit.bias + self.shift @ fit.weight  # of the shifted x
        return yy - 2 * ((weight * xy).sum(0) + bias * y) + (weight * (xx @ weight)).sum(0) + bias * (2 * x @ weight + n * bias)

    def best_ridge(self, group: torch.Tensor, ridges: Sequence[float] = RIDGES, bias: bool = True) -> torch.Tensor:
        """The ridge of each target, [m], of least squared error on folds that are left out in turn.

        group: of each target, [m], int64 from 0; targets of a group share their ridge. Raises ValueError with rows in fewer than
        two folds.
        """
        used = (self.n > 0).nonzero().squeeze(-1).tolist()
        if len(used) < 2:
            raise ValueError(f"cross-validation needs rows in at least two folds, got {len(used)}: give `split` more folds")
        errors = torch.zeros(len(ridges), int(group.max()) + 1, dtype=torch.float64, device=self.shift.device)
        for fold in used:
            spectrum = self._spectrum(bias, fold)
            for number, ridge in enumerate(ridges):
                errors[number].index_add_(0, group, self.squared_error(self._solve(spectrum, ridge), fold))
        return torch.tensor(ridges, dtype=torch.float64, device=group.device)[errors.argmin(0)][group]


# ---- documents --------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Documents for fitting and for testing. documents: sorted; fold: of each, −1 for testing, else 0 … folds − 1."""

    documents: torch.Tensor
    fold: torch.Tensor
    folds: int


def split(acts: Activations, test_share: float = 0.4, folds: int = 4, seed: int = 0) -> Split:
    """Deal the documents of a store at random: a share to test on, the rest into `folds` groups to fit on.

    Raises ValueError unless there are two documents to test on and one for each fold.
    """
    documents = torch.cat([shard.document.unique() for shard in acts.shards()]).unique()
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    tested = round(test_share * len(documents))
    if tested < 2 or len(documents) - tested < folds:
        raise ValueError(f"{len(documents)} documents, {tested} of them for testing, are too few for {folds} folds and a test: "
                         "harvest more (rows_per_document=1 gives the most documents for the same number of tokens)")
    fold = torch.empty(len(documents), dtype=torch.long)
    fold[order[:tested]] = -1
    fold[order[tested:]] = torch.arange(len(documents) - tested) % folds
    return Split(documents, fold, folds)


class Rows(NamedTuple):
    """Some rows of a store. x: float32 [n, d_in]; document: its place in `Split.documents`, [n]; fold, ids: [n]."""

    x: torch.Tensor
    document: torch.Tensor
    fold: torch.Tensor
    ids: torch.Tensor


def stream(acts: Activations, parts: Split, which: str = "all") -> Iterator[Rows]:
    """Rows of the documents for "fit", for "test", or of "all", in the order of the store; at most :data:`ROWS` at a time."""
    for shard in acts.shards():
        document = torch.searchsorted(parts.documents, shard.document.to(parts.documents.dtype))
        fold = parts.fold[document]
        wanted = {"fit": fold >= 0, "test": fold < 0, "all": torch.ones_like(fold, dtype=torch.bool)}[which].nonzero().squeeze(-1)
        for some in wanted.split(ROWS):
            yield Rows(shard.activations[some], document[some], fold[some], shard.ids[some])


# ---- the decomposition ------------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """Sums over each document for testing, D of them, in float64, from which all that is reported follows.

    Statistics take `weights`, [draws, D]: how often each document was drawn. They return [draws].
    """

    tokens: torch.Tensor
    """[D]"""
    x: torch.Tensor
    """Σx, [D, d_in]"""
    x_square: torch.Tensor
    """Σ‖x‖², [D]"""
    error: torch.Tensor
    """Σ SaeError, [D, d_in]"""
    error_square: torch.Tensor
    """Σ SaeError², [D, d_in]"""
    nonlinear_square: torch.Tensor
    """Σ NonlinearError², [D, d_in]: what the map leaves of SaeError"""
    norm: torch.Tensor
    """Σ of the squared norm of each of :data:`NORMS`, [D, 5]"""
    norm_square: torch.Tensor
    """Σ of its square, [D, 5]"""
    norm_residual: torch.Tensor
    """Σ (squared norm − its prediction from x)², [D, 5]"""

    def variance(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ‖x − x̄‖²."""
        return weights @ self.x_square - (weights @ self.x).square().sum(-1) / (weights @ self.tokens)

    def fvu(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ‖SaeError‖² / Σ‖x − x̄‖²."""
        return weights @ self.error_square.sum(-1) / self.variance(weights)

    def fvu_nonlinear(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ‖NonlinearError‖² / Σ‖x − x̄‖²: the FVU of Sae + LinearError."""
        return weights @ self.nonlinear_square.sum(-1) / self.variance(weights)

    def vector_r2(self, weights: torch.Tensor, pooled: bool = True) -> torch.Tensor:
        """1 − Σ‖NonlinearError‖² / Σ‖SaeError − its mean‖²; not `pooled`: the mean over dimensions of each one's R²."""
        left = weights @ self.nonlinear_square
        total = weights @ self.error_square - (weights @ self.error).square() / (weights @ self.tokens)[:, None]
        return 1 - left.sum(-1) / total.sum(-1) if pooled else (1 - left / total).mean(-1)

    def norm_r2(self, weights: torch.Tensor, of: str = "error") -> torch.Tensor:
        """R² of ‖·‖² as predicted from x; of: one of :data:`NORMS`."""
        which = NORMS.index(of)
        total = weights @ self.norm_square[:, which] - (weights @ self.norm[:, which]).square() / (weights @ self.tokens)
        return 1 - weights @ self.norm_residual[:, which] / total


class Decomposition(NamedTuple):
    """What :func:`decompose` found for one SAE."""

    linear: Linear
    """SaeError from x: [d_in, d_in] and [d_in]."""
    norm: Linear
    """Squared norms of :data:`NORMS` from x: [d_in, 5] and [5]."""
    ridge: float
    """Of `linear`."""
    test: HeldOut


class TokenNorms(NamedTuple):
    """Norms token by token, in the order of the store. error, nonlinear: float32 [n, SAEs]; x: float32 [n]; the others [n]."""

    error: torch.Tensor
    nonlinear: torch.Tensor
    x: torch.Tensor
    document: torch.Tensor
    fold: torch.Tensor
    ids: torch.Tensor


def linear_error(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """The best linear prediction of SaeError from x, [n, d_in], in the type of x."""
    return linear(x).to(x.dtype)


def nonlinear_error(x: torch.Tensor, sae: Reconstruct, linear: Linear) -> torch.Tensor:
    """x − Sae(x) − LinearError(x), [n, d_in], in the type of x."""
    return x - sae(x) - linear_error(x, linear)


class _Vectors(NamedTuple):
    """The five vectors of :data:`NORMS` for some tokens, each float64 [n, d_in]; the last two are None without a map."""

    x: torch.Tensor
    sae: torch.Tensor
    error: torch.Tensor
    linear: torch.Tensor | None
    nonlinear: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, sae: Reconstruct, linear: Linear | None = None) -> _Vectors:
        error = x.double() - (x_hat := sae(x).double())
        predicted = None if linear is None else linear(x)
        return cls(x.double(), x_hat, error, predicted, None if predicted is None else error - predicted)

    def squares(self) -> torch.Tensor:
        """Squared norms of those that are known, [n, 3 or 5]."""
        return torch.stack([vector.square().sum(-1) for vector in self if vector is not None], -1)


@torch.no_grad()
def decompose(acts: Activations, saes: Mapping[str, Reconstruct], parts: Split, bias: bool = True,
              ridges: Sequence[float] = RIDGES) -> tuple[dict[str, Decomposition], TokenNorms]:
    """LinearError and the predictions of norms of each SAE, fitted on some documents of a store and tested on others.

    saes: name → SAE, or any function of raw activations. bias: whether the maps have one (the authors' have none). ridges: to
    choose from by cross-validation among the folds of `parts`, for each vector and each norm by itself; one: taken as it is.
    Returns what was found by name, and norms token by token.

    Three passes over the store. Memory: about 8·(folds + 2)·d_in²·(SAEs + 1) bytes, two numbers a token and SAE, and one shard.
    Source: Engels et al. 2024, the tests of norm and vector; splits by document, cross-validation and intervals are ours.
    """

    def chosen(moments: Moments, group: torch.Tensor) -> torch.Tensor:
        return moments.best_ridge(group, ridges, bias) if len(ridges) > 1 else torch.full((len(group),), float(ridges[0]))

    d_in, many = acts.d_in, len(saes)
    shift = acts.rows(256).double().mean(0)
    moments = Moments(shift, many * (d_in + 3), parts.folds)  # targets of each: its error, and the norms that need no map
    for x, _, fold, _ in tqdm(stream(acts, parts, "fit"), desc="fitting errors", unit="block", leave=False):
        each = (_Vectors.of(x, sae) for sae in saes.values())
        moments.add(x, torch.cat([part for vectors in each for part in (vectors.error, vectors.squares())], -1), fold)
    # the vector of an SAE is one group, that is, has one ridge, and each of its norms another
    group = torch.cat([4 * n + torch.tensor([0] * d_in + [1, 2, 3]) for n in range(many)])
    ridge = chosen(moments, group)
    errors = moments.fit(ridge, bias)
    weight, offset = errors.weight.view(d_in, many, d_in + 3), errors.bias.view(many, d_in + 3)
    linear = {name: Linear(weight[:, n, :d_in].contiguous(), offset[n, :d_in]) for n, name in enumerate(saes)}

    moments = moments.again(2 * many)
    for x, _, fold, _ in tqdm(stream(acts, parts, "fit"), desc="fitting norms", unit="block", leave=False):
        moments.add(x, torch.cat([_Vectors.of(x, sae, linear[name]).squares()[:, 3:] for name, sae in saes.items()], -1), fold)
    more = moments.fit(chosen(moments, torch.arange(2 * many)), bias)
    norm = {name: Linear(torch.cat([weight[:, n, d_in:], more.weight[:, 2 * n : 2 * n + 2]], -1),
                         torch.cat([offset[n, d_in:], more.bias[2 * n : 2 * n + 2]])) for n, name in enumerate(saes)}  # fmt: skip

    tests = {name: _Testing(parts, d_in) for name in saes}
    tokens: dict[str, list[torch.Tensor]] = {name: [] for name in TokenNorms._fields}
    for x, document, fold, ids in tqdm(stream(acts, parts), desc="testing", unit="block", leave=False):
        norms = []
        for name, sae in saes.items():
            vectors = _Vectors.of(x, sae, linear[name])
            squares = vectors.squares()
            tests[name].add(vectors, squares, norm[name](x), document, fold)
            norms.append(squares[:, [2, 4]].sqrt().float())
        error, nonlinear = torch.stack(norms, -1).unbind(1)
        for name, values in zip(TokenNorms._fields, (error, nonlinear, x.norm(dim=-1), document, fold, ids), strict=True):
            tokens[name].append(values)
    found = {name: Decomposition(linear[name], norm[name], ridge[n * (d_in + 3)].item(), tests[name].sums())
             for n, name in enumerate(saes)}  # fmt: skip
    return found, TokenNorms(*(torch.cat(values) for values in tokens.values()))


class _Testing:
    """What :class:`HeldOut` has, summed block by block over documents for testing."""

    def __init__(self, parts: Split, d_in: int):
        self.tested = (parts.fold < 0).nonzero().squeeze(-1)
        many = len(parts.fold)
        shapes = [(), (d_in,), (), (d_in,), (d_in,), (d_in,), (len(NORMS),), (len(NORMS),), (len(NORMS),)]
        self.kept = [torch.zeros(many, *shape, dtype=torch.float64) for shape in shapes]

    def add(self, vectors: _Vectors, squares: torch.Tensor, predicted: torch.Tensor, document: torch.Tensor,
            fold: torch.Tensor) -> None:
        mine = fold < 0
        x, error, nonlinear = (v[mine] for v in (vectors.x, vectors.error, vectors.nonlinear))
        squares, missed = squares[mine], (squares - predicted)[mine]
        values = (torch.ones(len(x), dtype=torch.float64), x, x.square().sum(-1), error, error.square(), nonlinear.square(),
                  squares, squares.square(), missed.square())
        for kept, value in zip(self.kept, values, strict=True):
            kept.index_add_(0, document[mine], value)

    def sums(self) -> HeldOut:
        return HeldOut(*(kept[self.tested] for kept in self.kept))


def bootstrap(statistic: Callable[[torch.Tensor], torch.Tensor], documents: int, draws: int = 1000, level: float = 0.95,
              seed: int = 0) -> Interval:
    """A statistic with its percentile interval over documents drawn with replacement.

    statistic: weights [draws, documents], how often each was drawn → [draws], such as :meth:`HeldOut.fvu`. The same seed draws
    the same documents, so that differences between SAEs may be bootstrapped as one statistic.
    """
    drawn = torch.multinomial(torch.ones(documents), documents * draws, replacement=True,
                              generator=torch.Generator().manual_seed(seed)).view(draws, documents)  # fmt: skip
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    weights = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    ends = torch.quantile(statistic(weights), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return Interval(statistic(torch.ones(1, documents, dtype=torch.float64)).item(), *ends.tolist())


def over_seeds(tests: Sequence[HeldOut], statistic: Callable[[HeldOut, torch.Tensor], torch.Tensor],
               draws: int = 1000) -> Interval:
    """Mean of a statistic over SAEs that differ in their seed, with an interval (95 %) for other documents and other seeds.

    statistic: (HeldOut, weights) → [draws]. The interval's half is the root of the sum of the squares of two: of the bootstrap of
    the mean over documents, which all seeds share, and of the t-interval over seeds. One seed: documents only.
    """

    def mean(weights: torch.Tensor) -> torch.Tensor:
        return torch.stack([statistic(test, weights) for test in tests]).mean(0)

    drawn = bootstrap(mean, len(tests[0].tokens), draws)
    seeds = mean_interval([statistic(test, torch.ones(1, len(test.tokens), dtype=torch.float64)).item() for test in tests])
    other = seeds.half if len(tests) > 1 else 0.0
    return Interval(drawn.mean, drawn.mean - math.hypot(drawn.mean - drawn.low, other),
                    drawn.mean + math.hypot(drawn.high - drawn.mean, other))  # fmt: skip


# ---- across widths ----------------------------------------------------------------------------------------------


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


def breakdown(widths: Sequence[int], fvu: Sequence[float], fvu_nonlinear: Sequence[float]) -> Breakdown:
    """Split FVU into features not yet learned, linear and nonlinear error (Engels et al. 2024).

    FVU(W) is fitted by scale · W^(−exponent) + offset. Raises ValueError as :func:`jumprelu.scaling.fit_power_law` does: three
    widths at least.
    """
    law = fit_power_law(widths, fvu, offset=True)
    values, level = np.asarray(fvu, dtype=float), float(np.mean(fvu_nonlinear))
    ones = np.ones_like(values)
    return Breakdown(values, values - law.offset, (law.offset - level) * ones, level * ones, law)


def scalar_r2(y: torch.Tensor, features: torch.Tensor, tokens: TokenNorms, given: torch.Tensor | None = None,
              draws: int = 1000) -> Interval:
    """R² of a number by token, y: [n], as predicted from `features`, [n, q], by least squares with a bias.

    given: [n, r], features that are known anyway: the result is then the share of what these leave unexplained that `features`
    explain. Fitted and tested on the documents that `tokens` were; tokens with a NaN count in neither.
    """
    ones = torch.ones(len(y), 1, dtype=torch.float64)
    before = ones if given is None else torch.cat([ones, given.double()], -1)
    after = torch.cat([before, features.double()], -1)
    known = y.isfinite() & after.isfinite().all(-1)
    fitting, testing = known & (tokens.fold >= 0), known & (tokens.fold < 0)
    documents, document = tokens.document[testing].unique(return_inverse=True)
    sums = []
    for regressors in (before, after):
        solution = torch.linalg.lstsq(regressors[fitting], y[fitting, None].double(), driver="gelsd").solution
        missed = y[testing].double() - (regressors[testing] @ solution).squeeze(-1)
        by_document = torch.zeros(3, len(documents), dtype=torch.float64)
        sums.append(by_document.index_add_(1, document, torch.stack([torch.ones_like(missed), missed, missed.square()])))

    def r2(weights: torch.Tensor) -> torch.Tensor:
        (n, total, square), (_, _, left) = ((weights @ part.T).unbind(-1) for part in sums)
        return 1 - left / (square if given is not None else square - total.square() / n)

    return bootstrap(r2, len(documents), draws)


# ---- other regressors -------------------------------------------------------------------------------------------


class Regressed(NamedTuple):
    """Sums over each document for testing, D of them, of vectors that were predicted from something else than x."""

    tokens: torch.Tensor
    """[D]"""
    sum: torch.Tensor
    """Σ vector, [D, d_in]"""
    square: torch.Tensor
    """Σ‖vector‖², [D]"""
    residual: torch.Tensor
    """Σ‖vector − prediction‖², [D]"""

    def r2(self, weights: torch.Tensor) -> torch.Tensor:
        """Pooled R²; weights: [draws, D], returns [draws]."""
        total = weights @ self.square - (weights @ self.sum).square().sum(-1) / (weights @ self.tokens)
        return 1 - weights @ self.residual / total


@torch.no_grad()
def regress_errors(acts: Activations, sae: Reconstruct, linear: Linear, source: Activations, through: Reconstruct, parts: Split,
                   ridges: Sequence[float] = RIDGES) -> dict[str, Regressed]:
    """SaeError and its two parts, predicted from `through` of the activations at another place, such as an SAE's output there.

    acts, source: stores of the same tokens in the same order; linear: of `sae` (:func:`decompose`). Fitted and tested on the
    documents of `parts`, with a bias; a ridge each. Returns "error", "linear" and "nonlinear". Raises ValueError for stores of
    different tokens. Source: Engels et al. 2024, the maps from earlier components.
    """
    def pairs(which: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, Rows]]:
        for here, there in zip(stream(acts, parts, which), stream(source, parts, which), strict=True):
            if not (torch.equal(here.ids, there.ids) and torch.equal(here.document, there.document)):
                raise ValueError("the two stores hold different tokens, or their shards differ: harvest both from the same rows "
                                 "of tokens, with the same shard_rows")
            vectors = _Vectors.of(here.x, sae, linear)
            yield through(there.x).double(), torch.cat([vectors.error, vectors.linear, vectors.nonlinear], -1), here

    names, d_in = ("error", "linear", "nonlinear"), acts.d_in
    moments: Moments | None = None
    for regressors, targets, rows in pairs("fit"):
        moments = moments or Moments(regressors.mean(0), targets.shape[1], parts.folds)
        moments.add(regressors, targets, rows.fold)
    group = torch.arange(len(names)).repeat_interleave(d_in)
    fit = moments.fit(moments.best_ridge(group, ridges) if len(ridges) > 1 else ridges[0])
    many = len(parts.fold)
    shapes = [(), (len(names), d_in), (len(names),), (len(names),)]
    sums = [torch.zeros(many, *shape, dtype=torch.float64) for shape in shapes]
    for regressors, targets, rows in pairs("test"):
        missed = (targets - fit(regressors)).unflatten(-1, (len(names), d_in))
        targets = targets.unflatten(-1, (len(names), d_in))
        values = (torch.ones(len(targets), dtype=torch.float64), targets, targets.square().sum(-1), missed.square().sum(-1))
        for total, value in zip(sums, values, strict=True):
            total.index_add_(0, rows.document, value)
    tested = parts.fold < 0
    tokens, total, square, residual = (one[tested] for one in sums)
    return {name: Regressed(tokens, total[:, n], square[:, n], residual[:, n]) for n, name in enumerate(names)}


# ---- controls ---------------------------------------------------------------------------------------------------


def linear_controls(acts: Activations, parts: Split, components: Sequence[int]) -> dict[str, Linear]:
    """Reconstructions that are linear, from the documents for fitting: the mean (a dead SAE), half of x about the mean
    (shrinkage alone), and the first principal components, as many as each of `components` says."""
    moments = Moments(acts.rows(256).double().mean(0), 0)
    for rows in stream(acts, parts, "fit"):
        moments.add(rows.x, rows.x[:, :0])
    offset = moments.x[0] / moments.n[0]
    mean = moments.shift + offset
    vectors = torch.linalg.eigh(moments.xx[0] / moments.n[0] - torch.outer(offset, offset)).eigenvectors
    eye = torch.eye(len(mean), dtype=torch.float64)
    maps = {"mean only": 0 * eye, "shrunk by half": 0.5 * eye}
    maps |= {f"{k} principal components": vectors[:, -k:] @ vectors[:, -k:].T for k in components}
    return {name: Linear(weight, mean - mean @ weight) for name, weight in maps.items()}
