"""One notebook: what its run depends on, the run itself, and its results put into place.

Notable here:
- a notebook runs again only if its key changed: its cells, the code of both packages that it uses,
  its parameters, the packages' data files (the embedded model), the lock, the Python version, the
  threads and the device.
- the executed notebook and its figures are renamed into place together, after the last cell has
  succeeded. A failing cell leaves the tree as it was.
- what is committed is free of times, ids and paths, so that the same machine writes the same bytes
  every time.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
import psutil
import torch
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from jumprelu.files import SUBJECT, cache_root, digest, read_json, sha256, write_json, write_text

from .closure import source_closure
from .environment import DEFAULT_THREADS, environment, kernel_environment
from .figures import ROOT
from .profiles import DEFAULT_PROFILE, Notebook

Report = Callable[[str], None]
"""Is told, a few times a second, what a notebook is doing."""

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

# ---- what a run depends on


def locked_versions(root: Path) -> dict[str, str]:
    """Package → version, from `root/requirements.lock`."""
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def data_files() -> dict[str, str]:
    """Hash of every file that results depend on and that is not code: the shipped model, pages of
    latents, the style sheet. `headlines.yaml` is only read when README is written."""
    hashes = {}
    for folder in (SUBJECT.parent, Path(__file__).parents[1]):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and path.suffix not in {".py", ".pyc", ".yaml"}
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


def processor() -> str:
    """The kind of CPU, as far as the last digits of results depend on it: maker, and instructions
    that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    maker = next((line.split()[-1] for line in lines if line.startswith("vendor_id")), "")
    known = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if known.get(name)]
    return " ".join([maker or platform.machine(), torch.backends.cpu.get_cpu_capability(), *bf16])


# ---- running


class _Monitor(threading.Thread):
    """Says which cell is running, and samples the memory of the kernel and its children."""

    def __init__(self, n_cells: int, report: Report):
        super().__init__(daemon=True)
        self.n_cells, self.report = n_cells, report
        self.cell, self.peak, self.started = -1, 0, time.monotonic()
        self.finished = threading.Event()

    def on_cell_start(self, cell: Any = None, cell_index: int = 0, **_: Any) -> None:
        self.cell = cell_index

    def run(self) -> None:
        while not self.finished.wait(0.25):
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process().children(recursive=True)
                self.peak = max(self.peak, sum(child.memory_info().rss for child in children))
            self.report(f"cell {self.cell + 1} of {self.n_cells}")

    def __enter__(self) -> _Monitor:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.finished.set()
        self.join()


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
            if output.get("name") == "stderr":  # a warning names the file that it comes from
                output["text"] = output["text"].replace(f"{ROOT}{os.sep}", "")
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
        why = f"{type(error).__name__}: {error}"
        return f"because the kernel did not start ({why}). `make setup` installs it"
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
    report: Report,
) -> tuple[nbformat.NotebookNode, _Monitor]:
    """Run one notebook with papermill; a kernel that fails to start is given a second chance."""
    settings = kernel_environment(threads) | {
        "JUMPRELU_FIGURES": str(figures),
        "JUMPRELU_CACHE": str(cache_root().resolve()),
    }
    for attempt in (1, 2):
        node = notebook.read()
        with environment(settings), _Monitor(len(node.cells), report) as monitor:
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
                if monitor.cell < 0 and attempt == 1:
                    # ports are chosen before they are bound, and may be lost in between
                    why = type(error).__name__
                    report(f"the kernel did not start ({why}), trying once more")
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


def base_of(root: Path, profile: str) -> Path:
    """Where a profile has `notebooks/` and `figures/`: the checkout, or a folder of the cache."""
    return root if profile == DEFAULT_PROFILE else cache_root() / "profiles" / profile


def stamp_of(profile: str, notebook: Notebook) -> Path:
    """File with key, outputs and cost of the last finished run."""
    return cache_root() / "stamps" / f"{profile}-{notebook.name}.json"


def read_stamp(profile: str, notebook: Notebook) -> dict[str, Any]:
    """{"key", "outputs", "cost"} of the last finished run, or {} if there is none."""
    path = stamp_of(profile, notebook)
    return read_json(path) if path.exists() else {}


def up_to_date(root: Path, notebook: Notebook, profile: str, changed: dict[str, Any]) -> bool:
    """Whether the results that are there are those that a run would give."""
    stamp = read_stamp(profile, notebook)
    if stamp.get("key") != digest(conditions(root, notebook, changed)):
        return False
    return stamp["outputs"] == _hashes(base_of(root, profile), list(stamp["outputs"]))


class Cost(NamedTuple):
    seconds: float
    peak_mb: int


def run_notebook(
    root: Path, notebook: Notebook, profile: str, changed: dict[str, Any], report: Report
) -> Cost:
    """Run a notebook and put its results into place.

    Raises Failed if a cell fails or the kernel dies; what an earlier run wrote is then untouched.
    """
    base = base_of(root, profile)
    figures = base / "figures"
    given = conditions(root, notebook, changed)
    kept = cache_root() / "failed" / f"{notebook.name}.ipynb"
    kept.parent.mkdir(parents=True, exist_ok=True)
    base.mkdir(parents=True, exist_ok=True)
    # on the same disk as where it goes
    with tempfile.TemporaryDirectory(dir=base, prefix=".figures-") as temporary:
        staging = Path(temporary)
        executed, monitor = _execute(notebook, changed, given["threads"], staging, kept, report)
        text = nbformat.writes(scrub(executed)) + "\n"
        manifest = given | {"processor": processor()} | table_hashes(staging, notebook)
        write_json(staging / f"{notebook.name}.manifest.json", manifest)
        made = put_into_place(staging, figures, notebook)
    write_text(base / "notebooks" / f"{notebook.name}.ipynb", text)
    kept.unlink(missing_ok=True)
    seconds = round(time.monotonic() - monitor.started, 1)
    cost = Cost(seconds, round(monitor.peak / 2**20))
    outputs = [f"notebooks/{notebook.name}.ipynb", *(f"figures/{name}" for name in made)]
    stamp = {"key": digest(given), "outputs": _hashes(base, outputs), "cost": cost._asdict()}
    write_json(stamp_of(profile, notebook), stamp)
    return cost


def facts_of(figures: Path, notebook: Notebook) -> dict[str, Any]:
    """The facts that a notebook printed at its end, by name; {} if it has not run."""
    path = figures / f"{notebook.number}_facts.json"
    return read_json(path) if path.exists() else {}


# ---- results


def results_of(figures: Path, notebook: Notebook) -> list[str]:
    """Names of the files in a figures folder that a notebook made: NN_… and its claims."""
    return sorted(
        path.name
        for path in [
            *figures.glob(f"{notebook.number}_*"),
            *figures.glob(f"claims_{notebook.number}.csv"),
        ]
    )


def table_hashes(figures: Path, notebook: Notebook) -> dict[str, Any]:
    """What a manifest says of the tables: "figures", by name, and "claims" if the notebook makes
    any."""
    hashes = {
        Path(name).stem: sha256(figures / name)[:16]
        for name in results_of(figures, notebook)
        if name.endswith(".csv")
    }
    claims = hashes.pop(f"claims_{notebook.number}", None)
    return {"figures": hashes} | ({"claims": claims} if claims else {})


def put_into_place(staging: Path, figures: Path, notebook: Notebook) -> list[str]:
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
