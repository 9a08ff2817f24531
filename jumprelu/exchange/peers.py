"""The layouts of other libraries: a reader only says which array is which, as :class:`Parts`; a
writer returns what is different there, a line each.

What cannot be folded, such as a norm taken of each input, is refused with the reason. What we write
carries the SAE's :class:`jumprelu.sae.Origin` under the key "jumprelu", which others ignore.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import write_json, write_tensors, writing
from ..sae import SAE
from .parts import (
    HOOKS,
    OURS,
    Parts,
    Tensors,
    arrays,
    check_shape,
    gate,
    kind_of,
    origin_of,
    read_pickled,
    read_safetensors,
    read_settings,
    renamed,
    renamed_back,
)

PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR = {
    "W_enc": "encoder.weight.T",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight.T",
    "b_dec": "b_dec",
}
"""Our names, and those of two torch.nn.Linear; see :func:`jumprelu.exchange.parts.renamed`."""
MOVED = ("its encoder sees x − b_dec: b_dec W_enc added to its bias",)


# ---- SAELens


def read_saelens(folder: Path) -> Parts:
    config = read_settings(folder / "cfg.json")
    w = read_safetensors(folder / "sae_weights.safetensors")
    about = config.get("metadata") or {}
    version = re.match(r"\d+", str(about.get("sae_lens_version")))
    if version is None or int(version[0]) < 6:
        raise ValueError(
            f"{folder} is of SAELens {about.get('sae_lens_version', 'before 6')}, expected 6 or "
            "later: load it in SAELens 6 and save it there with save_model"
        )
    check_shape(folder / "cfg.json", w["W_enc"], config["d_in"], config["d_sae"])
    architecture = config["architecture"]
    given: dict[str, Any] = {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if architecture == "gated":
        given |= gate(w["W_enc"], w["r_mag"], w["b_gate"], w["b_mag"])
    else:
        given |= renamed(w, PLAIN)
    if architecture == "jumprelu":
        given["threshold"] = w["log_threshold"].exp() if "log_threshold" in w else w["threshold"]
    elif architecture == "topk":
        given["k"] = int(config["k"])
    elif architecture in ("batchtopk", "matryoshka_batchtopk"):  # as it is saved in training
        given["threshold"] = w["topk_threshold"]
    elif architecture not in ("standard", "gated"):
        raise ValueError(
            f"{folder} is a SAELens {architecture!r}: expected standard, jumprelu, topk, batchtopk "
            "or gated"
        )
    if config.get("reshape_activations") == "hook_z":
        note = "the attention heads come concatenated: [..., n_heads · head_dim]"
        given["notes"] = (*given.get("notes", ()), note)
    trained = str(about.get("training_architecture") or architecture)
    trained = trained.replace("standard", "relu").removeprefix("matryoshka_")
    return Parts(
        **given,
        b_in=w["b_dec"] if config["apply_b_dec_to_input"] else None,
        by_norm="topk" in architecture and bool(config.get("rescale_acts_by_decoder_norm")),
        scale=_saelens_scale(folder, config.get("normalize_activations") or "none"),
        origin=origin_of(about.get(OURS), about.get("model_name"), about.get("hook_name"), trained),
    )


def _saelens_scale(folder: Path, normalisation: str) -> float:
    """What the inputs are divided by."""
    if normalisation == "none":
        return 1.0
    if normalisation != "expected_average_only_in":
        raise ValueError(
            f"{folder} has normalize_activations = {normalisation!r}, which cannot be folded into "
            "weights: expected 'none' or 'expected_average_only_in'. SAELens folds "
            "'covariance_whitening' with fold_activation_whitening; others need another SAE"
        )
    path = folder / "activation_scaler.json"
    factor = read_settings(path).get("scaling_factor") if path.exists() else None
    if not factor:
        raise ValueError(
            f"{folder} expects inputs scaled to E‖x‖ = √d_in, and does not say how. Write "
            f'{path.name} there, with {{"scaling_factor": √d_in / mean ‖x‖}}'
        )
    return 1 / factor


def write_saelens(sae: SAE, folder: Path) -> tuple[str, ...]:
    w, o, kind = arrays(sae), sae.origin, kind_of(sae)
    placed = o.site in HOOKS and o.layer is not None
    heads = placed and o.site == "attn_out"
    about = {
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "model_name": o.model_name,
        "hook_name": HOOKS[o.site].format(o.layer) if placed else o.site,
        "hook_head_index": None,
        "training_architecture": o.architecture,
        OURS: o._asdict(),
    }
    config = {
        "architecture": "standard" if kind == "relu" else kind,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if heads else "none",
        "metadata": about,
    }
    if kind == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if kind != "jumprelu":
        del w["threshold"]
    write_tensors(folder / "sae_weights.safetensors", w)
    write_json(folder / "cfg.json", config)
    return ("its inputs are heads apart: [..., n_heads, head_dim]",) if heads else ()


# ---- dictionary_learning


THRESHOLD = {"threshold": "threshold"}
GATED = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", "b_dec": "decoder_bias"}
CLASSES = {
    "JumpReluAutoEncoder": ("jumprelu", PLAIN | THRESHOLD, False),
    "AutoEncoder": ("relu", LINEAR | {"b_dec": "bias"}, True),
    "AutoEncoderNew": ("relu", LINEAR | {"b_dec": "decoder.bias"}, False),
    "GatedAutoEncoder": ("gated", GATED, True),
    "AutoEncoderTopK": ("topk", LINEAR, True),
    # a negative threshold was never set: encode() is a ReLU then
    "BatchTopKSAE": ("batchtopk", LINEAR | THRESHOLD, True),
    "MatryoshkaBatchTopKSAE": ("batchtopk", PLAIN | THRESHOLD, True),
}
"""dictionary_learning's classes: our name, its arrays, and whether its encoder sees x − b_dec."""


def read_dictionary_learning(folder: Path) -> Parts:
    config, w = read_settings(folder / "config.json"), read_pickled(folder / "ae.pt")
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    if kind not in CLASSES:
        raise ValueError(f"{folder} has dict_class {kind!r}: expected one of {', '.join(CLASSES)}")
    architecture, names, moved = CLASSES[kind]
    given: dict[str, Any] = renamed(w, names)
    if architecture == "gated":
        given |= gate(given["W_enc"], w["r_mag"], w["gate_bias"], w["mag_bias"])
    if architecture == "topk":
        given["k"] = int(w["k"])
    sizes = trainer["activation_dim"], trainer["dict_size"]
    check_shape(folder / "config.json", given["W_enc"], *sizes)
    site = "resid_post" if str(trainer.get("submodule_name")).startswith("resid_post") else None
    origin = origin_of(config.get(OURS), trainer.get("lm_name"), site, architecture)
    origin = origin._replace(layer=trainer.get("layer"))
    return Parts(**given, b_in=given["b_dec"] if moved else None, origin=origin)


def write_dictionary_learning(sae: SAE, folder: Path) -> tuple[str, ...]:
    w, o, kind = arrays(sae), sae.origin, kind_of(sae)
    # AutoEncoderNew is the ReLU whose encoder sees x, not x − b_dec
    name = {"relu": "AutoEncoderNew", "topk": "AutoEncoderTopK"}.get(kind, "JumpReluAutoEncoder")
    if kind == "topk":
        w["b_enc"] = _bias_before(w)
    tensors = renamed_back(w, CLASSES[name][1])
    if kind == "topk":
        tensors["k"] = torch.tensor(sae.k, dtype=torch.int)
        tensors["threshold"] = torch.tensor(-1.0)
    trainer = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "device": "cpu",
        "layer": o.layer,
        "lm_name": o.model_name or "unknown",
        "submodule_name": f"{o.site}_layer_{o.layer}",
    }
    with writing(folder / "ae.pt") as temporary:
        torch.save(tensors, temporary)
    buffer = {"d_submodule": sae.d_in, "ctx_len": None}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer, OURS: o._asdict()})
    return MOVED if kind == "topk" else ()


def _bias_before(w: Tensors) -> torch.Tensor:
    """b_enc of an encoder that sees x − b_dec."""
    return w["b_enc"] + w["b_dec"] @ w["W_enc"]


# ---- sparsify


SPARSIFY = LINEAR | {"W_dec": "W_dec"}


def read_sparsify(folder: Path) -> Parts:
    config = read_settings(folder / "cfg.json")
    w = read_safetensors(folder / "sae.safetensors")
    plain = {"transcode": False, "skip_connection": False, "activation": "topk", "signed": False}
    for name, expected in plain.items():
        if (value := config.get(name, expected)) != expected:
            raise ValueError(
                f"{folder} has {name} = {value!r}, which our form cannot hold: expected "
                f"{expected!r}"
            )
    given = renamed(w, SPARSIFY)
    d_sae = config.get("num_latents") or given["W_enc"].shape[1]
    check_shape(folder / "cfg.json", given["W_enc"], config["d_in"], d_sae)
    place = re.fullmatch(r"layers\.(\d+)", folder.name)  # the folder is named after the module
    hook = HOOKS["resid_post"].format(place[1]) if place else None
    origin = origin_of(config.get(OURS), None, hook, "topk")
    return Parts(**given, b_in=given["b_dec"], k=int(config["k"]), origin=origin)


def write_sparsify(sae: SAE, folder: Path) -> tuple[str, ...]:
    w = arrays(sae)
    w["b_enc"] = _bias_before(w)
    config = {
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
    }
    write_tensors(folder / "sae.safetensors", renamed_back(w, SPARSIFY))
    write_json(folder / "cfg.json", config)
    return MOVED


# ---- Llama Scope and Llamascopium


def read_llama_scope(folder: Path) -> Parts:
    """θ is one number in raw units, for atoms of norm 1, as ours are; everything else is in units
    of E‖x‖ = √d_in."""
    config = read_settings(folder / "hyperparams.json")
    w = read_safetensors(folder / "checkpoints/final.safetensors")
    if config["act_fn"] != "jumprelu":
        raise ValueError(f"{folder} has act_fn = {config['act_fn']!r}: Llama Scope's are jumprelu")
    parts = _openmoss(folder, config, w, lambda: config["dataset_average_activation_norm"]["in"])
    return parts._replace(threshold=config["jump_relu_threshold"] / parts.scale)


def read_llamascopium(folder: Path) -> Parts:
    config = read_settings(folder / "config.json")
    w = read_safetensors(folder / "sae_weights.safetensors")
    kind, act_fn = config.get("sae_type", "sae"), config["act_fn"]
    if kind != "sae":
        raise ValueError(f"{folder} has sae_type = {kind!r}: expected 'sae'")
    if act_fn not in ("relu", "jumprelu", "topk"):
        raise ValueError(
            f"{folder} has act_fn = {act_fn!r}, over a batch: expected relu, jumprelu or topk"
        )
    norm = f"dataset_average_activation_norm.{config['hook_point_in']}"
    parts = _openmoss(folder, config, w, lambda: float(w[norm]))
    if act_fn == "jumprelu":
        name = "log_jumprelu_threshold"  # older versions; W_E is of newer ones
        name = f"activation_function.{name}" if "W_E" in w else name
        return parts._replace(threshold=w[name].exp())
    return parts._replace(k=int(config["top_k"])) if act_fn == "topk" else parts


def _openmoss(
    folder: Path, config: dict[str, Any], w: Tensors, average_norm: Callable[[], float]
) -> Parts:
    """What the two formats share. average_norm: mean ‖x‖ of the training activations."""
    hook, normalisation = config["hook_point_in"], config["norm_activation"]
    if hook != config["hook_point_out"]:
        raise ValueError(
            f"{folder} maps {hook} to {config['hook_point_out']}: a transcoder, expected an SAE"
        )
    if config.get("use_glu_encoder"):
        raise ValueError(f"{folder} has a GLU encoder, which our form cannot hold")
    if normalisation not in ("dataset-wise", "inference"):
        raise ValueError(
            f"{folder} has norm_activation = {normalisation!r}, which differs by input: expected "
            "'dataset-wise' or 'inference'"
        )
    names = LINEAR | {"b_dec": "decoder.bias"}
    if "encoder.weight" not in w:  # newer versions
        names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    d_in = config["d_model"]
    given = renamed({names["b_dec"]: torch.zeros(d_in), **w}, names)
    d_sae = config.get("d_sae") or round(d_in * config["expansion_factor"])
    check_shape(folder, given["W_enc"], d_in, d_sae)
    return Parts(
        **given,
        b_in=given["b_dec"] if config.get("apply_decoder_bias_to_pre_encoder") else None,
        scale=average_norm() / d_in**0.5 if normalisation == "dataset-wise" else 1.0,
        by_norm=config.get("sparsity_include_decoder_norm", True),
        origin=origin_of(None, config.get("model_name"), hook, config["act_fn"]),
    )
