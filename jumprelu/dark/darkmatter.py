"""SAE dark matter: how much of what an SAE leaves unexplained is a linear function of the
activation.

    SaeError(x) = x − Sae(x)
    LinearError(x) = Bx + c, the best linear prediction of SaeError
    NonlinearError(x) = SaeError(x) − LinearError(x)

(Engels et al. 2024, arXiv 2410.14670; its abstract and scripts were read.) Two questions to an SAE:
how well do ‖SaeError‖² and SaeError itself follow from x by least squares, on documents that the
fit did not see?

- no error vector is ever stored: least squares needs sums only (:mod:`jumprelu.dark.regression`),
  and Σxxᵀ once for all SAEs.
- tokens of one document are alike, so documents are split, never tokens (:func:`split`): maps are
  fitted on some, all that is reported is of others, and intervals come from drawing those again
  (:func:`jumprelu.intervals.bootstrap`).
- x is the regressor, so NonlinearError says how far the SAE is from linear, and nothing else. A
  dead SAE has none.
- R² of a vector has two definitions: "pooled" divides sums over all dimensions, the authors'
  scripts average each one's R².
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
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
    each = [shard.document[shard.position >= start].unique() for shard in acts.shards()]
    documents = torch.cat(each).unique()
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    tested = round(test_share * len(documents))
    if tested < 2 or len(documents) - tested < folds:
        raise ValueError(
            f"{len(documents)} documents with tokens from position {start} on, {tested} of them to "
            f"test on, are too few for {folds} folds: harvest more, with rows_per_document=1"
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
                f"{acts.folder} has documents that the split does not know: make one of this store"
            )
        fold = parts.fold[document]
        wanted = {"fit": fold >= 0, "test": fold < 0, "all": fold >= -1}[which]
        for some in wanted.nonzero().squeeze(-1).split(ROWS):
            rows = counted[some]
            yield Rows(shard.activations[rows], document[some], fold[some], shard.ids[rows])


# ---- the decomposition


class HeldOut(NamedTuple):
    """Sums over each document for testing, D of them, in float64, from which all that is reported
    follows.

    Statistics take `weights`, [draws, D]: how often each document was drawn. They return [draws].
    """

    tokens: torch.Tensor
    """How many, [D]; then Σx, [D, d_in], and Σ‖x‖², [D]"""
    x: torch.Tensor
    x_square: torch.Tensor
    error: torch.Tensor
    """Σ SaeError and then Σ SaeError², [D, d_in]"""
    error_square: torch.Tensor
    nonlinear_square: torch.Tensor
    """Σ NonlinearError², [D, d_in]: what the map leaves of SaeError"""
    norm: torch.Tensor
    """Of the squared norm of each of :data:`NORMS`, [D, 5]: Σ, Σ of squares, and Σ of the squared
    errors of its prediction from x"""
    norm_square: torch.Tensor
    norm_residual: torch.Tensor

    def variance(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ‖x − x̄‖²."""
        mean_part = (weights @ self.x).square().sum(-1) / (weights @ self.tokens)
        return weights @ self.x_square - mean_part

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
        mean_part = (weights @ self.error).square() / (weights @ self.tokens)[:, None]
        total = weights @ self.error_square - mean_part
        return 1 - left.sum(-1) / total.sum(-1) if pooled else (1 - left / total).mean(-1)

    def norm_r2(self, weights: torch.Tensor, of: str = "error") -> torch.Tensor:
        """R² of ‖·‖² as predicted from x; of: one of :data:`NORMS`."""
        which = NORMS.index(of)
        mean_part = (weights @ self.norm[:, which]).square() / (weights @ self.tokens)
        total = weights @ self.norm_square[:, which] - mean_part
        return 1 - weights @ self.norm_residual[:, which] / total


class Decomposition(NamedTuple):
    """What :func:`decompose` found for one SAE."""

    linear: Linear
    """SaeError from x: [d_in, d_in] and [d_in]; ridge: its."""
    norm: Linear
    """Squared norms of :data:`NORMS` from x: [d_in, 5] and [5]."""
    ridge: float
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
        x_hat = sae(x).double()
        error = x.double() - x_hat
        if linear is None:
            return cls(x.double(), x_hat, error, None, None)
        predicted = linear(x)
        return cls(x.double(), x_hat, error, predicted, error - predicted)

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
    is one; SAEs elsewhere are copied there. Returns what was found by name, and norms token by
    token, on the CPU.

    Three passes over the store, and as many again for every :data:`MEMORY` of sums. Memory: about
    8·(folds + 2)·d_in² bytes an SAE, within that bound, two numbers a token and SAE, and one shard.
    Source: Engels et al. 2024, the tests of norm and vector; splits by document, cross-validation
    and intervals are ours.
    """
    for sae in saes.values():
        check_autoencoder(sae)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    at_once = max(1, MEMORY // (8 * (parts.folds + 2) * acts.d_in * (acts.d_in + 3)))
    moments = Moments(acts.rows(256).double().mean(0).to(device), 0, parts.folds)
    names, found, norms = list(saes), {}, []
    for start in range(0, len(names), at_once):
        some = {name: _on(device, saes[name]) for name in names[start : start + at_once]}
        fitted, moments = _fit(acts, some, parts, bias, ridges, moments)
        tests, tokens = _test(acts, some, fitted, parts, device)
        norms.append(tokens)
        for name, (linear, norm, ridge) in fitted.items():
            found[name] = Decomposition(_on("cpu", linear), _on("cpu", norm), ridge, tests[name])
    return found, norms[0]._replace(
        error=torch.cat([one.error for one in norms], 1),
        nonlinear=torch.cat([one.nonlinear for one in norms], 1),
    )


def _on(device: str | torch.device, function: Reconstruct) -> Reconstruct:
    """A linear map or a module on a device, copied there if it is elsewhere; any other function as
    it is."""
    if isinstance(function, Linear):
        return Linear(*(tensor.to(device) for tensor in function))
    if isinstance(function, torch.nn.Module) and next(function.parameters()).device != device:
        return copy.deepcopy(function).to(device)
    return function


def _fit(
    acts: Activations,
    saes: Mapping[str, Reconstruct],
    parts: Split,
    bias: bool,
    ridges: Sequence[float],
    moments: Moments,
) -> tuple[dict[str, tuple[Linear, Linear, float]], Moments]:
    """(map to the error, maps to the norms, ridge of the first) of each SAE by name, and sums to
    go on from.

    moments: sums with the shift, and with Σxxᵀ unless they are empty, as for the first SAEs.
    """
    d_in, many, device = acts.d_in, len(saes), moments.shift.device
    width = d_in + 3  # targets of an SAE: its error, and the norms that need no map
    if moments.n.any():
        moments = moments.again(many * width)
    else:
        moments = Moments(moments.shift, many * width, parts.folds)
    for x, _, fold, _ in _progress(stream(acts, parts, "fit"), "fitting errors"):
        x, targets = x.to(device), []
        for sae in saes.values():
            vectors = _Vectors.of(x, sae)
            targets += [vectors.error, vectors.squares()]
        moments.add(x, torch.cat(targets, -1), fold.to(device))
    # the error of an SAE is one group, that is, has one ridge, and each of its norms another
    group = [torch.tensor([0] * d_in + [1, 2, 3]) + 4 * number for number in range(many)]
    ridge = moments.best_ridge(torch.cat(group).to(device), ridges, bias)
    fit = moments.fit(ridge, bias)
    weight, offset = fit.weight.view(d_in, many, width), fit.bias.view(many, width)
    linear = [Linear(weight[:, n, :d_in].contiguous(), offset[n, :d_in]) for n in range(many)]

    moments = moments.again(2 * many)
    for x, _, fold, _ in _progress(stream(acts, parts, "fit"), "fitting norms"):
        x, targets = x.to(device), []
        for sae, own in zip(saes.values(), linear, strict=True):
            targets.append(_Vectors.of(x, sae, own).squares()[:, 3:])
        moments.add(x, torch.cat(targets, -1), fold.to(device))
    each = torch.arange(2 * many, device=device)
    more = moments.fit(moments.best_ridge(each, ridges, bias), bias)
    found = {}
    for n, name in enumerate(saes):
        two = slice(2 * n, 2 * n + 2)
        norm = Linear(
            torch.cat([weight[:, n, d_in:], more.weight[:, two]], -1),
            torch.cat([offset[n, d_in:], more.bias[two]]),
        )
        found[name] = linear[n], norm, ridge[n * width].item()
    return found, moments.again(0)


def _test(
    acts: Activations,
    saes: Mapping[str, Reconstruct],
    fitted: Mapping[str, tuple[Linear, Linear, float]],
    parts: Split,
    device: torch.device,
) -> tuple[dict[str, HeldOut], TokenNorms]:
    """What :class:`HeldOut` has of each SAE, and norms of all tokens."""
    shapes = [(), (acts.d_in,), (), *[(acts.d_in,)] * 3, *[(len(NORMS),)] * 3]
    sums = {
        name: [torch.zeros(len(parts.fold), *shape, dtype=torch.float64) for shape in shapes]
        for name in saes
    }
    tokens: list[TokenNorms] = []
    for x, document, fold, ids in _progress(stream(acts, parts), "testing"):
        x, tested, norms = x.to(device), fold < 0, []
        mine = tested.to(device)
        for name, sae in saes.items():
            linear, norm, _ = fitted[name]
            vectors = _Vectors.of(x, sae, linear)
            squares = vectors.squares()
            raw, error = vectors.x[mine], vectors.error[mine]
            terms = HeldOut(
                torch.ones(len(raw), dtype=torch.float64),
                raw,
                raw.square().sum(-1),
                error,
                error.square(),
                vectors.nonlinear[mine].square(),
                squares[mine],
                squares[mine].square(),
                (squares - norm(x))[mine].square(),
            )
            for total, term in zip(sums[name], terms, strict=True):
                total.index_add_(0, document[tested], term.cpu())
            norms.append(squares[:, [2, 4]].sqrt().float().cpu())
        error, nonlinear = torch.stack(norms, -1).unbind(1)
        tokens.append(TokenNorms(error, nonlinear, x.norm(dim=-1).cpu(), document, fold, ids))
    tested = parts.fold < 0
    tests = {name: HeldOut(*(total[tested] for total in own)) for name, own in sums.items()}
    return tests, TokenNorms(*(torch.cat(parts) for parts in zip(*tokens, strict=True)))


def _progress(blocks: Iterator[Rows], label: str) -> Iterator[Rows]:
    return tqdm(blocks, desc=label, unit="block", leave=False)
