"""Text, its splits, and its tokens.

Notable here:
- the default corpus is text that every installation has: the sources, docstrings and documents of
  the standard library and of the packages that the lock pins. No download, no account.
- documents are deduplicated by content and split *by document*, by a hash of the path, so a
  document's split never depends on which other documents are present.
- a row of tokens is `<bos>` and then consecutive tokens of one document. Rows are always full, so
  there is no padding, and each row knows its document: standard errors are clustered by it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .files import SUBJECT, cache_root, digest, read_json
from .lm import hub_access

if TYPE_CHECKING:
    import datasets

PACKAGES = (
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "scipy",
    "numpy",
    "matplotlib",
    "networkx",
    "fonttools",
    "huggingface_hub",
    "mpmath",
    "Pygments",
    "datasets",
    "ipython",
    "tornado",
    "pydantic",
    "pytest",
    "prompt_toolkit",
    "rich",
    "pillow",
    "fsspec",
    "jupyter_server",
    "coverage",
    "anyio",
    "Jinja2",
)
"""Distributions whose text is the default corpus, beside the standard library."""

SUFFIXES = (".py", ".rst", ".md")
SPLITS = {"test": 3, "validation": 2, "train": 95}  # percent of documents


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


def as_tokens(tokens: Tokens | torch.Tensor) -> Tokens:
    """A plain tensor of ids, shape [n_rows, context_size], becomes `Tokens` with one document a
    row.

    Raises ValueError unless the tensor has two dimensions and an integer type.
    """
    if isinstance(tokens, Tokens):
        return tokens
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        given = (
            f"{tuple(tokens.shape)} of {tokens.dtype}"
            if isinstance(tokens, torch.Tensor)
            else type(tokens).__name__
        )
        raise ValueError(
            f"tokens must be integer ids of shape [n_rows, context_size], got {given}. "
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


def installed_files() -> list[tuple[str, str]]:
    """(name, path) of every candidate document: `name` is independent of where Python is
    installed."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib2to3",
        "idlelib",
        "idle_test",
    }
    found = [
        ("stdlib/" + path.relative_to(stdlib).as_posix(), str(path))
        for path in stdlib.rglob("*")
        if path.suffix in SUFFIXES and not skip.intersection(path.relative_to(stdlib).parts)
    ]
    for package in PACKAGES:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            warnings.warn(
                f"the corpus lacks {package}: it is not installed; `make setup` installs the lock",
                stacklevel=2,
            )
            continue
        found += [
            (f"{package}/{f.as_posix()}", str(f.locate())) for f in files if f.suffix in SUFFIXES
        ]
    return sorted(found)


def _read_installed(files: tuple[tuple[str, str], ...]) -> Iterator[dict[str, str]]:
    seen: set[bytes] = set()
    for name, path in files:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        content = hashlib.sha256(text.encode()).digest()
        if (
            1_000 <= len(text) <= 200_000
            and len(text.encode()) < 1.1 * len(text)
            and content not in seen
        ):
            seen.add(content)
            yield {"path": name, "text": text, "split": split_of(name)}


def installed_texts(split: str) -> datasets.Dataset:
    """The default corpus: columns `path`, `text`, `split`; the documents of one split, in order of
    path.

    Documents of 1,000 to 200,000 characters, nearly all ASCII, each content once (the first path
    keeps it).
    """
    import datasets

    files = installed_files()
    folder = cache_root() / "datasets"
    stats = [os.stat(path) for _, path in files if os.path.exists(path)]
    key = digest(
        [name for name, _ in files], [(stat.st_size, stat.st_mtime_ns) for stat in stats], SPLITS
    )
    whole = datasets.Dataset.from_generator(
        _read_installed,
        gen_kwargs={"files": tuple(files)},
        cache_dir=str(folder),
        fingerprint=f"installed-{key}",
    )  # given as a list, the files would be shards, and duplicates across them missed
    rows = [i for i, row_split in enumerate(whole["split"]) if row_split == split]
    return whole.select(rows)


def fingerprint(texts: datasets.Dataset) -> str:
    """Digest of a dataset's paths and contents; the same text gives the same digest on every
    machine."""
    seen = hashlib.sha256()
    for row in texts:
        seen.update(hashlib.sha256((row["path"] + "\0" + row["text"]).encode()).digest())
    return seen.hexdigest()[:16]


def recorded_fingerprint() -> str:
    """Fingerprint of the test split of the corpus that the embedded model was trained beside."""
    return read_json(SUBJECT / "training.json")["corpus"]


def load_texts(
    source: str = "installed", split: str = "train"
) -> datasets.Dataset | datasets.IterableDataset:
    """Documents with a `text` and a `path` column.

    source: "installed" (the default corpus); a JSONL, Parquet or text file or a folder of them; or
    the id of a dataset on the Hugging Face hub, which is streamed. Local and hub sources without
    the split asked for are divided by a hash of the document's content, like the default corpus is
    by its path.

    Raises FileNotFoundError for a path that does not exist, ValueError for a source without a text
    column, ConnectionError or PermissionError (with what to do) for a hub dataset that cannot be
    reached.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if source == "installed":
        return installed_texts(split)
    path = Path(source).expanduser()
    if path.exists():
        return _divide(_local_texts(path), split)
    if (
        path.is_absolute()
        or source.startswith(".")
        or path.suffix in {".jsonl", ".parquet", ".txt", ".json"}
    ):
        raise FileNotFoundError(
            f"no such file or folder: {source}. Expected text, JSONL or Parquet, or a hub "
            "dataset's id"
        )
    import datasets

    with hub_access(source, kind="dataset"):
        available = datasets.get_dataset_split_names(source)
        hub_split = split if split in available else "train"
        texts = datasets.load_dataset(source, split=hub_split, streaming=True)
        return (
            _with_paths(texts) if hub_split == split and split != "train" else _divide(texts, split)
        )


def _local_texts(path: Path) -> datasets.IterableDataset:
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    found = path.rglob("*") if path.is_dir() else [path]
    # an empty file has no columns, and a hidden one is no document
    files = sorted(
        str(f) for f in found if f.is_file() and f.stat().st_size > 0 and not f.name.startswith(".")
    )
    by_kind: dict[str, list[str]] = {}
    for file in files:
        by_kind.setdefault(kinds.get(Path(file).suffix, "text"), []).append(file)
    if len(by_kind) != 1:
        held = sorted(by_kind) or "no files with content"
        raise ValueError(f"{path} holds {held}: expected files of one kind, text, JSONL or Parquet")
    kind, files = by_kind.popitem()
    import datasets

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


def _reading(texts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same documents; what breaks while a hub dataset is streamed is said as by
    :func:`jumprelu.lm.hub_access`."""
    loaded = sys.modules.get("datasets")  # whoever holds such a dataset has loaded it
    if loaded is None or not isinstance(texts, loaded.IterableDataset):
        yield from texts
        return
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
    if "datasets" in sys.modules and isinstance(texts, sys.modules["datasets"].Dataset):
        texts = texts.shuffle(seed=seed)
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    width = context_size - len(begin)
    rows: list[list[int]] = []
    document: list[int] = []
    progress = tqdm(total=max_rows, desc="tokenizing", unit="row", mininterval=2)
    for number, row in enumerate(_reading(texts)):
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
