"""Files: written whole or not at all, by one process at a time, and hashed by content.

Everything this package puts on disk goes through :func:`writing`, so a killed process leaves
either the old file or the new one, never half of one. A folder of many files is written under
:func:`locked`.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

SUBJECT = Path(__file__).with_name("subject")
"""The shipped language model: weights, tokenizer, the log of its training."""

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Folder for everything that can be made again: `$JUMPRELU_CACHE`, or `.cache` in a checkout,
    or `~/.cache/jumprelu` where the package is installed without its repository."""
    if "JUMPRELU_CACHE" in os.environ:
        return Path(os.environ["JUMPRELU_CACHE"])
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").exists():
        return checkout / ".cache"
    return Path.home() / ".cache/jumprelu"


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success flush it to disk and rename it to
    `path`.

    Raises OSError naming `path` when the disk is full or not writable; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600
        os.replace(temporary, path)
    except OSError as error:
        why = f"could not write {path}: {error.strerror or error}; the old file, if any, is "
        why += "untouched. Free some disk space or choose another folder"
        raise OSError(error.errno, why) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def locked(folder: str | Path, waiting: str = "") -> Iterator[None]:
    """Within it, every other process that asks for `folder` waits; makes the folder if need be.

    waiting: what is being waited for, logged once as a warning by a process that has to wait. The
    lock is `.lock` in the folder and is given back when its process ends, however it ends. On
    systems without `fcntl` (Windows) there is no lock.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = waiting or f"another process is writing to {folder}: waiting until it is done"
            log.warning("%s (an interrupt stops the wait and harms nothing)", reason)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: str | Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        why = "It was cut off or edited: delete it and write it again"
        raise ValueError(f"{path} is not valid JSON ({error}). {why}") from error


def write_tensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    with writing(path) as temporary:
        try:
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(plain, temporary, metadata)
        except SafetensorError as error:  # of its own kind even where the disk is full
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """Short hex digest (16 digits) of plain values: strings, numbers, lists, dicts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensor_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Short hex digest of named tensors: names, shapes, types and bytes."""
    seen = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        seen.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()[:16]
