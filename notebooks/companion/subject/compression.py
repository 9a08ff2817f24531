"""What the subject model knows about text, next to things that know less: bits per byte.

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
import lzma
import math
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch

from jumprelu.corpus import Tokens
from jumprelu.lm import LM

from ..rails.lm_loss import token_losses
from ..rails.repeats import jackknife
from .ngram import NGram

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
    # None is an id that was left out.
    words = [word or "" for word in tokenizer.convert_ids_to_tokens(range(n_ids))]
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
            f"expected rows of at least 3 documents, got {len(names)}: lower rows_per_document or "
            "read more rows"
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
