"""SAE dark matter: how much of what an SAE leaves unexplained is a linear function of the
activation.

    SaeError(x) = x − Sae(x)      LinearError(x) = Bx + c, its best linear prediction      NonlinearError = SaeError − LinearError

(Engels et al. 2024, arXiv 2410.14670; its abstract and scripts were read.) Two questions to an SAE:
how well do ‖SaeError‖² and SaeError itself follow from x by least squares, on documents that the
fit did not see?

Notable here:
- no error vector is ever stored: least squares needs sums only (:mod:`jumprelu.dark.regression`),
  and Σxxᵀ once for all SAEs.
- tokens of one document are alike, so documents are split, never tokens (:func:`split`): maps are
  fitted on some, all that is reported is of others, and intervals come from drawing those again
  (:func:`jumprelu.intervals.bootstrap`).
- x is the regressor, so the residual of x − Sae(x) is that of −Sae(x): NonlinearError says how far
  the SAE is from linear, and nothing else. A dead SAE has none.
- R² of a vector has two definitions: "pooled" divides sums over all dimensions, the authors'
  scripts average each one's R².
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from companion.rails.scaling import PowerLaw, fit_power_law
from tqdm import tqdm

from ..activations import Activations
from ..sae import check_autoencoder
from .regression import RIDGES, Linear, Moments

NORMS = ("x", "sae", "error", "linear", "nonlinear")
"""Vectors whose squared norm is predicted from x: x, Sae(x), SaeError and its two parts."""

ROWS = 2048
"""Tokens that are worked on at a time."""

MEMORY = 2**31
"""Bytes that sums for fitting may take: with more SAEs than fit, each pass over the store is made
for some of them at a time."""

Reconstruct = Callable[[torch.Tensor], torch.Tensor]
"""Raw activations [n, d_in] to reconstructions [n, d_in]: an SAE, or a control."""


# ---- documents


class Split(NamedTuple):
    """Documents for fitting and for testing. documents: sorted; fold: of each, −1 for testing, else
    0 … folds − 1."""

    documents: torch.Tensor
    fold: torch.Tensor
    folds: int
    start: int = 0
    """The first position in a row of tokens that counts."""


def split(
    acts: Activations, test_share: float = 0.4, folds: int = 4, seed: int = 0, start: int = 0
) -> Split:
    """Deal the documents of a store at random: a share to test on, the rest into `folds` groups to
    fit on.

    start: tokens before this position of their row are left out, and documents that have no others.
    Raises ValueError unless there are two documents to test on and one for each fold.
    """
    documents = torch.cat(
        [shard.document[shard.position >= start].unique() for shard in acts.shards()]
    ).unique()
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    tested = round(test_share * len(documents))
    if tested < 2 or len(documents) - tested < folds:
        raise ValueError(
            f"{len(documents)} documents with tokens from position {start} on, {tested} of them for testing, are "
            f"too few for {folds} folds and a test: harvest more, with rows_per_document=1"
        )
    fold = torch.empty(len(documents), dtype=torch.long)
    fold[order[:tested]] = -1
    fold[order[tested:]] = torch.arange(len(documents) - tested) % folds
    return Split(documents, fold, folds, start)


class Rows(NamedTuple):
    """Some rows of a store. x: float32 [n, d_in]; document: its place in `Split.documents`, [n];
    fold, ids: [n]."""

    x: torch.Tensor
    document: torch.Tensor
    fold: torch.Tensor
    ids: torch.Tensor


def stream(acts: Activations, parts: Split, which: str = "all") -> Iterator[Rows]:
    """Rows of the documents for "fit", for "test", or of "all", in the order of the store; at most
    :data:`ROWS` at a time.

    Raises ValueError if the store has a document that `parts` was not made for.
    """
    for shard in acts.shards():
        counted = (shard.position >= parts.start).nonzero().squeeze(-1)
        known = shard.document[counted].to(parts.documents.dtype)
        document = torch.searchsorted(parts.documents, known).clamp(max=len(parts.documents) - 1)
        if not torch.equal(parts.documents[document], known):
            raise ValueError(
                f"{acts.folder} has documents that the split does not know: make it with `split` from this store, "
                "or from one of the same tokens"
            )
        fold = parts.fold[document]
        wanted = (
            {"fit": fold >= 0, "test": fold < 0, "all": torch.ones_like(fold, dtype=torch.bool)}[
                which
            ]
            .nonzero()
            .squeeze(-1)
        )
        for some in wanted.split(ROWS):
            rows = counted[some]
            yield Rows(shard.activations[rows], document[some], fold[some], shard.ids[rows])


# ---- the decomposition


class HeldOut(NamedTuple):
    """Sums over each document for testing, D of them, in float64, from which all that is reported
    follows.

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
        return weights @ self.x_square - (weights @ self.x).square().sum(-1) / (
            weights @ self.tokens
        )

    def fvu(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ‖SaeError‖² / Σ‖x − x̄‖²."""
        return weights @ self.error_square.sum(-1) / self.variance(weights)

    def fvu_nonlinear(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ‖NonlinearError‖² / Σ‖x − x̄‖²: the FVU of Sae + LinearError."""
        return weights @ self.nonlinear_square.sum(-1) / self.variance(weights)

    def vector_r2(self, weights: torch.Tensor, pooled: bool = True) -> torch.Tensor:
        """1 − Σ‖NonlinearError‖² / Σ‖SaeError − its mean‖²; not `pooled`: the mean over dimensions
        of each one's R²."""
        left = weights @ self.nonlinear_square
        total = (
            weights @ self.error_square
            - (weights @ self.error).square() / (weights @ self.tokens)[:, None]
        )
        return 1 - left.sum(-1) / total.sum(-1) if pooled else (1 - left / total).mean(-1)

    def norm_r2(self, weights: torch.Tensor, of: str = "error") -> torch.Tensor:
        """R² of ‖·‖² as predicted from x; of: one of :data:`NORMS`."""
        which = NORMS.index(of)
        total = weights @ self.norm_square[:, which] - (weights @ self.norm[:, which]).square() / (
            weights @ self.tokens
        )
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
    """Norms token by token, in the order of the store. error, nonlinear: float32 [n, SAEs]; x:
    float32 [n]; the others [n]."""

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
    """The five vectors of :data:`NORMS` for some tokens, each float64 [n, d_in]; the last two are
    None without a map."""

    x: torch.Tensor
    sae: torch.Tensor
    error: torch.Tensor
    linear: torch.Tensor | None
    nonlinear: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, sae: Reconstruct, linear: Linear | None = None) -> _Vectors:
        error = x.double() - (x_hat := sae(x).double())
        predicted = None if linear is None else linear(x)
        return cls(
            x.double(), x_hat, error, predicted, None if predicted is None else error - predicted
        )

    def squares(self) -> torch.Tensor:
        """Squared norms of those that are known, [n, 3 or 5]."""
        return torch.stack([vector.square().sum(-1) for vector in self if vector is not None], -1)


@torch.no_grad()
def decompose(
    acts: Activations,
    saes: Mapping[str, Reconstruct],
    parts: Split,
    bias: bool = True,
    ridges: Sequence[float] = RIDGES,
    device: str | torch.device | None = None,
) -> tuple[dict[str, Decomposition], TokenNorms]:
    """LinearError and the predictions of norms of each SAE, fitted on some documents of a store and
    tested on others.

    saes: name → SAE, or any function of raw activations. bias: whether the maps have one (the
    authors' have none). ridges: to choose from by cross-validation among the folds of `parts`, for
    each vector and each norm by itself; one: taken as it is. device: default is a GPU where there
    is one; SAEs are moved there while they are needed. Returns what was found by name, and norms
    token by token, on the CPU.

    Three passes over the store, and as many again for every :data:`MEMORY` of sums. Memory: about
    8·(folds + 2)·d_in² bytes an SAE, within that bound, two numbers a token and SAE, and one shard.
    Source: Engels et al. 2024, the tests of norm and vector; splits by document, cross-validation
    and intervals are ours.
    """
    for sae in saes.values():
        check_autoencoder(sae)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    each = 8 * (parts.folds + 2) * acts.d_in * (acts.d_in + 3)
    known, found, norms = (
        Moments(acts.rows(256).double().mean(0).to(device), 0, parts.folds),
        {},
        [],
    )
    names = iter(saes)
    while some := {name: saes[name] for name in itertools.islice(names, max(1, MEMORY // each))}:
        homes = {
            name: next(sae.parameters()).device
            for name, sae in some.items()
            if isinstance(sae, torch.nn.Module)
        }
        placed = {name: _on(device, sae) for name, sae in some.items()}
        linear, norm, ridge, known = _fit(acts, placed, parts, bias, ridges, known)
        tests, tokens = _test(acts, placed, linear, norm, parts, device)
        for name in some:
            found[name] = Decomposition(
                _on("cpu", linear[name]), _on("cpu", norm[name]), ridge[name], tests[name]
            )
            _on(homes.get(name, device), placed[name])
        norms.append(tokens)
    first = norms[0]
    return found, first._replace(
        error=torch.cat([one.error for one in norms], 1),
        nonlinear=torch.cat([one.nonlinear for one in norms], 1),
    )


def _on(device: str | torch.device, function: Reconstruct) -> Reconstruct:
    """A module, moved; a linear map, copied if need be; any other function as it is."""
    if isinstance(function, Linear):
        return Linear(*(tensor.to(device) for tensor in function))
    return function.to(device) if isinstance(function, torch.nn.Module) else function


def _fit(
    acts: Activations,
    saes: Mapping[str, Reconstruct],
    parts: Split,
    bias: bool,
    ridges: Sequence[float],
    known: Moments,
) -> tuple[dict[str, Linear], dict[str, Linear], dict[str, float], Moments]:
    """(map to the error, maps to the norms, ridge of the first) of each SAE by name, and sums that
    have Σxxᵀ.

    known: sums with the shift, and with Σxxᵀ unless they are empty.
    """

    def chosen(moments: Moments, group: torch.Tensor) -> torch.Tensor:
        group = group.to(known.shift.device)
        only = torch.full_like(group, ridges[0], dtype=torch.float64)
        return moments.best_ridge(group, ridges, bias) if len(ridges) > 1 else only

    d_in, many, device = acts.d_in, len(saes), known.shift.device
    targets = many * (d_in + 3)  # of each: its error, and the norms that need no map
    moments = known.again(targets) if known.n.any() else Moments(known.shift, targets, parts.folds)
    for x, _, fold, _ in tqdm(
        stream(acts, parts, "fit"), desc="fitting errors", unit="block", leave=False
    ):
        x, fold = x.to(device), fold.to(device)
        each = (_Vectors.of(x, sae) for sae in saes.values())
        moments.add(
            x,
            torch.cat(
                [part for vectors in each for part in (vectors.error, vectors.squares())], -1
            ),
            fold,
        )
    # the vector of an SAE is one group, that is, has one ridge, and each of its norms another
    ridge = chosen(
        moments, torch.cat([4 * n + torch.tensor([0] * d_in + [1, 2, 3]) for n in range(many)])
    )
    errors = moments.fit(ridge, bias)
    weight, offset = errors.weight.view(d_in, many, d_in + 3), errors.bias.view(many, d_in + 3)
    linear = {
        name: Linear(weight[:, n, :d_in].contiguous(), offset[n, :d_in])
        for n, name in enumerate(saes)
    }

    moments = moments.again(2 * many)
    for x, _, fold, _ in tqdm(
        stream(acts, parts, "fit"), desc="fitting norms", unit="block", leave=False
    ):
        x, fold = x.to(device), fold.to(device)
        moments.add(
            x,
            torch.cat(
                [_Vectors.of(x, sae, linear[name]).squares()[:, 3:] for name, sae in saes.items()],
                -1,
            ),
            fold,
        )
    more = moments.fit(chosen(moments, torch.arange(2 * many)), bias)
    norm = {
        name: Linear(
            torch.cat([weight[:, n, d_in:], more.weight[:, 2 * n : 2 * n + 2]], -1),
            torch.cat([offset[n, d_in:], more.bias[2 * n : 2 * n + 2]]),
        )
        for n, name in enumerate(saes)
    }
    return (
        linear,
        norm,
        {name: ridge[n * (d_in + 3)].item() for n, name in enumerate(saes)},
        moments.again(0),
    )


def _test(
    acts: Activations,
    saes: Mapping[str, Reconstruct],
    linear: Mapping[str, Linear],
    norm: Mapping[str, Linear],
    parts: Split,
    device: torch.device,
) -> tuple[dict[str, HeldOut], TokenNorms]:
    """What :class:`HeldOut` has of each SAE, and norms of all tokens."""
    tests = {name: _Testing(parts, acts.d_in) for name in saes}
    tokens: dict[str, list[torch.Tensor]] = {name: [] for name in TokenNorms._fields}
    for x, document, fold, ids in tqdm(
        stream(acts, parts), desc="testing", unit="block", leave=False
    ):
        norms, mine = [], (fold < 0).to(device)
        x = x.to(device)
        for name, sae in saes.items():
            vectors = _Vectors.of(x, sae, linear[name])
            squares = vectors.squares()
            tests[name].add(vectors, squares, squares - norm[name](x), document[fold < 0], mine)
            norms.append(squares[:, [2, 4]].sqrt().float().cpu())
        error, nonlinear = torch.stack(norms, -1).unbind(1)
        for name, values in zip(
            TokenNorms._fields,
            (error, nonlinear, x.norm(dim=-1).cpu(), document, fold, ids),
            strict=True,
        ):
            tokens[name].append(values)
    return {name: test.sums() for name, test in tests.items()}, TokenNorms(
        *(torch.cat(values) for values in tokens.values())
    )


class _Testing:
    """What :class:`HeldOut` has, summed block by block over documents for testing."""

    def __init__(self, parts: Split, d_in: int):
        self.tested = (parts.fold < 0).nonzero().squeeze(-1)
        many = len(parts.fold)
        shapes = [
            (),
            (d_in,),
            (),
            (d_in,),
            (d_in,),
            (d_in,),
            (len(NORMS),),
            (len(NORMS),),
            (len(NORMS),),
        ]
        self.kept = [torch.zeros(many, *shape, dtype=torch.float64) for shape in shapes]

    def add(
        self,
        vectors: _Vectors,
        squares: torch.Tensor,
        missed: torch.Tensor,
        document: torch.Tensor,
        mine: torch.Tensor,
    ) -> None:
        """mine: which rows are for testing; document: of these; squares: squared norms; missed: of
        their predictions."""
        x, error, nonlinear = (
            vector[mine] for vector in (vectors.x, vectors.error, vectors.nonlinear)
        )
        squares, missed = squares[mine], missed[mine]
        values = (
            torch.ones(len(x), dtype=torch.float64),
            x,
            x.square().sum(-1),
            error,
            error.square(),
            nonlinear.square(),
            squares,
            squares.square(),
            missed.square(),
        )
        for kept, value in zip(self.kept, values, strict=True):
            kept.index_add_(0, document, value.cpu())

    def sums(self) -> HeldOut:
        return HeldOut(*(kept[self.tested] for kept in self.kept))


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
    :func:`companion.rails.scaling.fit_power_law` does: three widths at least.
    """
    law = fit_power_law(widths, fvu, offset=True)
    values, level = np.asarray(fvu, dtype=float), float(np.mean(fvu_nonlinear))
    ones = np.ones_like(values)
    return Breakdown(values, values - law.offset, (law.offset - level) * ones, level * ones, law)


class Predicted(NamedTuple):
    """Sums over each document for testing, D of them, of a number by token that was predicted; each
    [D], float64."""

    tokens: torch.Tensor
    sum: torch.Tensor
    """Σ of the number, or of what is left of it where something is known anyway."""
    square: torch.Tensor
    """Σ of its square."""
    residual: torch.Tensor
    """Σ (number − prediction)²."""
    given: bool
    """Whether something is known anyway."""

    def r2(self, weights: torch.Tensor) -> torch.Tensor:
        """R², or the share of what was left that is explained besides; weights: [draws, D], returns
        [draws]."""
        total = weights @ self.square
        if not self.given:
            total = total - (weights @ self.sum).square() / (weights @ self.tokens)
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


# ---- other regressors


class Regressed(NamedTuple):
    """Sums over each document for testing, D of them, of vectors that were predicted from something
    else than x."""

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
        total = weights @ self.square - (weights @ self.sum).square().sum(-1) / (
            weights @ self.tokens
        )
        return 1 - weights @ self.residual / total


@torch.no_grad()
def regress_errors(
    acts: Activations,
    sae: Reconstruct,
    linear: Linear,
    source: Activations,
    through: Reconstruct,
    parts: Split,
    ridges: Sequence[float] = RIDGES,
) -> dict[str, Regressed]:
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
                    "the two stores hold different tokens, or their shards differ: harvest both from the same rows "
                    "of tokens, with the same shard_rows"
                )
            vectors = _Vectors.of(here.x, sae, linear)
            yield (
                through(there.x).double(),
                torch.cat([vectors.error, vectors.linear, vectors.nonlinear], -1),
                here,
            )

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
        name: Regressed(tokens, total[:, n], square[:, n], residual[:, n])
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
