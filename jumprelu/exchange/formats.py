"""SAEs in the files of other libraries: read into our form, and written so that those libraries
load them.

    saelens              cfg.json + sae_weights.safetensors               SAELens 6 and later
    dictionary_learning  config.json + ae.pt                              dictionary_learning
    sparsify             cfg.json + sae.safetensors                       sparsify of EleutherAI: TopK
    llama_scope          hyperparams.json + checkpoints/final.safetensors Llama Scope (He et al. 2024); read only
    llamascopium         config.json + sae_weights.safetensors            its successor library; read only
    gemma_scope          params.npz or params.safetensors                 Gemma Scope (Lieberum et al. 2024), through `scope.py`
    jumprelu             cfg.json + sae.safetensors                       :meth:`jumprelu.SAE.save`

Notable here:
- a reader only says which array is which, as :class:`Parts`. What libraries do differently (b_dec
  subtracted from the input, a scaled input, atoms of any norm, a gate) is folded in one place,
  :func:`fold`, and exactly: the reconstruction of raw activations stays the same to rounding, and
  activations differ by the factor of the fold.
- what cannot be folded, such as a norm taken of each input, is refused with the reason.
- `ae.pt` is a pickle. It is opened with `weights_only=True`, which builds tensors and nothing else;
  other pickles are refused.
- a file that we wrote carries the SAE's :class:`jumprelu.sae.Origin` under the key "jumprelu",
  where other libraries ignore it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import read_json, write_json, write_tensors, writing
from ..sae import SAE, Origin, Transcoder, check_autoencoder

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
    """

    W_enc: torch.Tensor
    """[d_in, d_sae]"""
    b_enc: torch.Tensor
    """[d_sae]"""
    W_dec: torch.Tensor
    """[d_sae, d_in], rows of any norm"""
    b_dec: torch.Tensor
    """[d_in]"""
    threshold: torch.Tensor | float = 0.0
    """[d_sae] or one number, of any sign: a ReLU comes on top"""
    b_in: torch.Tensor | None = None
    """[d_in]"""
    scale: float = 1.0
    k: int | None = None
    by_norm: bool = False
    """Whether θ, and the order that TopK goes by, are of f_i ‖d_i‖ instead of f_i."""
    origin: Origin = Origin()
    notes: tuple[str, ...] = ()


class Reading(NamedTuple):
    """A file that was read. notes: what was folded, a line each."""

    sae: SAE
    format: str
    notes: tuple[str, ...]


def fold(parts: Parts) -> tuple[SAE, tuple[str, ...]]:
    """Our form of `parts`, and what was done, a line each.

    W_enc' = n W_enc; b_enc' = s n (b_enc − b_in W_enc); θ' = s n max(θ, 0); W_dec' = W_dec / n;
    b_dec' = s b_dec, where s is the scale and n the norm of each atom. ReLU and JumpReLU are
    positively homogeneous, so that x̂ is the same and f' = s n f. TopK picks by size, which n would
    change: there n is 1, unless the library itself goes by f ‖d‖. So it is for an atom that is zero
    or has norm 1 to 1e-6 already.
    """
    W_enc, b_enc, s, notes = parts.W_enc, parts.b_enc, parts.scale, list(parts.notes)
    norm = parts.W_dec.norm(dim=-1)
    if (
        parts.k is not None
        and not parts.by_norm
        and not torch.allclose(norm, torch.ones(()), atol=1e-5)
    ):
        notes.append(
            "atoms keep their norms, because TopK goes by the size of activations as they are"
        )
    n = (
        norm.where((norm > 0) & ((norm - 1).abs() > 1e-6), 1)
        if parts.k is None or parts.by_norm
        else torch.ones_like(norm)
    )
    if (n != 1).any():
        notes.append(
            f"atoms of norm {n.min():.4g} to {n.max():.4g}: brought to 1, the norms moved into the encoder"
        )
    if parts.b_in is not None:
        b_enc = b_enc - parts.b_in @ W_enc
        notes.append("a bias subtracted from the input: moved into b_enc")
    if s != 1:
        notes.append(f"inputs divided by {s:.6g}: moved into b_enc, b_dec and threshold")
    threshold = parts.threshold * torch.ones_like(b_enc)
    if (threshold < 0).any():
        notes.append(f"{int((threshold < 0).sum())} negative thresholds: 0, where the ReLU cuts")
    threshold = s * threshold.clamp_min(0) * (1 if parts.by_norm else n)
    sae = SAE(
        n * W_enc,
        s * n * b_enc,
        parts.W_dec / n[:, None],
        s * parts.b_dec,
        threshold,
        k=parts.k,
        origin=parts.origin,
    )
    return sae, tuple(notes)


def recognise(folder: str | Path) -> str:
    """Which of FORMATS `folder` has. Raises FileNotFoundError for none, ValueError for more than
    one."""
    folder = Path(folder)
    found = [
        name
        for name, format in FORMATS.items()
        if not _missing(folder, format) and format.marks(folder)
    ]
    if len(found) > 1:
        raise ValueError(f"{folder} looks like {' and '.join(found)}: say which with `format`")
    if not found:
        there = (
            sorted(path.name for path in folder.iterdir())[:12]
            if folder.is_dir()
            else "no such folder"
        )
        expected = "; ".join(
            f"{name}: {' and '.join(format.files)}" for name, format in FORMATS.items()
        )
        raise FileNotFoundError(
            f"no SAE that can be read in {folder}: found {there}; expected one of {expected}"
        )
    return found[0]


def examine(folder: str | Path, format: str | None = None) -> Reading:
    """:func:`read`, and what was done on the way."""
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    format = format or recognise(folder)
    if missing := _missing(folder, _format(format)):
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}, which a {format} SAE has"
        )
    try:
        sae, notes = fold(FORMATS[format].read(folder))
    except KeyError as error:
        raise ValueError(
            f"{folder} has no {error}, which a {format} SAE has: it is cut off, or of another version"
        ) from error
    return Reading(sae, format, notes)


def read(folder: str | Path, format: str | None = None) -> SAE:
    """The SAE in `folder`, or in the folder of a file: raw activations in and out, whatever library
    wrote it.

    format: one of FORMATS; found from the files by default. Atoms have norm 1 except for most TopK,
    see :func:`fold`.

    Raises FileNotFoundError where there is none, ValueError for a damaged file, a pickle of more
    than tensors, or an SAE that our form cannot hold.
    """
    return examine(folder, format).sae


def write(sae: SAE, folder: str | Path, format: str) -> tuple[str, ...]:
    """Write `sae` to `folder` for another library, in float32; returns what is different there, a
    line each.

    Raises ValueError, before anything is written, where the format cannot hold the SAE.
    """
    writer, kind = _format(format).write, kind_of(sae)
    if writer is None:
        raise ValueError(
            f"{format} is only read: write one of {', '.join(n for n, f in FORMATS.items() if f.write)}"
        )
    if isinstance(sae, Transcoder):
        raise ValueError(
            "a transcoder is no SAE: only SAE.save and jumprelu.exchange.gemma_scope.save_gemma_scope write it"
        )
    if kind not in FORMATS[format].holds:
        others = ", ".join(name for name, other in FORMATS.items() if kind in other.holds)
        raise ValueError(
            f"{format} has no {kind} SAE: it holds {', '.join(FORMATS[format].holds)}. Choose one of {others}"
        )
    return writer(sae, Path(folder))


def kind_of(sae: SAE) -> str:
    """What `sae` is at inference, from its arrays alone: "relu", "jumprelu", "topk" or "topk with
    thresholds"."""
    jumps = bool(sae.threshold.any())
    return (
        ("jumprelu" if jumps else "relu")
        if sae.k is None
        else ("topk with thresholds" if jumps else "topk")
    )


# ---- files


def _missing(folder: Path, format: Format) -> list[str]:
    return [
        names
        for names in format.files
        if not any((folder / name).is_file() for name in names.split(" or "))
    ]


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, expected an object with settings: it is another file"
        )
    return value


def _safetensors(path: Path) -> Tensors:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): copy it again") from error


def _pickled_tensors(path: Path) -> Tensors:
    """The state dictionary in a file of torch.save. Nothing in the file is run."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever broken bytes lead to: not all of it is UnpicklingError
        raise ValueError(
            f"{path} is refused: it is damaged, or a pickle that holds more than tensors and could run code when "
            "opened. Copy it again, or save the state_dict() of the SAE where it was made"
        ) from error
    if not isinstance(value, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in value.values()
    ):
        raise ValueError(f"{path} holds no dictionary of tensors: save the state_dict() of the SAE")
    return {name: tensor.float() for name, tensor in value.items()}


def _arrays(sae: SAE) -> Tensors:
    return {name: tensor.detach().float().cpu() for name, tensor in sae.named_parameters()}


def _same_shape(where: Path, W_enc: torch.Tensor, d_in: int, d_sae: int) -> None:
    if tuple(W_enc.shape) != (d_in, d_sae):
        raise ValueError(
            f"{where} says d_in = {d_in} and d_sae = {d_sae}, the weights beside it have {tuple(W_enc.shape)}: "
            "they are not of one save, copy both again"
        )


def _origin(kept: Any, model_name: Any, hook: Any, architecture: str) -> Origin:
    """What our own export kept, or else what another library says. hook: in TransformerLens's
    names, or None."""
    if isinstance(kept, dict):
        return Origin(**{name: kept[name] for name in Origin._fields if name in kept})
    for site, pattern in HOOKS.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), str(hook)):
            return Origin(model_name, site, int(match[1]), architecture)
    return Origin(model_name, hook, None, architecture)


def _gate(
    W: torch.Tensor, r_mag: torch.Tensor, b_gate: torch.Tensor, b_mag: torch.Tensor
) -> dict[str, Any]:
    """Gated as JumpReLU: with π = e^r xW + b_mag, the gate xW + b_gate > 0 is π > b_mag − e^r
    b_gate, because e^r > 0."""
    gain = r_mag.exp()
    return {
        "W_enc": W * gain,
        "b_enc": b_mag,
        "threshold": b_mag - gain * b_gate,
        "notes": ("the gate: made a threshold",),
    }


# ---- SAELens


def _read_saelens(folder: Path) -> Parts:
    config, w = _json(folder / "cfg.json"), _safetensors(folder / "sae_weights.safetensors")
    about = config.get("metadata") or {}
    version = re.match(r"\d+", str(about.get("sae_lens_version")))
    if version is None or int(version[0]) < 6:
        raise ValueError(
            f"{folder} is of SAELens {about.get('sae_lens_version', 'before 6')}, expected 6 or later: "
            "load it in SAELens 6 and save it there with save_model"
        )
    _same_shape(folder / "cfg.json", w["W_enc"], config["d_in"], config["d_sae"])
    architecture, given = config["architecture"], {"W_enc": w["W_enc"], "b_enc": w.get("b_enc")}
    if architecture == "gated":
        given = _gate(w["W_enc"], w["r_mag"], w["b_gate"], w["b_mag"])
    elif architecture == "jumprelu":
        given["threshold"] = w["log_threshold"].exp() if "log_threshold" in w else w["threshold"]
    elif architecture == "topk":
        given |= {
            "k": int(config["k"]),
            "by_norm": bool(config.get("rescale_acts_by_decoder_norm")),
        }
    elif architecture in ("batchtopk", "matryoshka_batchtopk"):  # as it is saved in training
        given |= {
            "threshold": w["topk_threshold"],
            "by_norm": bool(config["rescale_acts_by_decoder_norm"]),
        }
    elif architecture != "standard":
        raise ValueError(
            f"{folder} is a SAELens {architecture!r}, which our form cannot hold: expected standard, "
            "jumprelu, topk, batchtopk or gated"
        )
    if given["b_enc"] is None:
        raise KeyError("b_enc")
    if config.get("reshape_activations") == "hook_z":
        given["notes"] = (
            *given.get("notes", ()),
            "the attention heads come concatenated: [..., n_heads · head_dim]",
        )
    trained = (
        str(about.get("training_architecture") or architecture)
        .replace("standard", "relu")
        .removeprefix("matryoshka_")
    )
    return Parts(
        **given,
        W_dec=w["W_dec"],
        b_dec=w["b_dec"],
        b_in=w["b_dec"] if config["apply_b_dec_to_input"] else None,
        scale=_saelens_scale(folder, config.get("normalize_activations") or "none"),
        origin=_origin(about.get(OURS), about.get("model_name"), about.get("hook_name"), trained),
    )


def _saelens_scale(folder: Path, normalisation: str) -> float:
    """What the inputs are divided by."""
    if normalisation == "none":
        return 1.0
    if normalisation != "expected_average_only_in":
        raise ValueError(
            f"{folder} has normalize_activations = {normalisation!r}, which is other arithmetic than our form's and "
            "cannot be folded into weights: expected 'none' or 'expected_average_only_in'. SAELens folds "
            "'covariance_whitening' with fold_activation_whitening; 'layer_norm' and 'constant_norm_rescale' need "
            "an SAE trained without them"
        )
    path = folder / "activation_scaler.json"
    factor = _json(path).get("scaling_factor") if path.exists() else None
    if not factor:
        raise ValueError(
            f"{folder} expects inputs scaled to E‖x‖ = √d_in, and does not say how. Write {path.name} there, with "
            '{"scaling_factor": √d_in / mean ‖x‖}, or fold it in SAELens: fold_activation_norm_scaling_factor'
        )
    return 1 / factor


def _write_saelens(sae: SAE, folder: Path) -> tuple[str, ...]:
    w, o = _arrays(sae), sae.origin
    config = {
        "architecture": {"relu": "standard"}.get(kind_of(sae), kind_of(sae)),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if o.site == "attn_out" and o.layer is not None else "none",
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if config["architecture"] != "jumprelu":
        del w["threshold"]
    hook = HOOKS[o.site].format(o.layer) if o.site in HOOKS and o.layer is not None else o.site
    about = {
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "model_name": o.model_name,
        "hook_name": hook,
        "hook_head_index": None,
        "training_architecture": o.architecture,
        OURS: o._asdict(),
    }
    write_tensors(folder / "sae_weights.safetensors", w)
    write_json(folder / "cfg.json", config | {"metadata": about})
    return (
        ("its inputs are heads apart: [..., n_heads, head_dim]",)
        if config["reshape_activations"] == "hook_z"
        else ()
    )


# ---- dictionary_learning


def _read_dictionary_learning(folder: Path) -> Parts:
    config, w = _json(folder / "config.json"), _pickled_tensors(folder / "ae.pt")
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    linear = (
        {} if "W_enc" in w else {"W_enc": w["encoder.weight"].T, "W_dec": w["decoder.weight"].T}
    )
    if kind == "JumpReluAutoEncoder":
        given = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    elif kind == "AutoEncoder":
        given = linear | {"b_enc": w["encoder.bias"], "b_dec": w["bias"], "b_in": w["bias"]}
    elif kind == "AutoEncoderNew":
        given = linear | {"b_enc": w["encoder.bias"], "b_dec": w["decoder.bias"]}
    elif kind == "GatedAutoEncoder":
        given = linear | _gate(linear["W_enc"], w["r_mag"], w["gate_bias"], w["mag_bias"])
        given |= {"b_dec": w["decoder_bias"], "b_in": w["decoder_bias"]}
    elif kind == "AutoEncoderTopK":
        given = linear | {
            "b_enc": w["encoder.bias"],
            "b_dec": w["b_dec"],
            "b_in": w["b_dec"],
            "k": int(w["k"]),
        }
    elif kind == "BatchTopKSAE":  # a negative threshold was never set: encode() is a ReLU then
        given = linear | {
            "b_enc": w["encoder.bias"],
            "b_dec": w["b_dec"],
            "b_in": w["b_dec"],
            "threshold": w["threshold"],
        }
    elif kind == "MatryoshkaBatchTopKSAE":
        given = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")} | {
            "b_in": w["b_dec"]
        }
    else:
        raise ValueError(f"{folder} has dict_class {kind!r}: expected one of {', '.join(CLASSES)}")
    _same_shape(
        folder / "config.json", given["W_enc"], trainer["activation_dim"], trainer["dict_size"]
    )
    site = "resid_post" if str(trainer.get("submodule_name")).startswith("resid_post") else None
    origin = _origin(config.get(OURS), trainer.get("lm_name"), site, CLASSES[kind])._replace(
        layer=trainer.get("layer")
    )
    return Parts(**given, origin=origin)


CLASSES = {
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
}
"""dictionary_learning's classes, and our names for them."""


def _write_dictionary_learning(sae: SAE, folder: Path) -> tuple[str, ...]:
    w, o, kind, notes = _arrays(sae), sae.origin, "JumpReluAutoEncoder", ()
    linear = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }
    if kind_of(sae) == "relu":
        kind, w = (
            "AutoEncoderNew",
            linear | {"decoder.bias": w["b_dec"]},
        )  # the one whose encoder sees x, not x − b_dec
    elif sae.k is not None:
        linear["encoder.bias"] = w["b_enc"] + w["b_dec"] @ w["W_enc"]
        kind, notes = (
            "AutoEncoderTopK",
            ("its encoder sees x − b_dec: b_dec W_enc added to its bias",),
        )
        w = linear | {
            "b_dec": w["b_dec"],
            "k": torch.tensor(sae.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),
        }
    trainer = {
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "device": "cpu",
        "layer": o.layer,
        "lm_name": o.model_name or "unknown",
        "submodule_name": f"{o.site}_layer_{o.layer}",
    }
    with writing(folder / "ae.pt") as temporary:
        torch.save(w, temporary)
    buffer = {"d_submodule": sae.d_in, "ctx_len": None}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer, OURS: o._asdict()})
    return notes


# ---- sparsify


def _read_sparsify(folder: Path) -> Parts:
    config, w = _json(folder / "cfg.json"), _safetensors(folder / "sae.safetensors")
    for name, expected in {
        "transcode": False,
        "skip_connection": False,
        "activation": "topk",
        "signed": False,
    }.items():
        if (value := config.get(name, expected)) != expected:
            raise ValueError(
                f"{folder} has {name} = {value!r}, which our form cannot hold: expected {expected!r}"
            )
    W_enc = w["encoder.weight"].T
    _same_shape(
        folder / "cfg.json", W_enc, config["d_in"], config.get("num_latents") or W_enc.shape[1]
    )
    place = re.fullmatch(r"layers\.(\d+)", folder.name)  # the folder is named after the module
    origin = _origin(
        config.get(OURS), None, HOOKS["resid_post"].format(place[1]) if place else None, "topk"
    )
    return Parts(
        W_enc,
        w["encoder.bias"],
        w["W_dec"],
        w["b_dec"],
        b_in=w["b_dec"],
        k=int(config["k"]),
        origin=origin,
    )


def _write_sparsify(sae: SAE, folder: Path) -> tuple[str, ...]:
    w = _arrays(sae)
    b_enc = w["b_enc"] + w["b_dec"] @ w["W_enc"]
    write_tensors(
        folder / "sae.safetensors",
        {
            "encoder.weight": w["W_enc"].T,
            "encoder.bias": b_enc,
            "W_dec": w["W_dec"],
            "b_dec": w["b_dec"],
        },
    )
    write_json(
        folder / "cfg.json",
        {
            "activation": "topk",
            "expansion_factor": sae.d_sae // sae.d_in,
            "normalize_decoder": True,
            "num_latents": sae.d_sae,
            "k": sae.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": sae.d_in,
            OURS: sae.origin._asdict(),
        },
    )
    return ("its encoder sees x − b_dec: b_dec W_enc added to its bias",)


# ---- Llama Scope and Llamascopium


def _read_llama_scope(folder: Path) -> Parts:
    """θ is one number in raw units, for atoms of norm 1, as ours are; everything else is in units
    of E‖x‖ = √d_in."""
    config, w = (
        _json(folder / "hyperparams.json"),
        _safetensors(folder / "checkpoints/final.safetensors"),
    )
    if config["act_fn"] != "jumprelu":
        raise ValueError(f"{folder} has act_fn = {config['act_fn']!r}: Llama Scope's are jumprelu")
    parts = _openmoss(folder, config, w, lambda: config["dataset_average_activation_norm"]["in"])
    return parts._replace(threshold=config["jump_relu_threshold"] / parts.scale)


def _read_llamascopium(folder: Path) -> Parts:
    config, w = _json(folder / "config.json"), _safetensors(folder / "sae_weights.safetensors")
    if config.get("sae_type", "sae") != "sae":
        raise ValueError(
            f"{folder} has sae_type = {config['sae_type']!r}, which our form cannot hold: expected 'sae'"
        )
    if config["act_fn"] not in ("relu", "jumprelu", "topk"):
        raise ValueError(
            f"{folder} has act_fn = {config['act_fn']!r}, which picks latents over a batch and saves no threshold: "
            "expected relu, jumprelu or topk"
        )
    parts = _openmoss(
        folder,
        config,
        w,
        lambda: float(w[f"dataset_average_activation_norm.{config['hook_point_in']}"]),
    )
    if config["act_fn"] == "jumprelu":
        names = (
            "activation_function.log_jumprelu_threshold",
            "log_jumprelu_threshold",
        )  # the second of older versions
        return parts._replace(threshold=w[names["W_E" not in w]].exp())
    return parts._replace(k=int(config["top_k"])) if config["act_fn"] == "topk" else parts


def _openmoss(
    folder: Path, config: dict[str, Any], w: Tensors, average_norm: Callable[[], float]
) -> Parts:
    """What the two formats share. average_norm: mean ‖x‖ of the training activations."""
    if config["hook_point_in"] != config["hook_point_out"]:
        raise ValueError(
            f"{folder} maps {config['hook_point_in']} to {config['hook_point_out']}: a transcoder, expected an SAE"
        )
    if config.get("use_glu_encoder"):
        raise ValueError(f"{folder} has a GLU encoder, which our form cannot hold")
    normalisation = config["norm_activation"]
    if normalisation not in ("dataset-wise", "inference"):
        raise ValueError(
            f"{folder} has norm_activation = {normalisation!r}, which differs by input and cannot be folded into "
            "weights: expected 'dataset-wise' or 'inference'"
        )
    if "encoder.weight" in w:
        W_enc, b_enc, W_dec, b_dec = (
            w["encoder.weight"].T,
            w["encoder.bias"],
            w["decoder.weight"].T,
            w.get("decoder.bias"),
        )
    else:
        W_enc, b_enc, W_dec, b_dec = w["W_E"], w["b_E"], w["W_D"], w.get("b_D")
    d_in = config["d_model"]
    _same_shape(
        folder, W_enc, d_in, config.get("d_sae") or round(d_in * config["expansion_factor"])
    )
    b_dec = torch.zeros(d_in) if b_dec is None else b_dec
    return Parts(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        b_in=b_dec if config.get("apply_decoder_bias_to_pre_encoder") else None,
        scale=average_norm() / d_in**0.5 if normalisation == "dataset-wise" else 1.0,
        by_norm=config.get("sparsity_include_decoder_norm", True),
        origin=_origin(None, config.get("model_name"), config["hook_point_in"], config["act_fn"]),
    )


# ---- ours, and Gemma Scope


def _parts(sae: SAE) -> Parts:
    return Parts(**_arrays(sae), k=sae.k, origin=sae.origin)


def _read_ours(folder: Path) -> Parts:
    sae = SAE.load(folder)
    check_autoencoder(sae)
    return _parts(sae)


def _write_ours(sae: SAE, folder: Path) -> tuple[str, ...]:
    sae.save(folder)
    return ()


def _read_gemma_scope(folder: Path) -> Parts:
    from . import gemma_scope

    sae = gemma_scope.load_sae(
        next(
            path
            for path in (folder / "params.npz", folder / "params.safetensors")
            if path.is_file()
        )
    )
    if isinstance(sae, gemma_scope.Transcoder):
        raise ValueError(
            f"{folder} has a transcoder, expected an SAE: jumprelu.exchange.gemma_scope.load_sae reads it"
        )
    return _parts(sae)


def _write_gemma_scope(sae: SAE, folder: Path) -> tuple[str, ...]:
    from . import gemma_scope

    gemma_scope.save_gemma_scope(sae, folder)
    return ()


class Format(NamedTuple):
    """A row of FORMATS."""

    files: tuple[str, ...]
    read: Callable[[Path], Parts]
    write: Callable[[SAE, Path], tuple[str, ...]] | None = None
    holds: tuple[str, ...] = ()
    """Which of :func:`kind_of` it can be written with."""
    marks: Callable[[Path], bool] = lambda folder: True
    """What tells it from a format with files of the same names."""


FORMATS = {
    "jumprelu": Format(
        ("cfg.json", "sae.safetensors"),
        _read_ours,
        _write_ours,
        ("relu", "jumprelu", "topk", "topk with thresholds"),
        marks=lambda folder: "format" in _json(folder / "cfg.json"),
    ),
    "saelens": Format(
        ("cfg.json", "sae_weights.safetensors"),
        _read_saelens,
        _write_saelens,
        ("relu", "jumprelu", "topk"),
    ),
    "dictionary_learning": Format(
        ("config.json", "ae.pt"),
        _read_dictionary_learning,
        _write_dictionary_learning,
        ("relu", "jumprelu", "topk"),
    ),
    "sparsify": Format(
        ("cfg.json", "sae.safetensors"),
        _read_sparsify,
        _write_sparsify,
        ("topk",),
        marks=lambda folder: "format" not in _json(folder / "cfg.json"),
    ),
    "gemma_scope": Format(
        ("params.npz or params.safetensors",),
        _read_gemma_scope,
        _write_gemma_scope,
        ("relu", "jumprelu"),
    ),
    "llama_scope": Format(("hyperparams.json", "checkpoints/final.safetensors"), _read_llama_scope),
    "llamascopium": Format(("config.json", "sae_weights.safetensors"), _read_llamascopium),
}
"""Every format by name."""
