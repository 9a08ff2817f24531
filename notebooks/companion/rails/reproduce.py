"""Run the notebooks: `make reproduce`, or `python -m companion.rails.reproduce --help`.

Notable here:
- a notebook runs again only if its key changed: its cells, the code of the package that it uses,
  its parameters, the package's data files (the embedded model), the lock, the Python version, the
  threads and the device.
- the executed notebook and its figures are renamed into place together, after the last cell has
  succeeded. A failing cell leaves the tree as it was.
- what is committed is free of times, ids and paths, so that the same machine writes the same bytes
  every time. Seconds and memory go to `timings.json` in the cache and to the closing table.
- the default profile is the notebooks' own parameters. The results of any other profile stay out of
  the tree, in the cache, under `profiles/<name>`, until `make publish PROFILE=<name>` copies them
  to `figures/<name>`.
- after a run of the default profile, the ledger of claims and its table in README are made again
  (`claims.py`).
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import torch
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from jumprelu.files import SUBJECT, cache_root, digest, read_json, sha256, write_json, write_text

from .claims import write_ledger
from .closure import source_closure
from .figures import ROOT
from .profiles import DEFAULT_PROFILE, Notebook, check_profile, find_notebooks

DEFAULT_THREADS = 2
NAMED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "scipy",
    "pandas",
    "sympy",
    "matplotlib",
)
"""Packages whose versions a manifest spells out; the digest of the lock covers the others."""
HEARTBEAT_SECONDS = 30
"""How often a long cell is reported where the output is not a terminal."""

# ---- what a run depends on


def locked_versions(root: Path) -> dict[str, str]:
    """Package → version, from `root/requirements.lock`."""
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def data_files() -> dict[str, str]:
    """Hash of every file of library and companion that is not code: the shipped model, pages, the
    style sheet."""
    hashes = {}
    for folder in (SUBJECT.parent, Path(__file__).parents[1]):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and path.suffix not in {".py", ".pyc"}
        )
        hashes |= {
            f"{folder.name}/{path.relative_to(folder).as_posix()}": sha256(path)[:16]
            for path in files
        }
    return hashes


def measured_files(root: Path, code: str) -> dict[str, str]:
    """Hash of every table of `make benchmark` that a notebook's code reads, by name."""
    paths = [
        root / "figures" / name
        for name in sorted(set(re.findall(r'read_measured\("([\w.]+)"\)', code)))
    ]
    return {path.name: sha256(path)[:16] if path.exists() else "missing" for path in paths}


def cells_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str, list[str]]]:
    """(type, source, tags) of every cell: what makes a notebook the pair of its .py."""
    return [
        (cell.cell_type, cell.source, list(cell.metadata.get("tags", [])))
        for cell in notebook.cells
    ]


def conditions(root: Path, notebook: Notebook, changed: dict[str, Any]) -> dict[str, Any]:
    """All that a run's results may depend on, as plain values. Its digest is the run's key, itself
    its manifest."""
    parameters = {
        name: parameter.default for name, parameter in notebook.parameters().items()
    } | changed
    locked = locked_versions(root)
    trained = SUBJECT / "training.json"
    return {
        "source": digest(cells_of(notebook.read())),
        "code": source_closure(notebook.code()),
        "parameters": parameters,
        "data": data_files(),
        "measured": measured_files(root, notebook.code()),
        "corpus": read_json(trained).get("corpus") if trained.exists() else None,
        "lock": digest(locked),
        "packages": {name: locked[name] for name in NAMED_PACKAGES if name in locked},
        "python": ".".join(platform.python_version_tuple()[:2]),
        "threads": parameters.get("threads", DEFAULT_THREADS),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


# ---- running


def kernel_environment(threads: int = DEFAULT_THREADS) -> dict[str, str | None]:
    """Environment of a kernel, here and under nbval; None: not set."""
    return {
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not of the user's home
        "TQDM_DISABLE": "1",  # progress bars would be stored as output
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, with the path of the environment in it
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),  # sums depend on it
        "MPLBACKEND": None,  # Agg would show no figures
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a warning of the debugger
    }


@contextmanager
def environment(values: dict[str, str | None]) -> Iterator[None]:
    """Set or, for None, unset environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in values}

    def set_all(these: dict[str, str | None]) -> None:
        for name, value in these.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    set_all(values)
    try:
        yield
    finally:
        set_all(before)


class _Monitor(threading.Thread):
    """Says which cell is running, and samples the memory of the kernel and its children."""

    def __init__(self, name: str, n_cells: int, console: Console):
        super().__init__(daemon=True)
        self.name_of_notebook, self.n_cells, self.console = name, n_cells, console
        self.cell, self.peak, self.started = -1, 0, time.monotonic()
        self.finished = threading.Event()
        self.status = console.status(f"{name}: starting") if console.is_terminal else None

    def on_cell_start(self, cell: Any = None, cell_index: int = 0, **_: Any) -> None:
        self.cell = cell_index

    def run(self) -> None:
        said = self.started
        while not self.finished.wait(0.25):
            with suppress(psutil.NoSuchProcess):
                self.peak = max(
                    self.peak,
                    sum(p.memory_info().rss for p in psutil.Process().children(recursive=True)),
                )
            now = time.monotonic()
            line = f"{self.name_of_notebook}: cell {self.cell + 1} of {self.n_cells}, {now - self.started:.0f} s"
            if self.status:
                self.status.update(line)
            elif now - said > HEARTBEAT_SECONDS:
                said = now
                self.console.print(line)

    def __enter__(self) -> _Monitor:
        if self.status:
            self.status.start()
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.finished.set()
        self.join()
        if self.status:
            self.status.stop()


def scrub(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook without times, random ids, or anything that varies from run to run."""
    kept = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    cells = []
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell = nbformat.from_dict(
            {**cell, "metadata": {"tags": tags} if tags else {}, "id": digest(index, cell.source)}
        )
        for output in cell.get("outputs", []):
            output.pop("transient", None)
        cells.append(cell)
    return nbformat.from_dict(
        {"cells": cells, "metadata": kept, "nbformat": 4, "nbformat_minor": 5}
    )


class Failed(Exception):
    """A notebook did not run to its end; the message says where and why."""


def _indented(source: str) -> str:
    return "\n".join("    " + line for line in source.splitlines())


def _explain(error: Exception, node: nbformat.NotebookNode, monitor: _Monitor, kept: Path) -> str:
    """What to tell the reader about a run that ended in `error`; '' for an error that is not the
    notebook's."""
    if isinstance(error, PapermillExecutionError):
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()[-12:]
        parts = [
            f"[{error.exec_count}]:",
            _indented(error.source),
            "\n".join(trace),
            f"The notebook up to there: {kept}",
        ]
        return "in the cell " + "\n\n".join(parts)
    if monitor.cell < 0:
        return f"because the kernel did not start ({type(error).__name__}: {error}). `make setup` installs it"
    if isinstance(error, DeadKernelError):
        source, megabytes = _indented(node.cells[monitor.cell].source), monitor.peak / 2**20
        return (
            "because the kernel died in this cell, as it does when memory runs out (it used "
            f"{megabytes:.0f} MB):\n\n{source}\n\nPROFILE=smoke needs less"
        )
    return ""


def _execute(
    notebook: Notebook,
    changed: dict[str, Any],
    threads: int,
    figures: Path,
    kept: Path,
    console: Console,
) -> tuple[nbformat.NotebookNode, _Monitor]:
    """Run one notebook with papermill; a kernel that fails to start is given a second chance."""
    settings = kernel_environment(threads) | {
        "JUMPRELU_FIGURES": str(figures),
        "JUMPRELU_CACHE": str(cache_root().resolve()),
    }
    for attempt in (1, 2):
        node = notebook.read()
        with environment(settings), _Monitor(notebook.name, len(node.cells), console) as monitor:
            try:
                executed = papermill.execute_notebook(
                    node,
                    str(kept),
                    parameters=changed,
                    kernel_name="python3",
                    cwd=str(notebook.source.parent),
                    progress_bar=False,
                    request_save_on_cell_execute=False,
                    coalesce_streams=True,
                    on_cell_start=monitor.on_cell_start,
                    extra_arguments=["--IPKernelApp.log_level=ERROR"],
                )
                return executed, monitor
            except Exception as error:
                if (
                    monitor.cell < 0 and attempt == 1
                ):  # ports are chosen before they are bound, and may be lost in between
                    console.print(
                        f"{notebook.name}: the kernel did not start ({type(error).__name__}), "
                        "trying once more"
                    )
                    continue
                message = _explain(error, node, monitor, kept)
                if message:
                    raise Failed(message) from error
                raise
    raise AssertionError("the second attempt returns or raises")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    return {
        name: sha256(folder / name) if (folder / name).is_file() else "missing" for name in names
    }


def run_notebook(
    root: Path,
    notebook: Notebook,
    profile: str,
    changed: dict[str, Any],
    force: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a notebook unless it is up to date, and put its results into place.

    Returns {"state": "up to date" or "done", "seconds", "peak_mb", "facts"}. Raises Failed if a
    cell fails or the kernel dies; what an earlier run wrote is then untouched.
    """
    console = console or Console()
    base = root if profile == DEFAULT_PROFILE else cache_root() / "profiles" / profile
    figures = base / "figures"
    given = conditions(root, notebook, changed)
    key = digest(given)
    stamp_file = cache_root() / "stamps" / f"{profile}-{notebook.name}.json"
    stamp = read_json(stamp_file) if stamp_file.exists() else {}
    if (
        not force
        and stamp.get("key") == key
        and stamp["outputs"] == _hashes(base, list(stamp["outputs"]))
    ):
        console.print(f"{notebook.name}: up to date")
        return {**stamp["cost"], "state": "up to date", "facts": _facts(figures, notebook)}
    console.print(f"{notebook.name}: running")
    kept = cache_root() / "failed" / f"{notebook.name}.ipynb"
    kept.parent.mkdir(parents=True, exist_ok=True)
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=base, prefix=".figures-"
    ) as staging:  # on the same disk as where it goes
        executed, monitor = _execute(
            notebook, changed, given["threads"], Path(staging), kept, console
        )
        text = nbformat.writes(scrub(executed)) + "\n"
        write_json(
            Path(staging) / f"{notebook.name}.manifest.json",
            given | _table_hashes(Path(staging), notebook),
        )
        made = _put_into_place(Path(staging), figures, notebook)
    write_text(base / "notebooks" / f"{notebook.name}.ipynb", text)
    kept.unlink(missing_ok=True)
    cost = {
        "seconds": round(time.monotonic() - monitor.started, 1),
        "peak_mb": round(monitor.peak / 2**20),
    }
    outputs = [f"notebooks/{notebook.name}.ipynb", *(f"figures/{name}" for name in made)]
    write_json(stamp_file, {"key": key, "outputs": _hashes(base, outputs), "cost": cost})
    timings = cache_root() / "timings.json"
    write_json(
        timings,
        (read_json(timings) if timings.exists() else {}) | {f"{profile}/{notebook.name}": cost},
    )
    console.print(f"{notebook.name}: done in {cost['seconds']} s")
    return {**cost, "state": "done", "facts": _facts(figures, notebook)}


def results_of(figures: Path, notebook: Notebook) -> list[str]:
    """Names of the files in a figures folder that a notebook made: NN_… and its claims."""
    return sorted(
        path.name
        for path in [
            *figures.glob(f"{notebook.number}_*"),
            *figures.glob(f"claims_{notebook.number}.csv"),
        ]
    )


def _table_hashes(figures: Path, notebook: Notebook) -> dict[str, Any]:
    """What a manifest says of the tables: "figures", by name, and "claims" if the notebook makes
    any."""
    hashes = {
        Path(name).stem: sha256(figures / name)[:16]
        for name in results_of(figures, notebook)
        if name.endswith(".csv")
    }
    claims = hashes.pop(f"claims_{notebook.number}", None)
    return {"figures": hashes} | ({"claims": claims} if claims else {})


def _put_into_place(staging: Path, figures: Path, notebook: Notebook) -> list[str]:
    """Move what is in `staging` to `figures`, in place of all that the notebook had there; returns
    the names."""
    made = sorted(path.name for path in staging.iterdir())
    foreign = sorted(set(made) - set(results_of(staging, notebook)))
    if foreign:
        raise Failed(
            f"because it wrote {foreign[0]}: what it writes must be named {notebook.number}_…, "
            f"after its number (or be its claims_{notebook.number}.csv)"
        )
    figures.mkdir(exist_ok=True, parents=True)
    for old in set(results_of(figures, notebook)) - set(made):
        (figures / old).unlink()  # of a figure that this notebook no longer makes
    for name in made:
        os.replace(staging / name, figures / name)
    return made


def _facts(figures: Path, notebook: Notebook) -> dict[str, Any]:
    path = figures / f"{notebook.number}_facts.json"
    return read_json(path) if path.exists() else {}


def reproduce(
    root: Path,
    profile: str = DEFAULT_PROFILE,
    number: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> bool:
    """Run the notebooks of `root` (all, or one) in a profile and print the tables; True if all
    succeeded.

    Raises ValueError or FileNotFoundError, before anything runs, for a profile or a notebook that
    is not as it should be.
    """
    console = console or Console()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    chosen = find_notebooks(root, number)
    changed = check_profile(root, profile)
    costs = Table("notebook", "state", "seconds", "peak MB", title=f"profile {profile}")
    facts = Table("notebook", "fact", "value")
    succeeded = True
    for notebook in chosen:
        try:
            result = run_notebook(root, notebook, profile, changed[notebook.number], force, console)
        except Failed as error:
            succeeded = False
            console.print(
                f"{notebook.name}: FAILED {error}", markup=False, highlight=False, soft_wrap=True
            )
            costs.add_row(notebook.name, "FAILED", "", "")
            continue
        costs.add_row(
            notebook.name, result["state"], str(result["seconds"]), str(result["peak_mb"])
        )
        for fact, value in result["facts"].items():
            facts.add_row(notebook.number, fact, str(value))
    console.print(costs)
    if facts.row_count:
        console.print(facts)
    if succeeded and profile != DEFAULT_PROFILE:
        console.print(
            f"notebooks and figures of this profile: {cache_root() / 'profiles' / profile}",
            soft_wrap=True,
        )
    if succeeded and profile == DEFAULT_PROFILE:
        _renew_ledger(root, console)
    return succeeded


def _renew_ledger(root: Path, console: Console) -> None:
    if (root / "pyproject.toml").exists():  # a checkout: elsewhere, README is somebody else's
        for path in write_ledger(root, readme=True):
            console.print(f"{path.relative_to(root)}: the claims are written again")


# ---- publishing another profile


def finished(figures: Path, notebook: Notebook) -> dict[str, Any] | None:
    """The manifest of a notebook's results in a figures folder if they are there and as its run
    left them, else None."""
    path = figures / f"{notebook.name}.manifest.json"
    manifest = read_json(path) if path.exists() else {}
    made = _table_hashes(figures, notebook)
    return (
        manifest
        if manifest
        and made == {name: manifest[name] for name in ("figures", "claims") if name in manifest}
        else None
    )


def publish(
    root: Path, profile: str, number: str | None = None, console: Console | None = None
) -> None:
    """Copy a profile's finished results from the cache to `figures/<profile>`, where they can be
    committed.

    For each notebook (or the one with this number) that has a finished run: PNGs, tables, facts,
    manifest and claims; no PDFs, which are large. `costs.json` beside them says the device and, if
    the run was made here, seconds and memory. What was published of other notebooks stays. Then the
    ledger is made again.

    Raises ValueError for the default profile, FileNotFoundError for an unknown one and if no run
    has finished.
    """
    console = console or Console()
    if profile == DEFAULT_PROFILE:
        raise ValueError(
            f"the results of {profile} are in figures/ as they are: choose another profile with "
            "--profile"
        )
    changed = check_profile(root, profile)
    source, target = cache_root() / "profiles" / profile / "figures", root / "figures" / profile
    chosen = {notebook: finished(source, notebook) for notebook in find_notebooks(root, number)}
    if not any(chosen.values()):
        which = f"notebook {number}" if number else "any notebook"
        raise FileNotFoundError(
            f"{source} has no finished run of {which}: first `make reproduce PROFILE={profile}`"
        )
    for notebook, manifest in chosen.items():
        if manifest is None:
            console.print(f"{notebook.name}: no finished run, nothing to publish")
            continue
        with tempfile.TemporaryDirectory(dir=root, prefix=".figures-") as staging:
            for name in results_of(source, notebook):
                if not name.endswith(".pdf"):
                    shutil.copyfile(source / name, Path(staging) / name)
            _put_into_place(Path(staging), target, notebook)
        costs = target / "costs.json"
        cost = {"device": manifest["device"], "threads": manifest["threads"]} | _cost_of(
            profile, notebook, manifest
        )
        write_json(costs, (read_json(costs) if costs.exists() else {}) | {notebook.name: cost})
        now = conditions(root, notebook, changed[notebook.number])
        older = [
            name
            for name in ("source", "code", "parameters", "data", "measured")
            if manifest.get(name) != now[name]
        ]
        note = (
            f"; its {', '.join(older)} changed since it ran: `make reproduce PROFILE={profile}` "
            "runs it again"
            if older
            else ""
        )
        console.print(f"{notebook.name}: published{note}", soft_wrap=True)
    _renew_ledger(root, console)


def _cost_of(profile: str, notebook: Notebook, manifest: dict[str, Any]) -> dict[str, float]:
    """Seconds and memory of the run that a manifest is of, or {} if it is not the last one made
    here."""
    stamp_file = cache_root() / "stamps" / f"{profile}-{notebook.name}.json"
    stamp = read_json(stamp_file) if stamp_file.exists() else {}
    given = {name: value for name, value in manifest.items() if name not in ("figures", "claims")}
    return stamp["cost"] if stamp.get("key") == digest(given) else {}


# ---- the command line


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 if a notebook failed, or 2 if nothing
    could be run."""
    root = root or ROOT
    purpose = "Run the notebooks that are not up to date."
    parser = argparse.ArgumentParser(
        prog="python -m companion.rails.reproduce", description=purpose
    )
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        help="a file of notebooks/profiles (default: %(default)s)",
    )
    parser.add_argument("--notebook", metavar="NN", help="only the notebook with this number")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="run nothing; copy the profile's finished results to figures/",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list notebooks, profiles and parameters, and run nothing",
    )
    given = parser.parse_args(arguments)
    try:
        if given.list:
            print(
                "profiles:",
                ", ".join(
                    sorted(path.stem for path in (root / "notebooks/profiles").glob("*.yaml"))
                ),
            )
            changed = check_profile(root, given.profile)
            for notebook in find_notebooks(root, given.notebook):
                print(f"\n{notebook.name} in the profile {given.profile}")
                for name, (annotation, default) in notebook.parameters().items():
                    value = changed[notebook.number].get(name, default)
                    print(f"  {name}: {annotation or 'any'} = {value!r}")
            return 0
        if given.publish:
            publish(root, given.profile, given.notebook)
            return 0
        return 0 if reproduce(root, given.profile, given.notebook, given.force) else 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
