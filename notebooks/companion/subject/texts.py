"""The corpus: what it is made of, and the rows of tokens that notebook 00 scores."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import datasets
import pandas as pd

from jumprelu.corpus import SPLITS, Tokens, load_texts, tokenize
from jumprelu.files import SUBJECT, read_json
from jumprelu.lm import LM


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


def fingerprint(texts: Iterable[dict[str, Any]]) -> str:
    """Digest of paths and contents; the same text gives the same digest on every machine."""
    seen = hashlib.sha256()
    for row in texts:
        seen.update(hashlib.sha256((row["path"] + "\0" + row["text"]).encode()).digest())
    return seen.hexdigest()[:16]


def recorded_fingerprint() -> str:
    """Fingerprint of the test split of the corpus that the embedded model was trained beside."""
    return read_json(SUBJECT / "training.json")["corpus"]


def fingerprint_note(source: str) -> str:
    """One sentence: is the test split the text that the embedded model was held out from?"""
    if source != "installed":
        return f"{source}: no fingerprint is recorded for this source"
    found, recorded = fingerprint(load_texts(source, "test")), recorded_fingerprint()
    if found == recorded:
        return f"test split {found}: the recorded one"
    return (
        f"warning: test split {found}, recorded {recorded}. Another version of Python or of a "
        "package is installed "
        "here: numbers will differ a little. A document that moved or changed may have been "
        "trained on"
    )


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
