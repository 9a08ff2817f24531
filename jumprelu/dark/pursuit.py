"""Gradient pursuit: a sparse code for the decoder that an SAE already has, sought at inference
without its encoder.

With signal s = x − b_dec, atoms D (the rows of W_dec) and w = 0 at first, each step is

    r = s − wD        q = rDᵀ        S = {w ≠ 0} ∪ {argmax q}        g = q on S, else 0
    c = gD            η = ⟨c, r⟩/⟨c, c⟩        w ← max(w + ηg, 0)

A token that is given as many steps as its L0 gets a code of no more latents: what its error falls
by was the encoder's. Source: Engels et al. 2024 (arXiv 2410.14670); the steps are those of
Blumensath & Davies 2008, clipped at 0.

- η is the best step before clipping: where nothing is clipped, ‖r‖² falls by ⟨c, r⟩²/⟨c, c⟩. Where
  something is, ‖r‖ may rise. The last code counts, not the best on the way.
- each token keeps its latents and weights, and gD and wD are embedding bags: no [batch, d_sae] of
  weights. r is computed from w anew at each step: no rounding is carried along.
- the step number is the slot that a latent is kept in: there is always one free. It stays empty if
  the latent is in S already. A latent that is clipped to 0 leaves S and its slot, for good; if it
  is found again, it enters as a new one.
"""

import torch
from torch.nn.functional import embedding_bag

from ..sae import SAE


@torch.no_grad()
def pursue(
    sae: SAE, x: torch.Tensor, steps: torch.Tensor | int | None = None, batch: int = 512
) -> torch.Tensor:
    """w > 0 as a sparse COO tensor, [tokens, d_sae], coalesced, without a gradient, that
    `sae.decode` takes; in raw units.

    x: raw activations, [tokens, d_in]. steps: of each token, integers [tokens], or one for all;
    None: the token's own L0 under the SAE. A token has at most as many latents as steps. batch:
    tokens at a time, of like numbers of steps; memory is [batch, d_sae + d_in + most steps].
    Computed in float32, or in the SAE's type if that is wider. A token that is not finite gets a
    code of NaN.

    Raises ValueError for x of another shape or width, and for steps that are not integers ≥ 0, one
    for each token.
    """
    if x.ndim != 2 or x.shape[1] != sae.d_in:
        raise ValueError(
            f"x must be [tokens, d_in] with this SAE's d_in = {sae.d_in}, got {list(x.shape)}: "
            "x.flatten(0, -2) if it is in sequences"
        )
    if steps is None:
        counts = []
        for part in x.split(batch):
            token = sae.encode(part, sparse=True).indices()[0]
            counts.append(token.bincount(minlength=len(part)))
        steps = torch.cat(counts)
    elif not isinstance(steps, torch.Tensor):
        steps = torch.full((len(x),), steps)
    if steps.dtype.is_floating_point or steps.dtype == torch.bool or (steps < 0).any():
        some = steps.flatten()[:3].tolist()
        raise ValueError(f"steps must be integers of at least 0, got {steps.dtype} such as {some}")
    if steps.shape != x.shape[:1]:
        shape = list(steps.shape)
        raise ValueError(f"steps must be one for each of the {len(x)} tokens, got shape {shape}")

    dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
    atoms = sae.W_dec.to(dtype)
    steps, order = steps.to(x.device, torch.int64).sort(descending=True)
    indices = [torch.empty(2, 0, dtype=torch.int64, device=x.device)]
    values = [torch.empty(0, dtype=dtype, device=x.device)]
    for tokens, theirs in zip(order.split(batch), steps.split(batch), strict=True):
        latent, weight = _pursue(x[tokens].to(dtype) - sae.b_dec, atoms, theirs)
        row, slot = weight.nonzero(as_tuple=True)
        indices.append(torch.stack([tokens[row], latent[row, slot]]))
        values.append(weight[row, slot])
    code = torch.sparse_coo_tensor(
        torch.cat(indices, 1), torch.cat(values), (len(x), sae.d_sae), check_invariants=False
    )
    return code.coalesce()


def _pursue(
    signal: torch.Tensor, atoms: torch.Tensor, steps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent, weight) of each slot, [n, most steps] each; an empty slot weighs 0.

    signal: [n, d_in]; atoms: [d_sae, d_in]; steps: int64 [n], descending, so that those who still
    step come first.
    """
    most = int(steps.max()) if len(steps) else 0
    latents = torch.zeros(len(signal), most, dtype=torch.int64, device=signal.device)
    weights = signal.new_zeros(len(signal), most)
    residual = signal
    for step in range(most):
        n = int((steps > step).sum())
        signal, residual = signal[:n], residual[:n]
        latent, weight = latents[:n, : step + 1], weights[:n, : step + 1]
        q = residual @ atoms.T
        best = q.max(-1).indices  # argmax is the slower one
        support = weight != 0
        support[:, step] = ~(support & (latent == best[:, None])).any(-1)
        latent[:, step] = best
        gradient = q.gather(-1, latent).where(support, 0)
        change = embedding_bag(latent, atoms, mode="sum", per_sample_weights=gradient)
        squared = change.square().sum(-1, keepdim=True)
        size = ((change * residual).sum(-1, keepdim=True) / squared).where(squared != 0, 0)
        weight.addcmul_(size, gradient).clamp_(min=0)
        residual = signal - embedding_bag(latent, atoms, mode="sum", per_sample_weights=weight)
    return latents, weights
