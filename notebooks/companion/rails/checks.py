"""Run committed notebooks again and compare every output with the committed one (nbval): all of
them, or as many as end in minutes.

`make test` takes those whose results are in the cache, which is quick, and one from nothing, so
that a fresh clone tests one, too. `make test-notebooks` takes all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from jumprelu.files import cache_root, read_json

from .figures import ROOT
from .profiles import DEFAULT_PROFILE, Notebook, check_profile, find_notebooks
from .running import processor, up_to_date

FROM_NOTHING = "01"
"""The notebook that is always run: the cheapest one that needs no results of another. It harvests,
trains and evaluates."""
CELL_SECONDS = 900
"""A cell that takes longer has failed."""


class Choice(NamedTuple):
    """Which notebooks are run by `make test`."""

    at_hand: list[Notebook]
    """Their results are in the cache."""
    from_nothing: list[Notebook]
    left_out: list[Notebook]


def choose(notebooks: Sequence[Notebook], current: set[Notebook]) -> Choice:
    """Divide the notebooks, of which `current` are up to date; where there is none with the number
    `FROM_NOTHING`, the first is run in its place."""
    numbered = [notebook for notebook in notebooks if notebook.number == FROM_NOTHING]
    from_nothing = numbered or list(notebooks[:1])
    others = [notebook for notebook in notebooks if notebook not in from_nothing]
    return Choice(
        [notebook for notebook in others if notebook in current],
        from_nothing,
        [notebook for notebook in others if notebook not in current],
    )


def of_this_processor(root: Path, notebook: Notebook) -> bool:
    """Whether the committed outputs were made on a processor of this kind, so that they must come
    out the same to the last digit."""
    path = root / f"figures/{notebook.name}.manifest.json"
    made_on = read_json(path).get("processor") if path.exists() else None
    return made_on in (None, processor())


def nbval_command(root: Path, notebooks: Sequence[Notebook], compare: bool) -> list[str]:
    """The command that runs notebooks under nbval; compare: all outputs, or else only those of
    cells tagged nbval-check-output."""
    return [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        "--nbval" if compare else "--nbval-lax",
        *("--nbval-current-env", f"--nbval-cell-timeout={CELL_SECONDS}"),
        *("--nbval-sanitize-with", str(root / "tests/nbval_sanitize.cfg")),
        *(str(notebook.source.with_suffix(".ipynb")) for notebook in notebooks),
    ]


def run_nbval(root: Path, notebooks: Sequence[Notebook], cache: Path | None = None) -> bool:
    """Run notebooks under nbval, with another cache than this process's if one is given; True if
    all cells ran and all outputs are the committed ones. Outputs that were made on another kind of
    processor, on which the last digits differ, are not compared, and it says so."""
    changed = {} if cache is None else {"JUMPRELU_CACHE": str(cache)}
    ours = [notebook for notebook in notebooks if of_this_processor(root, notebook)]
    others = [notebook for notebook in notebooks if notebook not in ours]
    if others:
        names = ", ".join(notebook.name for notebook in others)
        print(f"run, but not compared, on {processor()}: {names}", flush=True)
    succeeded = True
    for some, compare in ((ours, True), (others, False)):
        if some:
            command = nbval_command(root, some, compare)
            done = subprocess.run(command, cwd=root, env=os.environ | changed)
            succeeded = succeeded and done.returncode == 0
    return succeeded


def run_all(root: Path, notebooks: Sequence[Notebook], seconds: float) -> bool:
    """Run notebooks under nbval one by one, and begin none after `seconds`; what is left out then
    is printed. True if all outputs of those that ran are the committed ones."""
    began, succeeded = time.monotonic(), True
    for number, notebook in enumerate(notebooks):
        if time.monotonic() - began > seconds:
            left = ", ".join(each.name for each in notebooks[number:])
            print(f"out of time ({seconds / 60:g} minutes), notebooks left out: {left}", flush=True)
            break
        succeeded = run_nbval(root, [notebook]) and succeeded
    return succeeded


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit status: 0, or 1 if an output differs or a cell fails."""
    purpose = "Run committed notebooks and compare their outputs."
    parser = argparse.ArgumentParser(prog="python -m companion.rails.checks", description=purpose)
    parser.add_argument("--all", action="store_true", help="all notebooks, one after the other")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="with --all: begin no further notebook after so long, and say which are left out",
    )
    given = parser.parse_args(arguments)
    notebooks = find_notebooks(root)
    if given.all:
        return 0 if run_all(root, notebooks, 60 * given.minutes) else 1
    changed = check_profile(root, DEFAULT_PROFILE)
    current = {
        notebook
        for notebook in notebooks
        if up_to_date(root, notebook, DEFAULT_PROFILE, changed[notebook.number])
    }
    choice = choose(notebooks, current)
    for title, some in zip(("at hand", "from nothing", "left out"), choice, strict=True):
        print(f"notebooks {title}: {', '.join(each.name for each in some) or 'none'}", flush=True)
    if choice.left_out:
        print("(`make reproduce` brings their results; `make test-notebooks` runs all)", flush=True)
    succeeded = True
    if choice.at_hand:
        succeeded = run_nbval(root, choice.at_hand)
    with ExitStack() as stack:
        cache = None
        if any((cache_root() / "results").glob("*")):  # else this cache is as good as a new one
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jumprelu-")))
        succeeded = run_nbval(root, choice.from_nothing, cache) and succeeded
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
