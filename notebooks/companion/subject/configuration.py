"""The subject model's shape: what its configuration says, and whether the loaded object does it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from jumprelu.lm import LM
from jumprelu.sites import capture

LOG_COLUMNS = ("step", "tokens", "train_loss", "lr_factor", "heldout_loss")


def config_table(lm: LM) -> pd.DataFrame:
    """What the model's configuration says of its shape: columns `property`, `value`; properties it
    lacks are left out."""
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    config = lm.config
    rows = [("class", type(lm.model).__name__)]
    rows += [
        (name, str(getattr(config, name)))
        for name in names
        if getattr(config, name, None) is not None
    ]
    return pd.DataFrame(rows, columns=["property", "value"])


def _component(parameter: str) -> str:
    kinds = {
        "norm": "norms",
        "ln_": "norms",
        "lm_head": "unembedding",
        "embed_out": "unembedding",
        "embed": "embedding",
        "wte": "embedding",
        "wpe": "embedding",
        "attn": "attention",
        "attention": "attention",
        "mlp": "MLP",
    }
    return next((kind for word, kind in kinds.items() if word in parameter), "other")


def parameter_table(lm: LM) -> pd.DataFrame:
    """Parameters by component, tied ones once: columns `component`, `parameters`, `share`, largest
    first."""
    counts: dict[str, int] = {}
    for name, parameter in lm.model.named_parameters():
        counts[_component(name)] = counts.get(_component(name), 0) + parameter.numel()
    table = pd.DataFrame(
        sorted(counts.items(), key=lambda item: -item[1]), columns=["component", "parameters"]
    )
    return table.assign(share=table.parameters / table.parameters.sum())


def weights_megabytes(lm: LM) -> float:
    """Size of the safetensors files in the model's folder, in 10⁶ bytes; of its parameters if it
    has no folder."""
    files = lm.folder.glob("*.safetensors") if lm.folder else []
    sizes = [f.stat().st_size for f in files] or [
        p.numel() * p.element_size() for p in lm.model.parameters()
    ]
    return sum(sizes) / 1e6


def _window(config: Any, layer: int, length: int) -> int:
    """Positions that a token of this layer attends to, its own included."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return min(length, config.sliding_window) if kinds[layer] == "sliding_attention" else length


def _reach(lm: LM, ids: torch.Tensor, layer: int) -> int:
    """Last position minus first, plus one, at which the residual after `layer` feels a change of
    the token at position 1."""
    changed = ids.clone()
    changed[0, 1] = (ids[0, 1] + 1) % lm.config.vocab_size
    both = capture(lm, [("resid_post", layer)], torch.cat([ids, changed]))["resid_post", layer]
    felt = (both[0] != both[1]).any(-1).nonzero()
    return int(felt.max() - felt.min()) + 1


@torch.no_grad()
def configuration_checks(lm: LM, length: int = 256) -> pd.DataFrame:
    """Does the loaded object do what its configuration says? Columns `property`, `configured`,
    `found`, `holds`.

    Reach: how many positions feel that one token early in a row of `length` tokens is changed,
    after the first layer and after the second: a sliding layer stops at its window. Soft-capping of
    the logits: they are c·tanh(x/c) of the last hidden state times the unembedding. The other rows
    count weights and modules of the blocks; those that the model's layout does not have are left
    out.
    """
    model, config = lm.model, lm.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size - 1, (1, length), generator=generator).to(lm.device)
    tied = (
        model.get_output_embeddings().weight.data_ptr()
        == model.get_input_embeddings().weight.data_ptr()
    )
    rows: list[tuple[str, Any, Any]] = [("embeddings tied", bool(config.tie_word_embeddings), tied)]
    windows = [_window(config, layer, length) for layer in range(min(2, config.num_hidden_layers))]
    for layer in range(len(windows)):
        configured = min(length - 1, 1 + sum(w - 1 for w in windows[: layer + 1]))
        rows.append((f"reach after layer {layer} [positions]", configured, _reach(lm, ids, layer)))
    widths = {
        kind: {
            m.weight.shape[0] for name, m in model.named_modules() if name.endswith(f".{kind}_proj")
        }
        for kind in "qk"
    }
    if all(len(width) == 1 for width in widths.values()):
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        rows.append(("query heads", config.num_attention_heads, widths["q"].pop() // head_dim))
        rows.append(("key-value heads", config.num_key_value_heads, widths["k"].pop() // head_dim))
    if config.model_type == "gemma2":
        norms = sum("Norm" in type(m).__name__ for m in model.modules())
        rows.append(("norms, four a block and the last", 4 * config.num_hidden_layers + 1, norms))
        caps = {
            m.attn_logit_softcapping
            for m in model.modules()
            if hasattr(m, "attn_logit_softcapping")
        }
        rows.append(
            (
                "soft cap of attention scores",
                config.attn_logit_softcapping,
                caps.pop() if len(caps) == 1 else str(caps),
            )
        )
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    raw, cap = (
        model.get_output_embeddings()(hidden).float(),
        getattr(config, "final_logit_softcapping", None),
    )
    expected = cap * torch.tanh(raw / cap) if cap else raw
    off = (model(ids, use_cache=False).logits.float() - expected).abs().max().item()
    applied = off < 1e-3 * expected.abs().max().item()  # bfloat16 models round their logits
    rows.append(("soft cap of the logits", cap, cap if applied else f"off by {off:.3g}"))
    table = pd.DataFrame(
        [tuple(map(str, row)) for row in rows], columns=["property", "configured", "found"]
    )
    return table.assign(holds=table.configured == table.found)


def training_log(lm: LM) -> pd.DataFrame:
    """The log that `companion.subject.train_lm` wrote beside the weights; no rows for a model that
    has none.

    Columns `step`, `tokens`, `train_loss` (mean since the row before), `lr_factor`, `heldout_loss`;
    nats per token.
    """
    if lm.folder is None or not (lm.folder / "training.csv").exists():
        return pd.DataFrame(columns=list(LOG_COLUMNS), dtype=float)
    return pd.read_csv(lm.folder / "training.csv")
