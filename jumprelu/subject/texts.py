"""The texts that the embedded language model was trained on, which every installation has: sources,
docstrings and documents of the standard library and of the packages that the lock pins. No
download, no account.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import cache_root, digest

if TYPE_CHECKING:
    import datasets

PACKAGES = (
    "torch transformers sympy pandas scipy numpy matplotlib networkx fonttools huggingface_hub "
    "mpmath Pygments datasets ipython tornado pydantic pytest prompt_toolkit rich pillow fsspec "
    "jupyter_server coverage anyio Jinja2"
)
"""Distributions whose text is taken, beside the standard library."""

SUFFIXES = (".py", ".rst", ".md")
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib"}
"""Folders of the standard library."""


def installed_files() -> list[tuple[str, str]]:
    """(name, path) of every candidate document: `name` is independent of where Python is
    installed."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = [
        ("stdlib/" + path.relative_to(stdlib).as_posix(), str(path))
        for path in stdlib.rglob("*")
        if path.suffix in SUFFIXES and not SKIPPED.intersection(path.relative_to(stdlib).parts)
    ]
    for package in PACKAGES.split():
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
            data = Path(path).read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        content = hashlib.sha256(data).digest()
        usual = 1_000 <= len(text) <= 200_000 and len(data) < 1.1 * len(text)
        if usual and content not in seen:
            seen.add(content)
            yield {"path": name, "text": text}


def installed_texts() -> datasets.Dataset:
    """Columns `path`, `text`; documents of 1,000 to 200,000 characters in order of path, nearly all
    ASCII, each content once (the first path keeps it)."""
    import datasets

    files = installed_files()
    stats = [os.stat(path) for _, path in files if os.path.exists(path)]
    key = digest([name for name, _ in files], [(stat.st_size, stat.st_mtime_ns) for stat in stats])
    return datasets.Dataset.from_generator(
        _read_installed,
        gen_kwargs={"files": tuple(files)},  # as a list, the files would be shards, and duplicates
        cache_dir=str(cache_root() / "datasets"),  # across them missed
        fingerprint=f"installed-{key}",
    )
