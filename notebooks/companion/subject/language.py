"""What the subject model knows about text, next to things that know less.

Notable here:
- every method is scored on the same bytes: the tokens that the model predicts, turned back into
  bytes. A token model spends bits on all ways to write a text, so this is an upper bound of its
  bits per byte.
- compressors have no bits per document, only one size for a whole text. One interval serves all
  methods, and their paired differences: delete a group of documents, measure again, spread the
  results (the jackknife).
- a baseline gets what the model gets: the n-grams are trained on the training split (see ngram.py),
  and one compressor reads training text first.
"""

from __future__ import annotations

import bz2
import itertools
import lzma
import math
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from tqdm import tqdm

from jumprelu.corpus import SPLITS, Tokens, fingerprint, load_texts, recorded_fingerprint, tokenize
from jumprelu.intervals import Interval, jackknife, mean_interval
from jumprelu.lm import LM
from jumprelu.sites import LAYOUTS, SITES, capture

from .ngram import NGram

PROMPTS = ("def ", "class ", "import ", '    """Return the ', "The ")
LOG_COLUMNS = ("step", "tokens", "train_loss", "lr_factor", "heldout_loss")

# ---- the model


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


# ---- the corpus and the training run


def corpus_table(source: str, documents: int = 300) -> pd.DataFrame:
    """Documents and bytes by origin and split: columns `origin`, `split`, `documents`, `megabytes`
    (10⁶ bytes).

    Of a source that is streamed only the first `documents` of each split are read.
    """
    rows = []
    for split in SPLITS:
        texts = load_texts(source, split)
        limit = None if isinstance(texts, datasets.Dataset) else documents
        for row in itertools.islice(texts, limit):
            origin = row["path"].split("/")[0] if source == "installed" else source
            rows.append((origin, split, len(row["text"].encode())))
    table = pd.DataFrame(rows, columns=["origin", "split", "bytes"])
    table = (
        table.groupby(["origin", "split"])
        .bytes.agg(documents="size", megabytes="sum")
        .reset_index()
    )
    return table.assign(megabytes=table.megabytes / 1e6)


def corpus_summary(table: pd.DataFrame) -> pd.DataFrame:
    """`corpus_table` with an origin a row, its documents and megabytes by split, largest first, and
    the total."""
    wide = table.pivot(index="origin", columns="split", values=["documents", "megabytes"]).fillna(0)
    wide = wide.loc[wide["megabytes"].sum(axis=1).sort_values(ascending=False).index]
    wide.loc["total"] = wide.sum()
    wide.columns = [
        f"{split} {'documents' if what == 'documents' else 'MB'}" for what, split in wide.columns
    ]
    return wide.astype({name: int for name in wide.columns if name.endswith("documents")}).round(2)


def fingerprint_note(source: str) -> str:
    """One sentence: is the test split the text that the embedded model was held out from?"""
    if source != "installed":
        return f"{source}: no fingerprint is recorded for this source"
    found, recorded = fingerprint(load_texts(source, "test")), recorded_fingerprint()
    if found == recorded:
        return f"test split {found}: the recorded one"
    return (
        f"warning: test split {found}, recorded {recorded}. Another version of Python or of a package is installed "
        "here: numbers will differ a little. A document that moved or changed may have been trained on"
    )


def training_log(lm: LM) -> pd.DataFrame:
    """The log that `companion.subject.train_lm` wrote beside the weights; no rows for a model that
    has none.

    Columns `step`, `tokens`, `train_loss` (mean since the row before), `lr_factor`, `heldout_loss`;
    nats per token.
    """
    if lm.folder is None or not (lm.folder / "training.csv").exists():
        return pd.DataFrame(columns=list(LOG_COLUMNS), dtype=float)
    return pd.read_csv(lm.folder / "training.csv")


# ---- bytes and bits


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE (GPT-2) writes for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each token id stands for, special tokens none: joined over a text's ids they
    are its bytes.

    Byte-level BPE (GPT-2, Pythia, Llama 3, the embedded model) and SentencePiece with byte fallback
    (Gemma, Llama 2) are read from the vocabulary; the tokens of any other tokenizer are decoded one
    by one.
    """
    n_ids = max(tokenizer.get_vocab().values()) + 1
    words = [
        word or "" for word in tokenizer.convert_ids_to_tokens(range(n_ids))
    ]  # None: an id that was left out
    special = set(tokenizer.all_special_ids)
    alphabet = _byte_alphabet()
    if "<0x0A>" in words:
        in_hex = re.compile("<0x([0-9A-F]{2})>")
        pieces = [
            bytes.fromhex(m[1]) if (m := in_hex.fullmatch(w)) else w.replace("▁", " ").encode()
            for w in words
        ]
    elif alphabet.keys() <= set(words):
        # tokens added later are stored as they read, so characters outside the alphabet stand for
        # themselves
        pieces = [
            bytes(alphabet[c] for c in w) if set(w) <= alphabet.keys() else w.encode()
            for w in words
        ]
    else:
        pieces = [tokenizer.decode([i]).encode() for i in range(len(words))]
    return [b"" if i in special else piece for i, piece in enumerate(pieces)]


def row_bytes(tokens: Tokens, tokenizer: Any) -> list[bytes]:
    """The bytes of each row's predicted tokens, all but the first, which the model is given."""
    table = token_bytes(tokenizer)
    return [b"".join(table[i] for i in row[1:]) for row in tokens.ids.tolist()]


@torch.no_grad()
def token_losses(lm: LM, ids: torch.Tensor, batch_rows: int | None = None) -> torch.Tensor:
    """Cross-entropy of every token but the first given those before it, in nats; ids [n_rows, T] →
    [n_rows, T − 1].

    batch_rows: rows at once; by default as many as :meth:`LM.rows_at_once` says.
    """
    batch_rows = batch_rows or lm.rows_at_once(ids.shape[1])
    losses = []
    for rows in tqdm(ids.split(batch_rows), desc="scoring text", unit="batch", mininterval=2):
        rows = rows.to(lm.device)
        logits = lm.model(rows, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def splits(
    lm: LM,
    source: str,
    context_size: int,
    test_rows: int,
    train_rows: int,
    characters: int = 40_000,
    seed: int = 0,
) -> tuple[Tokens, Tokens]:
    """Rows of the test split to score, and rows of the training split for the n-grams and to prime
    xz.

    The test rows are the first `characters` of each document without a gap, because a compressor
    lives on what it read just before; the limit keeps one long document from ruling the intervals.
    The training rows are a few of each of many documents.
    """
    texts = load_texts(source, "test").shuffle(seed=seed)
    beginnings = ({"text": row["text"][:characters]} for row in texts)
    test = tokenize(beginnings, lm.tokenizer, context_size, test_rows)
    train = tokenize(
        load_texts(source, "train"),
        lm.tokenizer,
        context_size,
        train_rows,
        rows_per_document=16,
        seed=seed,
    )
    return test, train


# ---- comparison


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


COMPRESSORS: dict[str, Callable[[bytes], int]] = {
    "xz -9e": _xz,
    "bz2 -9": lambda data: len(bz2.compress(data, 9)),
    "zlib -9": lambda data: len(zlib.compress(data, 9)),
}


def document_groups(document: torch.Tensor, groups: int = 12) -> np.ndarray:
    """Group number of every row: whole documents, in order, about equally many documents a group.

    Raises ValueError for fewer than three documents, from which no interval can be had.
    """
    names, rank = np.unique(document.numpy(), return_inverse=True)
    if len(names) < 3:
        raise ValueError(
            f"expected rows of at least 3 documents, got {len(names)}: lower rows_per_document or read more rows"
        )
    return rank * min(groups, len(names)) // len(names)


def _size_rates(size: Callable[[bytes], int], rows: list[bytes], group: np.ndarray) -> np.ndarray:
    """Bits per byte of a compressor on the joined rows, then without each group."""

    def rate(without: int) -> float:
        data = b"".join(row for row, g in zip(rows, group, strict=True) if g != without)
        return 8 * size(data) / len(data)

    with ThreadPoolExecutor(
        max_workers=max(1, torch.get_num_threads())
    ) as pool:  # the coders release the lock
        return np.array(list(pool.map(rate, range(-1, group.max() + 1))))


def _bit_rates(bits: np.ndarray, rows: list[bytes], group: np.ndarray) -> np.ndarray:
    """The same from the bits of each row."""
    size = np.array([len(row) for row in rows])
    kept = [group != g for g in range(-1, group.max() + 1)]
    return np.array([bits[keep].sum() / size[keep].sum() for keep in kept])


def _flat(rows: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"".join(rows), np.uint8), np.repeat(
        np.arange(len(rows)), [len(row) for row in rows]
    )


def _byte_ngram_bits(test: list[bytes], train: list[bytes], order: int) -> np.ndarray:
    symbols, row = _flat(test)
    bits = NGram(*_flat(train), vocab_size=256, order=order).bits(symbols, row)
    return np.bincount(row, bits, minlength=len(test))


def _token_ngram_bits(
    test: torch.Tensor, train: torch.Tensor, vocab_size: int, order: int
) -> np.ndarray:
    def flat(ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return ids.flatten().numpy(), np.repeat(np.arange(len(ids)), ids.shape[1])

    bits = (
        NGram(*flat(train), vocab_size=vocab_size, order=order)
        .bits(*flat(test))
        .reshape(test.shape)
    )
    return bits[:, 1:].sum(1)  # the first token is given to the model too


def bits_per_byte(
    lm: LM,
    test: Tokens,
    train: Tokens,
    order: int = 5,
    prime_bytes: int = 2_000_000,
    ngram_bytes: int = 4_000_000,
    groups: int = 12,
) -> pd.DataFrame:
    """Bits per byte of the model and of each baseline on the bytes of `test`, lowest last.

    Columns: `method`, `kind` ("language model", "n-gram", "compressor"), `bits_per_byte` with its
    95 % interval `low`, `high`, and `difference` = the method minus the language model, paired by
    document, with `difference_low`, `difference_high`. xz is also measured with `prime_bytes` of
    training text before the test text, whose own size is then taken off. The n-grams are trained on
    `train`, the byte-level one on its first `ngram_bytes`.
    """
    rows, train_rows = row_bytes(test, lm.tokenizer), row_bytes(train, lm.tokenizer)
    group = document_groups(test.document, groups)
    prime = b"".join(train_rows)[:prime_bytes]
    primed = _xz(prime)
    vocab_size = max(lm.config.vocab_size, len(lm.tokenizer))
    ngram_rows = train_rows[
        : int(np.searchsorted(np.cumsum([len(row) for row in train_rows]), ngram_bytes)) + 1
    ]
    nats = token_losses(lm, test.ids).double().sum(1).numpy()

    of_tokens = _token_ngram_bits(test.ids, train.ids, vocab_size, order)
    of_bytes = _byte_ngram_bits(rows, ngram_rows, order)

    rates = {("language model", lm.name): _bit_rates(nats / math.log(2), rows, group)}
    rates["n-gram", f"{order}-gram of tokens"] = _bit_rates(of_tokens, rows, group)
    rates["n-gram", f"{order}-gram of bytes"] = _bit_rates(of_bytes, rows, group)
    for name, size in COMPRESSORS.items():
        rates["compressor", name] = _size_rates(size, rows, group)
    rates["compressor", "xz -9e, primed"] = _size_rates(
        lambda data: _xz(prime + data) - primed, rows, group
    )

    ours = rates["language model", lm.name]
    spread = [
        (name, kind, jackknife(rate), jackknife(rate - ours))
        for (kind, name), rate in rates.items()
    ]
    table = [
        (name, kind, x.mean, x.low, x.high, d.mean, d.low, d.high) for name, kind, x, d in spread
    ]
    columns = [
        "method",
        "kind",
        "bits_per_byte",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
    ]
    return pd.DataFrame(table, columns=columns).sort_values(
        "bits_per_byte", ascending=False, ignore_index=True
    )


# ---- behaviour


@torch.no_grad()
def samples(
    lm: LM,
    prompts: tuple[str, ...] = PROMPTS,
    new_tokens: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[str]:
    """Each prompt with a sampled continuation; the global random state is left as it was.
    Temperature 0 is greedy."""
    texts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = lm.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(
                lm.device
            )
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0}
                if temperature > 0
                else {"do_sample": False}
            )
            pad = (
                lm.tokenizer.pad_token_id
                if lm.tokenizer.pad_token_id is not None
                else lm.tokenizer.eos_token_id
            )
            ids = lm.model.generate(
                **inputs, max_new_tokens=new_tokens, pad_token_id=pad, **sampling
            )
            texts.append(lm.tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def repeated_rows(lm: LM, n_rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Rows `<bos> r r`, r of `length` random ordinary tokens; shape [n_rows, 1 + 2·length]."""
    special = set(lm.tokenizer.all_special_ids)
    usable = torch.tensor(
        [i for i, piece in enumerate(token_bytes(lm.tokenizer)) if piece and i not in special]
    )
    r = usable[
        torch.randint(len(usable), (n_rows, length), generator=torch.Generator().manual_seed(seed))
    ]
    begin = (
        lm.tokenizer.bos_token_id
        if lm.tokenizer.bos_token_id is not None
        else lm.tokenizer.eos_token_id
    )
    return torch.cat([torch.full((n_rows, 1), begin), r, r], dim=1)


def repeated_losses(lm: LM, n_rows: int = 64, length: int = 100, seed: int = 0) -> pd.DataFrame:
    """Loss at every position of `repeated_rows`, nats per token: columns `row`, `position` (1
    follows BOS), `loss`."""
    losses = token_losses(lm, repeated_rows(lm, n_rows, length, seed)).numpy()
    row, position = np.indices(losses.shape)
    return pd.DataFrame(
        {"row": row.ravel(), "position": position.ravel() + 1, "loss": losses.ravel().astype(float)}
    )


def induction(losses: pd.DataFrame) -> pd.DataFrame:
    """Loss along random sequences that come twice; a model that copies predicts the second time
    better.

    losses: from `repeated_losses`. Columns: `position`, `copy` (1 or 2), `loss` in nats per token,
    mean over rows, and its 95 % interval `low`, `high`. Source: Olsson et al. 2022, arXiv
    2209.11895.
    """
    spread = [
        (position, mean_interval(rows.tolist()))
        for position, rows in losses.groupby("position").loss
    ]
    rows = [(position, x.mean, x.low, x.high) for position, x in spread]
    table = pd.DataFrame(rows, columns=["position", "loss", "low", "high"])
    return table.assign(copy=np.where(table.position <= len(table) // 2, 1, 2))


def induction_fall(losses: pd.DataFrame) -> tuple[Interval, Interval, Interval]:
    """Mean loss of the first copy, of the second, and the fall between them, paired by row; 95 %
    intervals over rows."""
    second = losses.position > losses.position.max() // 2
    copies = losses.groupby(["row", second]).loss.mean().unstack()
    return tuple(
        mean_interval(x.tolist())
        for x in (copies[False], copies[True], copies[False] - copies[True])
    )


# ---- the three sites


def _attention_parts(lm: LM, layer: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """What attn_out goes through on its way to the residual stream: the output projection, and
    Gemma 2's norm."""
    modules = dict(lm.model.named_modules())
    layout = next(layout for layout in LAYOUTS.values() if layout.blocks in modules)
    block = modules[f"{layout.blocks}.{layer}"]
    after = (
        block.post_attention_layernorm
        if hasattr(block, "post_feedforward_layernorm")
        else torch.nn.Identity()
    )
    return block.get_submodule(layout.projection), after


@torch.no_grad()
def residual_identity(lm: LM, ids: torch.Tensor) -> pd.DataFrame:
    """The sites add up: resid_post(L) − resid_post(L − 1) = attention's contribution + mlp_out(L).

    ids: [n_rows, T]; all layers are held at once, and a few rows are enough. Columns `layer`, from
    1 on; `error`, the norm of what is left over relative to the left side's; `rounding`, what one
    rounding of resid_post(L) can make of it.
    """
    found = capture(lm, [(site, layer) for layer in range(lm.n_layers) for site in SITES], ids)
    rows = []
    for layer in range(1, lm.n_layers):
        project, norm = _attention_parts(lm, layer)
        update = found["resid_post", layer].double() - found["resid_post", layer - 1].double()
        left = (
            update
            - norm(project(found["attn_out", layer])).double()
            - found["mlp_out", layer].double()
        )
        rounding = torch.finfo(lm.dtype).eps * found["resid_post", layer].double().norm()
        rows.append(
            (layer, (left.norm() / update.norm()).item(), (rounding / update.norm()).item())
        )
    return pd.DataFrame(rows, columns=["layer", "error", "rounding"])


def site_statistics(lm: LM, tokens: Tokens, batch_rows: int = 4) -> pd.DataFrame:
    """Scale of the activations, a row a site and layer; special positions count in `first_ratio`
    alone.

    Columns: `site`, `layer`, `mean_square` = E‖x‖², `mean_share` = ‖E x‖²/E‖x‖², the part that is
    the same for every token, and `first_ratio`: root mean square norm at the first position of the
    rows over that at the ordinary ones, far above 1 where the model parks its attention (attention
    sinks; Xiao et al. 2023, arXiv 2309.17453).
    """
    keys = [(site, layer) for site in SITES for layer in range(lm.n_layers)]
    sums: dict[tuple[str, int], list[Any]] = {key: [0.0, 0.0, 0.0] for key in keys}
    special = torch.tensor(lm.special_ids)
    n_ordinary = 0
    for rows in tqdm(
        tokens.ids.split(batch_rows), desc="measuring sites", unit="batch", mininterval=2
    ):
        ordinary = ~torch.isin(rows, special)
        n_ordinary += int(ordinary.sum())
        for key, value in capture(lm, keys, rows).items():
            x = value[ordinary.to(value.device)].double()
            sums[key][0] += x.sum(0)
            sums[key][1] += x.square().sum().item()
            sums[key][2] += value[:, 0].double().square().sum().item()
    table = []
    for (site, layer), (total, square, first) in sums.items():
        mean_square = square / n_ordinary
        share = (total / n_ordinary).square().sum().item() / mean_square
        table.append(
            (site, layer, mean_square, share, math.sqrt(first / len(tokens) / mean_square))
        )
    return pd.DataFrame(
        table, columns=["site", "layer", "mean_square", "mean_share", "first_ratio"]
    )
