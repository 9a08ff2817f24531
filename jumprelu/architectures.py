"""SAEs as they are trained: one module for all architectures, in the units of inputs with E‖x‖² =
1.

Notable here:
- one naming for all: W_enc, b_enc, W_dec, b_dec, threshold; Gated adds r_mag and b_mag, its gate is
  (W_enc, b_enc).
- initialisation of the paper: atoms He-uniform, then unit-norm; W_enc = W_decᵀ, then untied; biases
  zero.
- the encoder sees x − b_dec while training; :meth:`Trainee.fold` removes that, and the input scale,
  at the end. A transcoder, whose output is not of x's kind, subtracts the mean input instead.
- :meth:`Trainee.loss` returns every term by name, so a log can show what the sum hides.
- a pass has a layout: all of [batch, d_sae], or only the entries that loss and gradients depend on,
  whichever is faster for the batch at hand. Values and gradients are the same to rounding
  (`sparse.py`).
- where a bandwidth is taken it may be one for all latents or, from :meth:`Trainee.bandwidths`, one
  for each.
"""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import torch

from . import losses, sparse
from .distributed import ALONE, Sharded, Team
from .estimators import REACH, heaviside, jump_relu, kernel, step
from .losses import DENSE, Layout
from .recipe import TrainConfig
from .sae import SAE, Origin, Transcoder

WIDEST = 4.0
"""A latent's bandwidth is at most this many times ε, and at least ε over this many."""

DENSITY_RATE = 0.02
"""Weight of one step in the running mean of a latent's density at its threshold."""


class Forward(NamedTuple):
    """One pass. pre, threshold, acts: entries of [batch, d_sae] in the layout (θ may be [d_sae]);
    x_hat: [batch, d_in]."""

    pre: torch.Tensor
    threshold: torch.Tensor
    acts: torch.Tensor
    x_hat: torch.Tensor
    layout: Layout | Sharded


class StepDiagnostics(NamedTuple):
    """What the straight-through estimators saw on one batch (means over latents where it says
    share)."""

    window_share: float
    """Share of pre-activations within the kernel's reach of their threshold: the samples that train
    θ."""
    threshold_travel: float
    """Mean |log θ − log θ_init|."""
    reconstruction_push: float
    """Mean |gradient| of θ from reconstruction."""
    sparsity_push: float
    """Mean |gradient| of θ from the sparsity loss at its present λ."""
    window_latents: float
    """Share of latents with at least one sample in the window: the others get no gradient for θ at
    all."""


class Trainee(torch.nn.Module):
    """A sparse autoencoder in training. d_in: width of the activations; config: see
    :class:`TrainConfig`.

    transcoder: what it predicts is not its input. team: the processes among which tokens and
    latents are dealt out.
    """

    def __init__(
        self,
        d_in: int,
        config: TrainConfig,
        generator: torch.Generator | None = None,
        transcoder: bool = False,
        team: Team = ALONE,
    ):
        super().__init__()
        self.config, self.transcoder, self.team = config, transcoder, team
        bound = (6 / d_in) ** 0.5  # He-uniform with fan-in d_in; the norm is set next
        atoms = torch.rand(config.d_sae, d_in, generator=generator) * 2 * bound - bound
        atoms /= atoms.norm(dim=-1, keepdim=True)
        self.W_dec = torch.nn.Parameter(atoms)
        self.W_enc = torch.nn.Parameter(atoms.clone().T)  # in memory latent by latent, as W_dec is
        self.b_enc = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        if config.architecture == "jumprelu":
            initial = torch.full((config.d_sae,), config.threshold_init)
            self.threshold_parameter = torch.nn.Parameter(
                initial.log() if config.log_threshold else initial
            )
        if config.architecture == "gated":
            self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
            self.b_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        if config.architecture == "batchtopk":  # the threshold used after training: a running mean
            self.register_buffer("batch_threshold", torch.zeros(()))
        if (
            config.bandwidth_by_density
        ):  # of pre-activations at their threshold: a running mean, zeros before the first step
            self.register_buffer("density", torch.zeros(config.d_sae))
        if transcoder:  # the mean input
            self.register_buffer("b_in", torch.zeros(d_in))
        team.shard(self)

    @property
    def centre(self) -> torch.Tensor:
        """What the encoder subtracts from its input, [d_in]."""
        return self.b_in if self.transcoder else self.b_dec

    @property
    def threshold(self) -> torch.Tensor:
        """θ, shape [d_sae], float32; zeros where the architecture has none."""
        if self.config.architecture != "jumprelu":
            return torch.zeros_like(self.b_enc)
        return (
            self.threshold_parameter.exp()
            if self.config.log_threshold
            else self.threshold_parameter
        )

    @torch.no_grad()
    def bandwidths(self, bandwidth: float) -> float | torch.Tensor:
        """ε_i, [d_sae], of a step whose ε is `bandwidth`: see `TrainConfig.bandwidth_by_density`.

        `bandwidth` itself where that exponent is 0 or no density is known yet. A latent whose
        density is 0 gets the widest.
        """
        if not self.config.bandwidth_by_density or not self.density.any():
            return bandwidth
        relative = self.density / self.density[self.density > 0].median()
        return bandwidth * relative.pow(-self.config.bandwidth_by_density).clamp(1 / WIDEST, WIDEST)

    @torch.no_grad()
    def update_density(self, out: Forward, bandwidth: float | torch.Tensor) -> None:
        """Take one pass into each latent's running density at its threshold, if the configuration
        asks for it.

        The estimate is the one that the estimators work with, the batch mean of K((π − θ)/ε_i)/ε_i;
        for the rectangle it is the share of samples in the window over its width. bandwidth: that
        of the pass. The first pass counts in full.
        """
        if not self.config.bandwidth_by_density:
            return
        width = _at_entries(out.layout, bandwidth)
        found = out.layout.per_latent(
            kernel((out.pre - out.threshold) / width, self.config.kernel) / width
        )
        self.density += torch.where(self.density.any(), DENSITY_RATE, 1.0) * (found - self.density)

    @torch.no_grad()
    def layout(self, x: torch.Tensor, bandwidth: float | torch.Tensor) -> Layout:
        """The entries that a batch needs; all of them where that is faster: for a batch that is
        dense, or without kernels."""
        c = self.config
        if (
            not sparse.usable(x) or c.preactivation or sparse.DENSE_ABOVE <= 0
        ):  # that loss touches every latent
            return DENSE
        centred, low = x - self.centre, torch.zeros_like(self.b_enc)
        if c.architecture == "topk":
            few = c.k <= sparse.DENSE_ABOVE * c.d_sae
            return (
                sparse.largest(centred, self.W_enc, self.b_enc, c.k, c.topk_buckets)
                if few
                else DENSE
            )
        if c.architecture == "jumprelu" or c.loss == "l0":
            reach = REACH[c.kernel] * bandwidth
            low = (
                self.threshold - reach - 1e-6 * (self.threshold + reach + self.b_enc.abs())
            )  # rounding must not lose the border
        if c.architecture == "batchtopk":
            low += 0.8 * self.batch_threshold
        found = self._screened(centred, low)
        if (
            c.architecture == "batchtopk" and found is not None and len(found) < c.k * len(x)
        ):  # fewer than k a token: look lower
            found = self._screened(centred, torch.zeros_like(low))
        return DENSE if found is None else found

    def _screened(self, centred: torch.Tensor, low: torch.Tensor) -> sparse.Support | None:
        wanted, found = self.config.encoder_dtype, None
        dtype = sparse.fast_dtype(centred.device) if wanted is None else getattr(torch, wanted)
        if dtype == torch.bfloat16:
            few = min(
                sparse.GPU_DENSE_ABOVE if centred.is_cuda else sparse.BF16_BELOW, sparse.DENSE_ABOVE
            )
            found = sparse.screen(centred, self.W_enc, self.b_enc, low, torch.bfloat16, few)
        if found is None and not (
            dtype == torch.bfloat16 and centred.is_cuda
        ):  # which would search no faster than it is dense
            found = sparse.screen(
                centred, self.W_enc, self.b_enc, low, torch.float32, sparse.DENSE_ABOVE
            )
        return found

    def forward(
        self, x: torch.Tensor, bandwidth: float | torch.Tensor, layout: Layout | None = None
    ) -> Forward:
        """x: [batch, d_in] in normalised units; bandwidth: ε at this step, a number or [d_sae];
        layout: default is that of :meth:`layout`."""
        c, layout = self.config, self.layout(x, bandwidth) if layout is None else layout
        dense, layout = layout is DENSE, self.team.layout(layout)
        pre, threshold = (
            layout.encode(x, self.W_enc, self.b_enc, self.centre),
            layout.at(self.threshold),
        )
        match c.architecture:
            case "relu":
                acts = pre.relu()
            case "jumprelu":
                acts = jump_relu(
                    pre, threshold, _at_entries(layout, bandwidth), c.kernel, c.ste_to_z
                )
            case "gated":
                magnitude = (pre - layout.at(self.b_enc)) * layout.at(self.r_mag.exp()) + layout.at(
                    self.b_mag
                )
                acts = heaviside(pre, 0) * magnitude.relu()
            case "topk" if dense:
                values, index = sparse.top(pre.relu(), c.k, c.topk_buckets)
                acts = torch.zeros_like(pre).scatter(-1, index, values)
            case "topk":
                acts = pre.relu()
            case "batchtopk":
                positive = pre.relu()
                kept, smallest = c.k * len(x), positive.new_zeros(())
                if positive.numel() >= kept:
                    smallest = positive.flatten().topk(kept, sorted=False).values.min()
                acts = positive * (positive >= smallest)
                if self.training:
                    with torch.no_grad():
                        rate = 1.0 if self.batch_threshold == 0 else 0.01
                        self.batch_threshold += rate * (smallest.detach() - self.batch_threshold)
        return Forward(pre, threshold, acts, layout.decode(acts, self.W_dec) + self.b_dec, layout)

    def loss(
        self,
        x: torch.Tensor,
        out: Forward,
        sparsity: float,
        bandwidth: float | torch.Tensor,
        dead: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Terms whose sum is minimised. sparsity: λ at this step; bandwidth: as given to
        :meth:`forward`; dead: bool [d_sae], for AuxK; target: what a transcoder predicts, [batch,
        d_in] in its own normalised units; default is x."""
        c, layout, target = self.config, out.layout, x if target is None else target
        bandwidth = _at_entries(layout, bandwidth)
        terms = {"reconstruction": losses.reconstruction(target, out.x_hat)}
        norms = self.W_dec.norm(dim=-1) if not c.unit_norm_atoms else torch.ones_like(self.b_enc)
        match c.loss:
            case "l1":
                # Gated pays for what opens its gate, not for magnitudes: that is how it avoids
                # shrinkage
                terms["sparsity"] = sparsity * losses.l1(
                    out.pre.relu() if c.architecture == "gated" else out.acts, norms, layout
                )
            case "l0":
                # a ReLU's threshold is fixed at 0, so only a pseudo-gradient to z can lower its L0
                ste_to_z = c.ste_to_z or c.architecture == "relu"
                terms["sparsity"] = (
                    sparsity
                    * losses.l0(
                        out.pre, out.threshold, bandwidth, c.kernel, ste_to_z, layout
                    ).mean()
                )
            case "l0_target" | "l0_target_batch" | "l0_quadratic":
                l0 = losses.l0(out.pre, out.threshold, bandwidth, c.kernel, c.ste_to_z, layout)
                penalty = (
                    losses.l0_quadratic(l0, c.l0_target)
                    if c.loss == "l0_quadratic"
                    else losses.l0_target(l0, c.l0_target, per_sample=c.loss == "l0_target")
                )
                terms["sparsity"] = sparsity * penalty
            case "frequency":
                active = step(out.pre, out.threshold, bandwidth, c.kernel, c.ste_to_z)
                terms["sparsity"] = sparsity * losses.frequency_penalty(
                    active, c.frequency_reference, layout
                )
            case "tanh":
                terms["sparsity"] = sparsity * losses.tanh_penalty(
                    out.acts, norms, c.tanh_scale, layout
                )
        if c.preactivation:
            terms["preactivation"] = c.preactivation * losses.preactivation(
                out.pre, out.threshold, norms
            )
        if c.architecture in ("topk", "batchtopk") and c.aux_coefficient:
            index = dead.nonzero().squeeze(-1)
            pre = DENSE.encode(x, self.W_enc[:, index], self.b_enc[index], self.centre)
            terms["aux"] = c.aux_coefficient * losses.auxk(
                target - out.x_hat, pre, self.W_dec[index], c.k_aux
            )
        if c.architecture == "gated":
            frozen = layout.decode(out.pre.relu(), self.W_dec.detach()) + self.b_dec.detach()
            terms["aux"] = losses.reconstruction(target, frozen)
        return terms

    @torch.no_grad()
    def constrain(self) -> None:
        """After an optimiser step: a raw threshold back to θ ≥ 0."""
        if self.config.architecture == "jumprelu" and not self.config.log_threshold:
            self.threshold_parameter.clamp_(min=0)

    def diagnose(
        self, out: Forward, terms: dict[str, torch.Tensor], bandwidth: float | torch.Tensor
    ) -> StepDiagnostics:
        """See :class:`StepDiagnostics`; `terms` as :meth:`loss` returned them, before their
        backward pass; bandwidth: as given to :meth:`forward`."""
        with torch.no_grad():
            theta = self.threshold
            reach = REACH[self.config.kernel] * _at_entries(out.layout, bandwidth)
            reached = ((out.pre - out.threshold).abs() < reach).float()
            reached = out.layout.per_latent(reached)  # share of the batch, [d_sae]
            travel = (
                (theta.clamp_min(1e-12).log() - torch.tensor(self.config.threshold_init).log())
                .abs()
                .mean()
            )
            to_theta = (
                1 / theta if self.config.log_threshold else torch.ones_like(theta)
            )  # ∂/∂θ from ∂/∂log θ
        push = {"reconstruction": 0.0, "sparsity": 0.0}
        for name in (name for name in push if name in terms):
            (gradient,) = torch.autograd.grad(
                terms[name], self.threshold_parameter, retain_graph=True
            )
            push[name] = (self.team.mean(gradient) * to_theta).abs().mean().item()
        found = torch.tensor(
            [
                reached.mean().item(),
                travel.item(),
                push["reconstruction"],
                push["sparsity"],
                (reached > 0).float().mean().item(),
            ],
            device=theta.device,
        )
        return StepDiagnostics(*(self.team.sum_latents(found) / self.team.latents).tolist())

    @torch.no_grad()
    def resample(
        self,
        x: torch.Tensor,
        dead: torch.Tensor,
        bandwidth: float | torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Point dead latents at badly reconstructed inputs (Bricken et al. 2023); returns the
        indices replaced.

        x: [batch, d_in]; dead: bool [d_sae]. An input is drawn with probability ∝ its squared loss;
        the atom becomes its direction from b_dec, the encoder a fifth as long as those alive, and
        everything else of the latent starts anew.
        """
        index = dead.nonzero().squeeze(-1)
        weight = (x - self(x, bandwidth).x_hat).square().sum(-1).square()
        if len(index) == 0 or not weight.sum() > 0:
            return index[:0]
        drawn = torch.multinomial(
            weight.cpu(), len(index), replacement=True, generator=generator
        ).to(x.device)
        centred = x[drawn] - self.b_dec
        direction = centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        alive = (
            self.W_enc[:, ~dead].norm(dim=0).mean()
            if (~dead).any()
            else self.W_enc.norm(dim=0).mean()
        )
        self.W_dec[index] = direction
        self.W_enc[:, index] = (0.2 * alive * direction).T
        for name in ("b_enc", "r_mag", "b_mag"):
            if hasattr(self, name):
                getattr(self, name)[index] = 0
        if self.config.architecture == "jumprelu":
            initial = torch.tensor(self.config.threshold_init)
            self.threshold_parameter[index] = (
                initial.log() if self.config.log_threshold else initial
            )
        if (
            self.config.bandwidth_by_density and self.density.any()
        ):  # nothing is known of the new ones: they begin with ε
            self.density[index] = self.density[self.density > 0].median()
        return index

    @torch.no_grad()
    def fold(
        self,
        input_scale: float,
        model_name: str | None = None,
        site: str | None = None,
        layer: int | None = None,
        target_scale: float | None = None,
    ) -> SAE:
        """The inference form, for raw activations x_raw = input_scale · x.

        W_enc stays; b_enc' = C·(b_enc − b_dec W_enc); b_dec' = C·b_dec; θ' = C·θ; atoms brought to
        norm 1 and their norm moved into the encoder (ReLU and JumpReLU are positively homogeneous).
        TopK keeps the exact k largest, also where `topk_buckets` made training approximate. A
        transcoder's output is C_y times what it was trained for, C_y = `target_scale`: f' = C_y·f,
        so W_enc' = (C_y/C)·W_enc, and C_y takes the place of C elsewhere.
        """
        c, C = self.config, float(input_scale if target_scale is None else target_scale)
        W_enc, b_enc, threshold = self.W_enc.clone(), self.b_enc.clone(), self.threshold.clone()
        offset = -(self.centre @ W_enc)
        if c.architecture == "gated":  # π_gate > 0  ⇔  π_mag > b_mag − e^r b_gate
            gain = self.r_mag.exp()
            threshold = (self.b_mag - gain * b_enc).clamp_min(0)
            W_enc, offset, b_enc = W_enc * gain, offset * gain, self.b_mag.clone()
        if c.architecture == "batchtopk":
            threshold = self.batch_threshold.expand_as(b_enc).clone()
        norm = self.W_dec.norm(dim=-1).clamp_min(1e-12)
        if (
            c.architecture == "topk"
        ):  # moving norms into the encoder would change which latents are the largest
            norm = torch.ones_like(norm)
        training = json.loads(
            json.dumps(dataclasses.asdict(c))
        )  # as it will be read back: lists for tuples
        origin = Origin(model_name, site, layer, c.architecture, C, training)
        kind, W_enc = (Transcoder, W_enc * (C / input_scale)) if self.transcoder else (SAE, W_enc)
        return kind(
            W_enc * norm,
            C * norm * (b_enc + offset),
            self.W_dec / norm[:, None],
            C * self.b_dec,
            C * norm * threshold,
            k=c.k if c.architecture == "topk" else None,
            origin=origin,
        )


def _at_entries(layout: Layout, bandwidth: float | torch.Tensor) -> float | torch.Tensor:
    return layout.at(bandwidth) if isinstance(bandwidth, torch.Tensor) else bandwidth
