"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, waiting: str = "") -> Iterator[None]:
    """For the time of a block, other processes that ask for the folder wait; `waiting` is logged by
    one that has to."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s", waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back, also when the process is killed
