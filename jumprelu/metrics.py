"""How good is an SAE: sparsity, fidelity, and what splicing it in does to the language model.

Notable here:
- every metric is a ratio of sums over tokens (micro-averaged), with a standard error clustered by
  document: tokens of one document are far from independent.
- FVU is Σ‖x − x̂‖² / Σ‖x − x̄‖² over all tokens, x̄ their mean: not a mean of ratios of tokens, and
  not relative to Σ‖x‖².
- what is replaced and what is counted: see splicing.py.
"""

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
    """Share of latents that never fire on these tokens (larger on fewer tokens)."""
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
        lines = [
            f"{name:>10}  {value}"
            for name, value in self._asdict().items()
            if isinstance(value, Estimate)
        ]
        return "\n".join(lines + [f"{self.n_tokens} tokens of {self.n_documents} documents"])


class _Evaluation:
    """An SAE at its place, and what its report needs: sums per document, never activations."""

    def __init__(self, sae: SAE, lm: LM, source: Key, place: Key, documents: int):
        self.sae, self.lm, self.source, self.place = sae, lm, source, place
        """source: where the SAE reads; place: where it is spliced in."""
        self.documents = documents
        self.sums: dict[str, torch.Tensor] = {}
        self.l0: list[torch.Tensor] = []
        self.fired = torch.zeros(GROUPS, sae.d_sae, dtype=torch.float64, device=lm.device)
        self.group_tokens = torch.zeros_like(self.fired[:, 0])

    def add(self, batch: Batch, p: torch.Tensor, log_p: torch.Tensor) -> None:
        """Splice the SAE in and compare with the model's own probabilities, p = exp(log_p)."""
        with watch(self.lm, *self.source) as seen:
            log_q = batch.spliced(*self.place, lambda value: self._reconstruct(batch, seen, value))
        self._add_sums(
            batch.counted_document,
            predicted=torch.ones_like(batch.target),
            loss=batch.losses(log_p),
            spliced=batch.losses(log_q),
            kl=torch.linalg.vecdot(p, log_p - log_q),
        )

    def _reconstruct(
        self, batch: Batch, seen: list[torch.Tensor], value: torch.Tensor
    ) -> torch.Tensor:
        """What takes the place of `value`, entered in the sums on the way. seen: what the SAE
        reads, [rows, positions, d_in], when the pass comes to the splice."""
        sae, document = self.sae, batch.document[batch.keep]
        source, target = seen[0][batch.keep].to(sae.dtype), value.to(sae.dtype)
        acts = sae.encode(source, sparse=True)
        reconstruction = sae.decode(acts)
        if getattr(sae, "W_skip", None) is not None:
            reconstruction = reconstruction + source @ sae.W_skip
        token, latent = acts.indices()
        l0 = torch.bincount(token, minlength=len(target))
        self.l0.append(l0.cpu())
        x, x_hat = target.double(), reconstruction.double()
        self._add_sums(
            document,
            tokens=torch.ones_like(document),
            active=l0,
            error=(x - x_hat).square().sum(-1),
            square=x.square().sum(-1),
            hat_square=x_hat.square().sum(-1),
            cross=(x * x_hat).sum(-1),
            x=x,
            x_hat=x_hat,
        )
        group = document % GROUPS
        fired = torch.bincount(group[token] * sae.d_sae + latent, minlength=GROUPS * sae.d_sae)
        self.fired += fired.view(GROUPS, sae.d_sae)
        self.group_tokens += torch.bincount(group, minlength=GROUPS)
        return reconstruction

    def _add_sums(self, document: torch.Tensor, **values: torch.Tensor) -> None:
        """values: of each token, [tokens] or [tokens, d_in]; document: of each, [tokens]."""
        for name, value in values.items():
            value = value.double()
            if name not in self.sums:
                self.sums[name] = value.new_zeros(self.documents, *value.shape[1:])
            self.sums[name].index_add_(0, document, value)

    def report(self) -> Report:
        """Raises ValueError if nothing was evaluated, or the activations do not vary."""
        tokens = self.sums["tokens"]
        used = tokens > 0
        if not used.any():
            raise ValueError("every token is a special one (BOS, EOS or pad): nothing to evaluate")
        if not self.sums["predicted"].sum() > 0:
            raise ValueError(
                "no two neighbouring tokens are both not special: there is no loss to compare; "
                "give longer rows"
            )
        mean = self.sums["x"].sum(0) / tokens.sum()
        mean_hat = self.sums["x_hat"].sum(0) / tokens.sum()
        of = {name: value[used] for name, value in self.sums.items()}
        n, x, x_hat = of["tokens"], of["x"], of["x_hat"]
        # Σ(x − x̄)·(x̂ − x̄̂) and its like, from sums alone
        variance = of["square"] - 2 * x @ mean + n * mean.square().sum()
        hat_variance = of["hat_square"] - 2 * x_hat @ mean_hat + n * mean_hat.square().sum()
        covariance = of["cross"] - x @ mean_hat - x_hat @ mean + n * (mean @ mean_hat)
        if not variance.sum() > 0:
            raise ValueError("the activations do not vary, so FVU is not defined: give more tokens")
        return Report(
            l0=ratio_estimate(of["active"], n),
            fvu=ratio_estimate(of["error"], variance),
            delta_loss=ratio_estimate(of["spliced"] - of["loss"], of["predicted"]),
            kl=ratio_estimate(of["kl"], of["predicted"]),
            loss=ratio_estimate(of["loss"], of["predicted"]),
            dead=share_estimate(self.fired, self.group_tokens, -1.0, 0.0),
            dense_1=share_estimate(self.fired, self.group_tokens, 0.01),
            dense_10=share_estimate(self.fired, self.group_tokens, 0.1),
            norm_ratio=ratio_estimate(covariance, hat_variance),
            frequency=(self.fired.sum(0) / self.group_tokens.sum()).float().cpu(),
            l0_per_token=torch.cat(self.l0),
            n_tokens=int(n.sum()),
            n_documents=int(used.sum()),
        )


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
    sources = [_source(sae, lm, tokens, site, layer) for sae in saes]
    places = [
        ("mlp_out", source[1]) if isinstance(sae, Transcoder) else source
        for sae, source in zip(saes, sources, strict=True)
    ]
    splicer = Splicer(lm, tokens, places, batch_rows=batch_rows)
    evaluations = [
        _Evaluation(on_device(sae, lm.device), lm, source, place, splicer.n_documents)
        for sae, source, place in zip(saes, sources, places, strict=True)
    ]
    for batch, log_p in splicer:
        p = log_p.exp()
        for one in evaluations:
            one.add(batch, p, log_p)
    return [one.report() for one in evaluations]


def _source(sae: SAE, lm: LM, tokens: Tokens, site: str | None, layer: int | None) -> Key:
    """Where an SAE reads, checked against the model."""
    site, layer = place_of(sae, site, layer)
    if isinstance(sae, Transcoder) and site not in INPUTS:
        raise ValueError(
            f"a transcoder reads {' or '.join(INPUTS)}, not {site}: give evaluate(..., site=...)"
        )
    width = capture(lm, [(site, layer)], tokens.ids[:1, :2])[site, layer].shape[-1]
    if width != sae.d_in:
        raise ValueError(
            f"{site} of layer {layer} of {lm.name} has width {width}, the SAE expects "
            f"d_in = {sae.d_in}: wrong site, layer or model"
        )
    return site, layer
