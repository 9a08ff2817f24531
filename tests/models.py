"""Small language models with random weights, in each layout that the package reads; made in
milliseconds."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

from jumprelu.lm import LM

FAMILIES = ("gemma2", "llama", "gpt2", "gpt_neox", "gpt_neox_serial")
VOCAB, D_MODEL, LAYERS, HEADS = 300, 16, 3, 4

_COMMON = {
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
_SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}


def tiny_model(family: str, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A model of one of FAMILIES; `overrides` go into its configuration. Gemma 2's heads are wider
    than d_model together."""
    if family == "gemma2":
        config, kind = transformers.Gemma2Config, transformers.Gemma2ForCausalLM
        options = _SIZES | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "num_key_value_heads": 2,
            "sliding_window": 4,
        }
    elif family == "llama":
        config, kind, options = (
            transformers.LlamaConfig,
            transformers.LlamaForCausalLM,
            _SIZES | {"num_key_value_heads": 2},
        )
    elif family == "gpt2":
        config, kind = transformers.GPT2Config, transformers.GPT2LMHeadModel
        options = {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
    elif family in ("gpt_neox", "gpt_neox_serial"):
        config, kind = transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM
        options = _SIZES | {"use_parallel_residual": family == "gpt_neox"}
    else:
        raise ValueError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    torch.manual_seed(seed)
    return kind(config(**(_COMMON | options | overrides))).eval()


def tiny_lm(family: str = "gemma2", seed: int = 0, **overrides) -> LM:
    return LM(tiny_model(family, seed, **overrides), name=f"tiny-{family}")


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens: <pad> 0, <eos> 1, <bos> 2, then the 256 bytes."""
    tokens = ["<pad>", "<eos>", "<bos>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny(
    family: str, folder: Path, tokenizer: bool = False, seed: int = 0, **overrides
) -> Path:
    """Write a model, and a tokenizer if asked, as `save_pretrained` does; returns `folder`."""
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def random_ids(rows: int, positions: int, seed: int = 0, bos: bool = True) -> torch.Tensor:
    """Ordinary ids (3 and up), shape [rows, positions]; with `bos`, each row begins with 2."""
    ids = torch.randint(3, VOCAB, (rows, positions), generator=torch.Generator().manual_seed(seed))
    if bos:
        ids[:, 0] = 2
    return ids
