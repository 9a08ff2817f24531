"""An SAE as another library writes it down, and how it becomes one of ours.

What libraries do differently (b_dec subtracted from the input, a scaled input, atoms of any norm, a
gate) is folded here, and exactly: the reconstruction of raw activations stays the same to rounding,
and activations differ by the factor of the fold.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import read_json
from ..sae import SAE, Origin

OURS = "jumprelu"
"""The key of our own notes in another library's configuration."""

HOOKS = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.attn.hook_z",
}
"""TransformerLens's names for our sites, which several libraries use."""

Tensors = dict[str, torch.Tensor]


class Parts(NamedTuple):
    """An SAE as other libraries write one down, float32; act is JumpReLU, or TopK where k is given:

    f = act((x/scale − b_in) W_enc + b_enc)        x̂ = scale · (f W_dec + b_dec)

    W_enc: [d_in, d_sae]; b_enc: [d_sae]; W_dec: [d_sae, d_in], of any norm; b_dec, b_in: [d_in].
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor | float = 0.0
    """[d_sae] or one number, of any sign: a ReLU comes on top"""
    b_in: torch.Tensor | None = None
    scale: float = 1.0
    k: int | None = None
    by_norm: bool = False
    """Whether θ, and the order that TopK goes by, are of f_i ‖d_i‖ instead of f_i."""
    origin: Origin = Origin()
    notes: tuple[str, ...] = ()


def fold(parts: Parts) -> tuple[SAE, tuple[str, ...]]:
    """Our form of `parts`, and what was done, a line each.

    W_enc' = n W_enc; b_enc' = s n (b_enc − b_in W_enc); θ' = s n max(θ, 0); W_dec' = W_dec / n;
    b_dec' = s b_dec, where s is the scale and n the norm of each atom. ReLU and JumpReLU are
    positively homogeneous, so that x̂ is the same and f' = s n f. TopK picks by size, which n would
    change: there n is 1, unless the library itself goes by f ‖d‖. So it is for an atom that is zero
    or has norm 1 to 1e-6 already.
    """
    b_enc, s, notes = parts.b_enc, parts.scale, list(parts.notes)
    norm = parts.W_dec.norm(dim=-1)
    if parts.k is None or parts.by_norm:
        n = norm.where((norm > 0) & ((norm - 1).abs() > 1e-6), 1)
    else:
        n = torch.ones_like(norm)
        if not torch.allclose(norm, n, atol=1e-5):
            notes.append("atoms keep their norms, because TopK goes by the size of activations")
    if (n != 1).any():
        norms = f"atoms of norm {n.min():.4g} to {n.max():.4g}"
        notes.append(f"{norms}: brought to 1, the norms moved into the encoder")
    if parts.b_in is not None:
        b_enc = b_enc - parts.b_in @ parts.W_enc
        notes.append("a bias subtracted from the input: moved into b_enc")
    if s != 1:
        notes.append(f"inputs divided by {s:.6g}: moved into b_enc, b_dec and threshold")
    threshold = parts.threshold * torch.ones_like(b_enc)
    if (threshold < 0).any():
        notes.append(f"{int((threshold < 0).sum())} negative thresholds: 0, where the ReLU cuts")
    threshold = s * threshold.clamp_min(0) * (1 if parts.by_norm else n)
    W_enc, W_dec, b_dec = n * parts.W_enc, parts.W_dec / n[:, None], s * parts.b_dec
    sae = SAE(W_enc, s * n * b_enc, W_dec, b_dec, threshold, k=parts.k, origin=parts.origin)
    return sae, tuple(notes)


def gate(
    W: torch.Tensor, r_mag: torch.Tensor, b_gate: torch.Tensor, b_mag: torch.Tensor
) -> dict[str, Any]:
    """Gated as JumpReLU: with π = e^r xW + b_mag, the gate xW + b_gate > 0 is π > b_mag − e^r
    b_gate, because e^r > 0."""
    gain = r_mag.exp()
    threshold = b_mag - gain * b_gate
    notes = ("the gate: made a threshold",)
    return {"W_enc": W * gain, "b_enc": b_mag, "threshold": threshold, "notes": notes}


def kind_of(sae: SAE) -> str:
    """What `sae` is at inference, from its arrays alone: "relu", "jumprelu", "topk" or "topk with
    thresholds"."""
    jumps = bool(sae.threshold.any())
    if sae.k is None:
        return "jumprelu" if jumps else "relu"
    return "topk with thresholds" if jumps else "topk"


def arrays(sae: SAE) -> Tensors:
    """The parameters in float32 on the CPU."""
    return {name: tensor.detach().float().cpu() for name, tensor in sae.named_parameters()}


def renamed(w: Tensors, names: dict[str, str]) -> Tensors:
    """Arrays by our names. names: ours → theirs, with ".T" behind it where theirs is transposed."""
    return {
        ours: w[name.removesuffix(".T")].T if name.endswith(".T") else w[name]
        for ours, name in names.items()
    }


def renamed_back(w: Tensors, names: dict[str, str]) -> Tensors:
    """:func:`renamed`, the other way."""
    return {
        name.removesuffix(".T"): w[ours].T.contiguous() if name.endswith(".T") else w[ours]
        for ours, name in names.items()
    }


def origin_of(kept: Any, model_name: Any, hook: Any, architecture: str) -> Origin:
    """What our own export kept, or else what another library says. hook: in TransformerLens's
    names, or None."""
    if isinstance(kept, dict):
        return Origin(**{name: kept[name] for name in Origin._fields if name in kept})
    for site, pattern in HOOKS.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), str(hook)):
            return Origin(model_name, site, int(match[1]), architecture)
    return Origin(model_name, hook, None, architecture)


# ---- files


def read_settings(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{path} holds a {kind}, expected an object with settings")
    return value


def read_safetensors(path: Path) -> Tensors:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): copy it again") from error


def read_pickled(path: Path) -> Tensors:
    """The state dictionary in a file of torch.save. Nothing in the file is run."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever broken bytes lead to: not all of it is UnpicklingError
        raise ValueError(
            f"{path} is refused: it is damaged, or a pickle of more than tensors, which could run "
            "code when opened. Copy it again, or save the SAE's state_dict() where it was made"
        ) from error
    if not isinstance(value, dict) or not all(map(torch.is_tensor, value.values())):
        raise ValueError(f"{path} holds no dictionary of tensors: save the state_dict() of the SAE")
    return {name: tensor.float() for name, tensor in value.items()}


def check_shape(where: Path, W_enc: torch.Tensor, d_in: int, d_sae: int) -> None:
    """Raise ValueError for weights of other sizes than the settings in `where` say."""
    if tuple(W_enc.shape) != (d_in, d_sae):
        raise ValueError(
            f"{where} says d_in = {d_in} and d_sae = {d_sae}, the weights beside it have "
            f"{tuple(W_enc.shape)}: copy both again"
        )
