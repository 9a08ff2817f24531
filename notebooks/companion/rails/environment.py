"""Environment variables of the processes that we start: kernels and workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jumprelu.threads import PASSIVE_WAITING

DEFAULT_THREADS = 2

WORKER = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", **PASSIVE_WAITING}
"""Of a worker process of a sweep, which computes with one thread."""


def kernel_environment(threads: int = DEFAULT_THREADS) -> dict[str, str | None]:
    """Environment of a notebook's kernel, in `make reproduce` and under nbval; None: not set."""
    return {
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not of the user's home
        "TQDM_DISABLE": "1",  # progress bars would be stored as output
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, which shows the path of a file
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),  # sums depend on it
        **PASSIVE_WAITING,
        "MPLBACKEND": None,  # Agg would show no figures
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a warning of the debugger
    }


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set or, for None, unset environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in values}
    set_variables(values)
    try:
        yield
    finally:
        set_variables(before)


def set_variables(values: Mapping[str, str | None]) -> None:
    """Set or, for None, unset environment variables of this process."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
