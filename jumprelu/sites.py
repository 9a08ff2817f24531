"""Where activations are inside a language model, and reading them, by forward hooks on
transformers' own modules. (Replacing them: splicing.py.)

    resid_post   output of block `layer`
    mlp_out      what the MLP adds to the residual stream; Gemma 2: after its post-norm
    attn_out     the heads, concatenated, before the output projection

(The three sites of Gemma Scope, Lieberum et al. 2024, section on the training data.) Transcoders,
which predict mlp_out, read

    mlp_in               what the MLP gets, after the norm before it
    mlp_in_before_gain   the same before that norm's gain, as Gemma Scope's transcoders do;
                         Gemma 2 and 3 only

All are [batch, positions, d_model] but attn_out, which is [batch, positions, n_heads · head_dim].

A model whose blocks have other children than its family's is refused, with the list of what was
found: a hook in the wrong place would give numbers that look right.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple

import torch

from .lm import LM

SITES = ("resid_post", "mlp_out", "attn_out")
INPUTS = ("mlp_in", "mlp_in_before_gain")

Key = tuple[str, int]
"""(site, layer)."""


class Family(NamedTuple):
    """Where a family of models keeps what the sites need; names of modules."""

    blocks: str
    """The list of blocks, from the model; each has its MLP as `mlp`."""
    projection: str
    """The attention's output projection, from a block; its input is `attn_out`."""
    children: tuple[str, ...]
    """Every module that a block may have, besides dropouts, which do nothing in evaluation."""


FAMILIES = {
    "Llama and Gemma 2": Family(
        "model.layers",
        "self_attn.o_proj",
        (
            "input_layernorm",
            "self_attn",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "mlp",
            "post_feedforward_layernorm",
        ),
    ),
    "GPT-2": Family("transformer.h", "attn.c_proj", ("ln_1", "attn", "ln_2", "mlp")),
    "GPT-NeoX": Family(
        "gpt_neox.layers",
        "attention.dense",
        ("input_layernorm", "attention", "post_attention_layernorm", "mlp"),
    ),
}


def capture(lm: LM, wanted: Iterable[Key], ids: torch.Tensor) -> dict[Key, torch.Tensor]:
    """Activations at each (site, layer) of `wanted` for the token ids `ids`, shape [batch,
    positions].

    Returns tensors [batch, positions, width] in the model's dtype and on its device, without
    gradient. The forward pass ends at the last module needed. No attention mask is used: padding,
    if any, belongs on the right.

    Raises ValueError for an unknown site, layer or layout, or ids that the model cannot read.
    """
    keys = list(dict.fromkeys(wanted))
    if not keys:
        raise ValueError("nothing to capture: give a (site, layer) such as ('resid_post', 3)")
    ids = lm.check_ids(ids)
    found: dict[Key, torch.Tensor] = {}

    def keep(key: Key, value: torch.Tensor) -> None:
        found[key] = value
        if len(found) == len(keys):
            raise _Stop

    with ExitStack() as hooks:
        for key in keys:
            hooks.enter_context(attach(locate(lm, *key), partial(keep, key)))
        with suppress(_Stop), torch.no_grad():
            lm.model(input_ids=ids, use_cache=False)
    return {key: found[key] for key in keys}


class _Stop(Exception):
    """Ends a forward pass from within a hook: everything that was wanted is there."""


class Place(NamedTuple):
    module: torch.nn.Module
    is_input: bool
    """The value is the module's input, not its output."""
    gain: torch.Tensor | None = None
    """The value is what the module gets, divided by this."""


def locate(lm: LM, site: str, layer: int) -> Place:
    if site not in SITES + INPUTS:
        raise ValueError(f"unknown site {site!r}: expected one of {', '.join(SITES + INPUTS)}")
    layout, blocks = family_of(lm.model)
    if not isinstance(layer, int) or not 0 <= layer < len(blocks):
        raise ValueError(f"unknown layer {layer!r}: {lm.name} has layers 0 to {len(blocks) - 1}")
    block = blocks[layer]
    if site == "resid_post":
        return Place(block, is_input=False)
    if site == "attn_out":
        return Place(block.get_submodule(layout.projection), is_input=True)
    if site == "mlp_in":
        return Place(block.mlp, is_input=True)
    if site == "mlp_in_before_gain":
        norm = getattr(block, "pre_feedforward_layernorm", None)
        if type(norm).__name__ not in ("Gemma2RMSNorm", "Gemma3RMSNorm"):
            raise ValueError(
                f"mlp_in_before_gain is a site of Gemma 2 and Gemma 3, and {lm.name} is "
                "neither: take mlp_in"
            )
        gain = 1 + norm.weight.detach().float()  # of these two norms; others have it as weight
        return Place(block.mlp, is_input=True, gain=gain)
    # in Gemma 2 and 3 the norm after the MLP comes before the sum
    return Place(getattr(block, "post_feedforward_layernorm", block.mlp), is_input=False)


def family_of(model: torch.nn.Module) -> tuple[Family, torch.nn.ModuleList]:
    """The layout of `model`, and its blocks."""
    for layout in FAMILIES.values():
        blocks = _child(model, layout.blocks)
        is_list = isinstance(blocks, torch.nn.ModuleList)
        if is_list and all(_fits(block, layout) for block in blocks):
            return layout, blocks
    found = [
        f"  {name}: {len(module)} × {type(module[0]).__name__} with {_names(module[0])}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    ]
    known = [
        f"  {family}: {x.blocks} with {', '.join(x.children)}, and {x.projection}"
        for family, x in FAMILIES.items()
    ]
    lines = [f"unknown layout of {type(model).__name__}.", "Found:"]
    lines += found or [f"  no list of blocks, but {_names(model)}"]
    lines += ["Known:", *known, "A new family is one more entry of jumprelu.sites.FAMILIES."]
    raise ValueError("\n".join(lines))


def _names(module: torch.nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children())


def _child(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _fits(block: torch.nn.Module, layout: Family) -> bool:
    children = {name for name, _ in block.named_children() if not name.endswith("dropout")}
    return (
        children <= set(layout.children)
        and _child(block, layout.projection) is not None
        and "mlp" in children
    )


def attach(
    place: Place, fn: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `fn` with the value whenever the module runs; what it returns, unless None, takes the
    value's place."""

    def before(module, args):
        if place.gain is None:
            new = fn(args[0])
        else:
            new = fn((args[0].float() / place.gain).to(args[0].dtype))
            new = new if new is None else (new.float() * place.gain).to(args[0].dtype)
        return None if new is None else (new, *args[1:])

    def after(module, args, output):  # a tensor, or a tuple that begins with it
        if isinstance(output, torch.Tensor):
            return fn(output)
        new = fn(output[0])
        return None if new is None else (new, *output[1:])

    if place.is_input:
        return place.module.register_forward_pre_hook(before)
    return place.module.register_forward_hook(after)
