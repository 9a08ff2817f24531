"""How good is an SAE: sparsity, fidelity, and what splicing it in does to the language model.

Notable here:
- every metric is a ratio of sums over tokens (micro-averaged), with a standard error clustered by
  document: tokens of one document are far from independent.
- FVU is pooled, Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of the evaluated activations; not a mean of
  ratios, and not of squared norms.
- BOS, EOS and pad: their activations are neither replaced nor counted, and a loss is counted
  neither at them nor for predicting them. "Loss at position t" is the cross-entropy of the token at
  t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .corpus import Tokens, as_tokens
from .intervals import Estimate, ratio_estimate, share_estimate
from .lm import LM
from .sae import SAE, Transcoder
from .sites import INPUTS, Key, capture
from .splicing import Batch, Splicer, on_device, place_of, watch

GROUPS = 32
"""Documents are dealt into this many groups for the jackknife of the shares of latents."""


class Report(NamedTuple):
    """What :func:`evaluate` returns; each number with a standard error clustered by document."""

    l0: Estimate
    """Active latents per token."""
    fvu: Estimate
    """Pooled fraction of variance unexplained."""
    delta_loss: Estimate
    """Cross-entropy with the reconstruction spliced in, minus the model's own; nats per token."""
    kl: Estimate
    """KL(model ‖ spliced model) of the next-token distribution; nats per token."""
    loss: Estimate
    """The model's own cross-entropy; nats per token."""
    dead: Estimate
    """Share of latents that never fire on these tokens (so it depends on how many there are)."""
    dense_1: Estimate
    """Share of latents that fire on over 1 % of tokens."""
    dense_10: Estimate
    """Share of latents that fire on over 10 % of tokens."""
    norm_ratio: Estimate
    """Σ x·x̂ / Σ ‖x̂‖² about the mean: above 1 where reconstructions are shrunk (1 is what least
    squares gives)."""
    frequency: torch.Tensor
    """Share of tokens on which each latent fires, shape [d_sae]."""
    l0_per_token: torch.Tensor
    """Active latents of every token evaluated, in order, shape [n_tokens]."""
    n_tokens: int
    n_documents: int

    def __str__(self) -> str:
        shown = (
            "l0",
            "fvu",
            "delta_loss",
            "kl",
            "loss",
            "dead",
            "dense_1",
            "dense_10",
            "norm_ratio",
        )
        lines = [f"{name:>10}  {getattr(self, name)}" for name in shown]
        return "\n".join(lines + [f"{self.n_tokens} tokens of {self.n_documents} documents"])


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Pooled Σ‖x − x̂‖² / Σ‖x − x̄‖²; x, x_hat: [n, d_in]. Raises ValueError for differing shapes
    or constant x."""
    if x.shape != x_hat.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and x_hat {tuple(x_hat.shape)}: expected the same"
        )
    x, x_hat = x.double(), x_hat.double()
    variance = (x - x.mean(0)).square().sum()
    if not variance > 0:
        raise ValueError(
            "the activations do not vary, so FVU is not defined: give more than one distinct row"
        )
    return ((x - x_hat).square().sum() / variance).item()


class _Sums:
    """Sums per document of what the ratios need; only [documents, d_in] is kept, never
    activations."""

    def __init__(self, documents: int, d_in: int, d_sae: int, device: torch.device):
        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.tokens, self.active, self.error, self.square = (zeros(documents) for _ in range(4))
        self.predicted, self.loss, self.spliced, self.kl = (zeros(documents) for _ in range(4))
        self.hat_square, self.cross = zeros(documents), zeros(documents)
        self.x, self.x_hat = zeros(documents, d_in), zeros(documents, d_in)
        self.fired, self.group_tokens = zeros(GROUPS, d_sae), zeros(GROUPS)

    def add_activations(
        self, x: torch.Tensor, x_hat: torch.Tensor, acts: torch.Tensor, document: torch.Tensor
    ) -> torch.Tensor:
        """acts: a sparse tensor [tokens, d_sae]; document: [tokens]. Returns L0 of each token."""
        x, x_hat = x.double(), x_hat.double()
        token, latent = acts.indices()
        l0 = torch.bincount(token, minlength=len(x))
        self.tokens.index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
        self.active.index_add_(0, document, l0.double())
        self.error.index_add_(0, document, (x - x_hat).square().sum(-1))
        self.square.index_add_(0, document, x.square().sum(-1))
        self.hat_square.index_add_(0, document, x_hat.square().sum(-1))
        self.cross.index_add_(0, document, (x * x_hat).sum(-1))
        self.x.index_add_(0, document, x)
        self.x_hat.index_add_(0, document, x_hat)
        group, d_sae = document % GROUPS, self.fired.shape[1]
        self.fired += torch.bincount(group[token] * d_sae + latent, minlength=GROUPS * d_sae).view(
            GROUPS, d_sae
        )
        self.group_tokens += torch.bincount(group, minlength=GROUPS)
        return l0

    def report(self, l0_per_token: torch.Tensor) -> Report:
        used = self.tokens > 0
        n, mean, mean_hat = (
            self.tokens[used],
            self.x.sum(0) / self.tokens.sum(),
            self.x_hat.sum(0) / self.tokens.sum(),
        )
        # Σ(x − x̄)·(x̂ − x̄̂) and its like, from sums alone
        variance = self.square[used] - 2 * self.x[used] @ mean + n * mean.square().sum()
        hat_variance = (
            self.hat_square[used] - 2 * self.x_hat[used] @ mean_hat + n * mean_hat.square().sum()
        )
        covariance = (
            self.cross[used]
            - self.x[used] @ mean_hat
            - self.x_hat[used] @ mean
            + n * (mean @ mean_hat)
        )
        predicted = self.predicted[used]
        if not variance.sum() > 0:
            raise ValueError("the activations do not vary, so FVU is not defined: give more tokens")

        def shares(*bounds):
            return share_estimate(self.fired, self.group_tokens, *bounds)

        return Report(
            l0=ratio_estimate(self.active[used], n),
            fvu=ratio_estimate(self.error[used], variance),
            delta_loss=ratio_estimate((self.spliced - self.loss)[used], predicted),
            kl=ratio_estimate(self.kl[used], predicted),
            loss=ratio_estimate(self.loss[used], predicted),
            dead=shares(-1.0, 0.0),
            dense_1=shares(0.01),
            dense_10=shares(0.1),
            norm_ratio=ratio_estimate(covariance, hat_variance),
            frequency=(self.fired.sum(0) / self.group_tokens.sum()).float().cpu(),
            l0_per_token=l0_per_token,
            n_tokens=int(n.sum()),
            n_documents=int(used.sum()),
        )


class _Reconstruct(NamedTuple):
    """What takes the activations' place, and is entered in the sums on the way."""

    sae: SAE
    seen: list[torch.Tensor]
    """What the SAE reads: [rows, positions, d_in], when the pass comes to the splice."""
    batch: Batch
    sums: _Sums
    l0: list[torch.Tensor]

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        sae, keep = self.sae, self.batch.keep
        x, target = self.seen[0][keep].to(sae.dtype), value.to(sae.dtype)
        acts = sae.encode(x, sparse=True)
        x_hat = sae.decode(acts)
        if getattr(sae, "W_skip", None) is not None:
            x_hat = x_hat + x @ sae.W_skip
        document = self.batch.document[keep]
        self.l0.append(self.sums.add_activations(target, x_hat, acts, document).cpu())
        return x_hat


def evaluate(
    sae: SAE,
    lm: LM,
    tokens: Tokens | torch.Tensor,
    site: str | None = None,
    layer: int | None = None,
    batch_rows: int | None = None,
) -> Report:
    """Sparsity and fidelity of an SAE, and what it costs the language model, on held-out tokens.

    A :class:`jumprelu.sae.Transcoder` reads at its site and is spliced in at mlp_out of the same
    layer; FVU is of that.

    tokens: rows of ids, [n_rows, context_size] (:func:`jumprelu.tokenize`, or a plain tensor: one
    document a row). site, layer: default is where the SAE was trained. batch_rows: rows a forward
    pass, by default :meth:`LM.rows_at_once`. The SAE may be on another device than the model.
    Returns a :class:`Report`.

    Raises ValueError if the SAE does not remember its place and none is given, if its width is not
    the site's, if ids are not of the model's vocabulary, if no token is left after the special
    ones, or if the activations do not vary. Source: Rajamanoharan et al. 2024 and Gemma Scope,
    their evaluations.
    """
    return evaluate_many([sae], lm, tokens, site, layer, batch_rows)[0]


@torch.no_grad()
def evaluate_many(
    saes: Sequence[SAE],
    lm: LM,
    tokens: Tokens | torch.Tensor,
    site: str | None = None,
    layer: int | None = None,
    batch_rows: int | None = None,
) -> list[Report]:
    """:func:`evaluate` of several SAEs, whatever their sites and widths. The model's own pass is
    computed once for all, and each spliced one from the SAE's place on."""
    tokens = as_tokens(tokens)
    read = [_place(sae, lm, tokens, site, layer) for sae in saes]
    places = [
        ("mlp_out", place[1]) if isinstance(sae, Transcoder) else place
        for sae, place in zip(saes, read, strict=True)
    ]
    splicer = Splicer(lm, tokens, places, batch_rows=batch_rows)
    saes = [on_device(sae, lm.device) for sae in saes]
    sums = [_Sums(splicer.n_documents, sae.d_in, sae.d_sae, lm.device) for sae in saes]
    l0_per_token: list[list[torch.Tensor]] = [[] for _ in saes]
    for batch, log_p in splicer:
        p, loss = log_p.exp(), batch.losses(log_p).double()
        owners = batch.counted_document
        ones = torch.ones_like(owners, dtype=torch.float64)
        for sae, source, place, own, l0 in zip(saes, read, places, sums, l0_per_token, strict=True):
            with watch(lm, *source) as seen:
                reconstruct = _Reconstruct(sae, seen, batch, own, l0)
                log_q = batch.spliced(*place, reconstruct)
            own.predicted.index_add_(0, owners, ones)
            own.loss.index_add_(0, owners, loss)
            own.spliced.index_add_(0, owners, batch.losses(log_q).double())
            own.kl.index_add_(0, owners, torch.linalg.vecdot(p, log_p - log_q).double())
    if saes and not sums[0].tokens.sum() > 0:
        raise ValueError("every token is a special one (BOS, EOS or pad): nothing to evaluate")
    if saes and not sums[0].predicted.sum() > 0:
        raise ValueError(
            "no two neighbouring tokens are both not special: there is no loss to "
            "compare; give longer rows"
        )
    return [own.report(torch.cat(l0)) for own, l0 in zip(sums, l0_per_token, strict=True)]


def _place(sae: SAE, lm: LM, tokens: Tokens, site: str | None, layer: int | None) -> Key:
    """Where an SAE belongs, checked against the model."""
    site, layer = place_of(sae, site, layer)
    lm.check_ids(tokens.ids)
    if isinstance(sae, Transcoder) and site not in INPUTS:
        raise ValueError(
            f"a transcoder reads {' or '.join(INPUTS)}, not {site}: give evaluate(..., site=...)"
        )
    width = capture(lm, [(site, layer)], tokens.ids[:1, :2].to(lm.device))[site, layer].shape[-1]
    if width != sae.d_in:
        raise ValueError(
            f"{site} of layer {layer} of {lm.name} has width {width}, the SAE expects "
            f"d_in = {sae.d_in}: "
            "wrong site, layer or model"
        )
    return site, layer
