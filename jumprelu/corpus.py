"""Text, its splits, and its tokens.

Notable here:
- documents are split by a hash of the path (the default corpus) or of the content, so a document's
  split never depends on which other documents are present.
- a row of tokens is `<bos>` and then consecutive tokens of one document. Rows are always full, so
  there is no padding, and each row knows its document: standard errors are clustered by it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .hub_access import hub_access

if TYPE_CHECKING:
    import datasets

SPLITS = {"test": 3, "validation": 2, "train": 95}
"""Percent of documents."""
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
"""Suffix of a file → the builder of datasets that reads it; other files are read as text, too."""


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, each from one document; `tokens[:100]` takes rows."""

    ids: torch.Tensor
    """LongTensor, shape [n_rows, context_size]."""
    document: torch.Tensor
    """LongTensor, shape [n_rows]: the document of each row; standard errors are clustered by it."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | torch.Tensor) -> Tokens:
        return Tokens(self.ids[rows], self.document[rows])


def described(value: Any) -> str:
    """Shape and type of a tensor, the class of anything else: for errors."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return type(value).__name__


def as_tokens(tokens: Tokens | torch.Tensor) -> Tokens:
    """A plain tensor of ids, shape [n_rows, context_size], becomes `Tokens` with one document a
    row.

    Raises ValueError unless the tensor has two dimensions, an integer type, and an element.
    """
    if isinstance(tokens, Tokens):
        return tokens
    is_tensor = isinstance(tokens, torch.Tensor)
    if not is_tensor or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError(
            f"tokens must be integer ids of shape [n_rows, context_size], got {described(tokens)}. "
            "Make them with jumprelu.tokenize(texts, tokenizer) or torch.tensor([[...], ...])"
        )
    return Tokens(tokens.long(), torch.arange(len(tokens)))


# ---- text


def split_of(path: str) -> str:
    """Split of a document, from a hash of its path alone: 'train', 'validation' or 'test'."""
    bucket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100
    for split, percent in SPLITS.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("the percentages of SPLITS add up to 100")


def load_texts(
    source: str = "installed", split: str = "train"
) -> datasets.Dataset | datasets.IterableDataset:
    """Documents with a `text` and a `path` column.

    source: "installed" (the default corpus, jumprelu/subject/texts.py); a JSONL, Parquet or text
    file or a folder of them; or the id of a dataset on the Hugging Face hub, which is streamed.
    Local and hub sources without the split asked for are divided by a hash of the document's
    content.

    Raises FileNotFoundError for a path that does not exist, ValueError for a source without a text
    column, ConnectionError or PermissionError (with what to do) for a hub dataset that cannot be
    reached.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if source == "installed":
        from .subject.texts import installed_texts

        texts = installed_texts()
        return texts.select([i for i, p in enumerate(texts["path"]) if split_of(p) == split])
    path = Path(source).expanduser()
    if path.exists():
        return _divide(_local_texts(path), split)
    if path.is_absolute() or source.startswith(".") or path.suffix in KINDS:
        raise FileNotFoundError(
            f"no such file or folder: {source}. Expected text, JSONL or Parquet, or a hub "
            "dataset's id"
        )
    import datasets

    with hub_access(source, kind="dataset"):
        own = split != "train" and split in datasets.get_dataset_split_names(source)
        hub_split = split if own else "train"
        texts = datasets.load_dataset(source, split=hub_split, streaming=True)
        return _with_paths(texts) if own else _divide(texts, split)


def _local_texts(path: Path) -> datasets.IterableDataset:
    import datasets

    found = path.rglob("*") if path.is_dir() else [path]
    by_kind: dict[str, list[str]] = {}
    for file in sorted(found, key=str):
        # an empty file has no columns, and a hidden one is no document
        if file.is_file() and file.stat().st_size > 0 and not file.name.startswith("."):
            by_kind.setdefault(KINDS.get(file.suffix, "text"), []).append(str(file))
    if len(by_kind) != 1:
        held = sorted(by_kind) or "no files with content"
        raise ValueError(f"{path} holds {held}: expected files of one kind, text, JSONL or Parquet")
    ((kind, files),) = by_kind.items()
    options = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


def _with_paths(texts: datasets.IterableDataset) -> datasets.IterableDataset:
    """The same documents with a `path`: a hash of their content."""
    row = next(iter(texts), None)
    if row is None or not isinstance(row.get("text"), str):
        raise ValueError(
            f"expected documents with a `text` column of strings, found columns {sorted(row or [])}"
        )
    return texts.map(lambda row: {"path": hashlib.sha256(row["text"].encode()).hexdigest()[:16]})


def _divide(texts: datasets.IterableDataset, split: str) -> datasets.IterableDataset:
    return _with_paths(texts).filter(lambda row: split_of(row["path"]) == split)


def _streamed(texts: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The same documents, with errors on the way from the hub as :func:`hub_access` has them."""
    with hub_access(texts.info.dataset_name or "the dataset being streamed", kind="dataset"):
        yield from texts


# ---- tokens


def tokenize(
    texts: Iterable[dict[str, Any]],
    tokenizer: Any,
    context_size: int = 256,
    max_rows: int | None = None,
    rows_per_document: int | None = None,
    seed: int = 0,
) -> Tokens:
    """Cut documents into full rows `<bos> t_1 … t_{context_size-1}`; a document's last, short row
    is dropped.

    A dataset that is not streamed is visited in an order that depends on `seed` alone.
    `rows_per_document` keeps a long document from filling a small sample: that many rows, evenly
    spaced, are kept. Special tokens inside the text are read as plain text.

    Raises ValueError if no document fills a row.
    """
    loaded = sys.modules.get("datasets")  # whoever holds a dataset has loaded it
    if loaded and isinstance(texts, loaded.Dataset):
        texts = texts.shuffle(seed=seed)
    elif loaded and isinstance(texts, loaded.IterableDataset):
        texts = _streamed(texts)
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    width = context_size - len(begin)
    rows: list[list[int]] = []
    document: list[int] = []
    progress = tqdm(total=max_rows, desc="tokenizing", unit="row", mininterval=2)
    for number, row in enumerate(texts):
        ids = tokenizer(
            row["text"], add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        cut = [begin + ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
        if rows_per_document is not None:
            kept = min(rows_per_document, len(cut))
            cut = [cut[i * len(cut) // kept] for i in range(kept)]
        rows += cut
        document += [number] * len(cut)
        progress.update(len(cut))
        if max_rows is not None and len(rows) >= max_rows:
            break
    progress.close()
    if not rows:
        raise ValueError(
            f"no document has {width} tokens: choose a context_size below {context_size} or "
            "longer documents"
        )
    return Tokens(torch.tensor(rows[:max_rows]), torch.tensor(document[:max_rows]))
