"""SAEs as they are trained: one module for all architectures, in units of inputs with E‖x‖² = 1.

Notable here:
- the paper's initialisation: atoms He-uniform, then unit-norm; W_enc = W_decᵀ, untied; biases zero.
- the encoder sees x − b_dec while training; :meth:`Trainee.fold` removes that, and the input scale,
  at the end. A transcoder, whose output is not of x's kind, subtracts the mean input instead.
- a pass has a layout: all of [batch, d_sae], or only the entries that loss and gradients depend on,
  whichever is faster for the batch at hand (`support.py`, `distributed.py`).
"""

import dataclasses
import json
from typing import NamedTuple

import torch
from torch import Tensor

from . import losses, sparse
from .estimators import REACH, heaviside, jump_relu, step
from .recipe import TrainConfig
from .sae import SAE, Origin, Transcoder
from .sparse import POLICY, SparsePolicy
from .support import DENSE, Layout, Support


class Forward(NamedTuple):
    """One pass. pre, threshold, acts: entries of [batch, d_sae] in the layout (θ may be [d_sae]);
    x_hat: [batch, d_in]."""

    pre: Tensor
    threshold: Tensor
    acts: Tensor
    x_hat: Tensor
    layout: Layout


class Trainee(torch.nn.Module):
    """A sparse autoencoder in training: W_enc, b_enc (Gated's gate), W_dec, b_dec, and what its
    architecture has besides. transcoder: what it predicts is not its input."""

    def __init__(
        self,
        d_in: int,
        config: TrainConfig,
        generator: torch.Generator | None = None,
        transcoder: bool = False,
    ):
        super().__init__()
        self.config, self.transcoder = config, transcoder
        bound = (6 / d_in) ** 0.5  # He-uniform with fan-in d_in; the norm is set next
        atoms = torch.rand(config.d_sae, d_in, generator=generator) * 2 * bound - bound
        atoms /= atoms.norm(dim=-1, keepdim=True)
        self.W_dec = torch.nn.Parameter(atoms)
        self.W_enc = torch.nn.Parameter(atoms.clone().T)  # in memory latent by latent, as W_dec is
        self.b_enc = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        if config.architecture == "jumprelu":
            initial = torch.full((config.d_sae,), config.threshold_init)
            initial = initial.log() if config.log_threshold else initial
            self.threshold_parameter = torch.nn.Parameter(initial)
        if config.architecture == "gated":
            self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
            self.b_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        if config.architecture == "batchtopk":  # the threshold used after training: a running mean
            self.register_buffer("batch_threshold", torch.zeros(()))
        if transcoder:  # the mean input
            self.register_buffer("b_in", torch.zeros(d_in))

    @property
    def centre(self) -> Tensor:
        """What the encoder subtracts from its input, [d_in]."""
        return self.b_in if self.transcoder else self.b_dec

    @property
    def threshold(self) -> Tensor:
        """θ, shape [d_sae], float32; zeros where the architecture has none."""
        if self.config.architecture != "jumprelu":
            return torch.zeros_like(self.b_enc)
        parameter = self.threshold_parameter
        return parameter.exp() if self.config.log_threshold else parameter

    @torch.no_grad()
    def layout(self, x: Tensor, bandwidth: float, policy: SparsePolicy = POLICY) -> Layout:
        """The entries that a batch needs; all of them where that is faster."""
        c = self.config
        if not policy.usable(x) or policy.dense_above <= 0:
            return DENSE
        centred, low = x - self.centre, torch.zeros_like(self.b_enc)
        if c.architecture == "topk":
            if c.k > policy.dense_above * c.d_sae:
                return DENSE
            return sparse.largest(centred, self.W_enc, self.b_enc, c.k, c.topk_buckets, policy)
        if c.architecture == "jumprelu" or c.loss == "l0":
            reach = REACH[c.kernel] * bandwidth
            rounding = 1e-6 * (self.threshold + reach + self.b_enc.abs())
            # lowered a little: rounding must not drop an entry at the edge
            low = self.threshold - reach - rounding
        if c.architecture == "batchtopk":
            low += 0.8 * self.batch_threshold
        found = self._screen(centred, low, policy)
        if c.architecture == "batchtopk" and found is not None and len(found) < c.k * len(x):
            found = self._screen(centred, torch.zeros_like(low), policy)  # too few: look lower
        return DENSE if found is None else found

    def _screen(self, centred: Tensor, low: Tensor, policy: SparsePolicy) -> Support | None:
        wanted, arguments = self.config.encoder_dtype, (centred, self.W_enc, self.b_enc, low)
        dtype = sparse.fast_dtype(centred.device) if wanted is None else getattr(torch, wanted)
        if dtype == torch.bfloat16:
            few = policy.gpu_bf16_below if centred.is_cuda else policy.bf16_below
            found = sparse.screen(*arguments, dtype, min(few, policy.dense_above), policy)
            # on a GPU, a search in float32 would be no faster than a dense step
            if found is not None or centred.is_cuda:
                return found
        return sparse.screen(*arguments, torch.float32, policy.dense_above, policy)

    def forward(self, x: Tensor, bandwidth: float, layout: Layout | None = None) -> Forward:
        """x: [batch, d_in] in normalised units; bandwidth: ε; layout: None is :meth:`layout`'s."""
        c, layout = self.config, self.layout(x, bandwidth) if layout is None else layout
        pre = layout.encode(x, self.W_enc, self.b_enc, self.centre)
        threshold = layout.at(self.threshold)
        match c.architecture:
            case "relu":
                acts = pre.relu()
            case "jumprelu":
                acts = jump_relu(pre, threshold, bandwidth, c.kernel, c.ste_to_z)
            case "gated":
                magnitude = (pre - layout.at(self.b_enc)) * layout.at(self.r_mag.exp())
                magnitude = magnitude + layout.at(self.b_mag)
                acts = heaviside(pre, 0) * magnitude.relu()
            case "topk" if layout.dense:
                values, index = sparse.top(pre.relu(), c.k, c.topk_buckets)
                acts = torch.zeros_like(pre).scatter(-1, index, values)
            case "topk":
                acts = pre.relu()
            case "batchtopk":
                acts = pre.relu()
                kept, smallest = c.k * len(x), acts.new_zeros(())
                if acts.numel() >= kept:
                    smallest = acts.flatten().topk(kept, sorted=False).values.min()
                acts = acts * (acts >= smallest)
                if self.training:
                    with torch.no_grad():
                        rate = 1.0 if self.batch_threshold == 0 else 0.01
                        self.batch_threshold += rate * (smallest.detach() - self.batch_threshold)
        return Forward(pre, threshold, acts, layout.decode(acts, self.W_dec) + self.b_dec, layout)

    def loss(
        self,
        x: Tensor,
        out: Forward,
        sparsity: float,
        bandwidth: float,
        dead: Tensor,
        target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms whose sum is minimised, by name. sparsity: λ; dead: bool [d_sae], for AuxK; target:
        what a transcoder predicts, [batch, d_in], in its own normalised units; default is x."""
        c, layout, target = self.config, out.layout, x if target is None else target
        terms = {"reconstruction": losses.reconstruction(target, out.x_hat)}
        norms = self.W_dec.norm(dim=-1) if not c.unit_norm_atoms else torch.ones_like(self.b_enc)
        # a ReLU's threshold is fixed at 0, so only a pseudo-gradient to z can lower its L0
        ste_to_z = c.ste_to_z or c.architecture == "relu"
        jump = out.pre, out.threshold, bandwidth, c.kernel, ste_to_z
        penalty = None
        match c.loss:
            case "l1":
                # Gated pays for what opens its gate: so its magnitudes do not shrink
                paid = out.pre.relu() if c.architecture == "gated" else out.acts
                penalty = losses.l1(paid, norms, layout)
            case "l0":
                penalty = losses.l0(*jump, layout).mean()
            case "l0_target" | "l0_target_batch":
                per_sample = c.loss == "l0_target"
                penalty = losses.l0_target(losses.l0(*jump, layout), c.l0_target, per_sample)
            case "frequency":
                penalty = losses.frequency_penalty(step(*jump), c.frequency_reference, layout)
        if penalty is not None:
            terms["sparsity"] = sparsity * penalty
        if c.architecture in ("topk", "batchtopk") and c.aux_coefficient:
            index = dead.nonzero().squeeze(-1)
            pre = DENSE.encode(x, self.W_enc[:, index], self.b_enc[index], self.centre)
            aux = losses.auxk(target - out.x_hat, pre, self.W_dec[index], c.k_aux)
            terms["aux"] = c.aux_coefficient * aux
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
        self, out: Forward, terms: dict[str, Tensor], bandwidth: float
    ) -> dict[str, Tensor]:
        """What a JumpReLU's straight-through estimators saw on one batch, [d_sae] each.

        window_share: of pre-activations within the kernel's reach of θ, the samples that train it;
        threshold_travel: |log θ − log θ_init|; reconstruction_push, sparsity_push: gradients of θ
        from either loss. terms: of :meth:`loss`, before their backward pass.
        """
        gradients = [
            torch.autograd.grad(terms[name], self.threshold_parameter, retain_graph=True)[0]
            for name in ("reconstruction", "sparsity")
        ]
        with torch.no_grad():
            theta, reach = self.threshold, REACH[self.config.kernel] * bandwidth
            within = ((out.pre - out.threshold).abs() < reach).float()
            initial = torch.tensor(self.config.threshold_init).log()
            if self.config.log_threshold:  # ∂/∂θ from ∂/∂log θ
                gradients = [gradient * (1 / theta) for gradient in gradients]
            return {
                "window_share": out.layout.per_latent(within),
                "threshold_travel": (theta.clamp_min(1e-12).log() - initial).abs(),
                "reconstruction_push": gradients[0],
                "sparsity_push": gradients[1],
            }

    @torch.no_grad()
    def resample(
        self, x: Tensor, dead: Tensor, bandwidth: float, generator: torch.Generator
    ) -> Tensor:
        """Point dead latents at badly reconstructed inputs (Bricken et al. 2023); returns the
        indices replaced. x: [batch, d_in]; dead: bool [d_sae].

        An input is drawn with probability ∝ its squared loss; the atom becomes its direction from
        b_dec, the encoder a fifth as long as those alive, and all else starts anew.
        """
        index = dead.nonzero().squeeze(-1)
        weight = (x - self(x, bandwidth).x_hat).square().sum(-1).square()
        if len(index) == 0 or not weight.sum() > 0:
            return index[:0]
        drawn = torch.multinomial(weight.cpu(), len(index), True, generator=generator)
        centred = x[drawn.to(x.device)] - self.b_dec
        direction = centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        alive = self.W_enc[:, ~dead] if (~dead).any() else self.W_enc
        alive = alive.norm(dim=0).mean()
        self.W_dec[index] = direction
        self.W_enc[:, index] = (0.2 * alive * direction).T
        for name in ("b_enc", "r_mag", "b_mag"):
            if hasattr(self, name):
                getattr(self, name)[index] = 0
        if self.config.architecture == "jumprelu":
            initial = torch.tensor(self.config.threshold_init)
            initial = initial.log() if self.config.log_threshold else initial
            self.threshold_parameter[index] = initial
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

        With C = `input_scale`, W_enc stays; b_enc' = C·(b_enc − b_dec W_enc); b_dec' = C·b_dec;
        θ' = C·θ; atoms brought to norm 1 and their norm moved into the encoder (ReLU and JumpReLU
        are positively homogeneous). A transcoder's output is C_y = `target_scale` times what it was
        trained for: f' = C_y·f, so W_enc' = (C_y/C)·W_enc, and C_y is C elsewhere.
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
        if c.architecture == "topk":
            # moving norms into the encoder would change which latents are the largest
            norm = torch.ones_like(norm)
        # as it will be read back: lists for tuples
        training = json.loads(json.dumps(dataclasses.asdict(c)))
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
