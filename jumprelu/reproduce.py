"""Run the notebooks: `make reproduce`, or `python -m jumprelu.reproduce --help`.

Notable here:
- a notebook runs again only if its key changed: its cells, the code of the package that it uses, its parameters,
  the package's data files (the embedded model), the lock, the Python version, the threads and the device.
- the executed notebook and its figures are renamed into place together, after the last cell has succeeded.
  A failing cell leaves the tree as it was.
- what is committed is free of times, ids and paths, so that the same machine writes the same bytes every time.
  Seconds and memory go to `timings.json` in the cache and to the closing table.
- the default profile is the notebooks' own parameters. The results of any other profile stay out of the tree, in
  the cache, under `profiles/<name>`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import logging
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jupytext
import nbformat
import papermill
import psutil
import torch
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from .cache import source_closure
from .files import cache_root, digest, read_json, sha256, write_json, write_text

DEFAULT_PROFILE = "laptop"
DEFAULT_THREADS = 2
NAMED_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy", "pandas", "sympy", "matplotlib")
"""Packages whose versions a manifest spells out; the digest of the lock covers the others."""
HEARTBEAT_SECONDS = 30
"""How often a long cell is reported where the output is not a terminal."""

# ---- notebooks and profiles -------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    annotation: str
    """Type hint as written, or ''."""
    default: Any


class Given(NamedTuple):
    value: Any
    line: int
    """Line of the profile, from 1."""


@dataclass(frozen=True)
class Notebook:
    """One notebook: `notebooks/NN_name.py`, its source, and `NN_name.ipynb`, what a run makes of it."""

    source: Path

    @property
    def number(self) -> str:
        return self.source.name[:2]

    @property
    def name(self) -> str:
        return self.source.stem

    def read(self) -> nbformat.NotebookNode:
        return jupytext.read(self.source)

    def code(self) -> str:
        return "\n".join(cell.source for cell in self.read().cells if cell.cell_type == "code")

    def parameters(self) -> dict[str, Parameter]:
        """What the cell tagged `parameters` assigns. Raises ValueError if it holds anything but literal values."""
        cells = [cell for cell in self.read().cells if "parameters" in cell.metadata.get("tags", [])]
        found: dict[str, Parameter] = {}
        for statement in (line for cell in cells for line in ast.parse(cell.source).body):
            annotated = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            plain = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
            try:
                value = ast.literal_eval(statement.value) if annotated or plain else None
            except ValueError:
                plain = annotated = False
            if not (annotated or plain):
                raise ValueError(f"{self.source.name}: the cell tagged `parameters` has the line `{ast.unparse(statement)}`. "
                                 "Expected only `name: type = value  # help` with a literal value")
            target = statement.target if annotated else statement.targets[0]
            found[target.id] = Parameter(ast.unparse(statement.annotation) if annotated else "", value)
        return found


def find_notebooks(root: Path, number: str | None = None) -> list[Notebook]:
    """The notebooks of `root/notebooks`, in order, or the one with this number. Raises FileNotFoundError for none."""
    found = [Notebook(path) for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))]
    chosen = [each for each in found if number in (None, each.number, each.name)]
    if not chosen:
        known = ", ".join(each.number for each in found) or f"none in {root / 'notebooks'}"
        raise FileNotFoundError(f"no notebook {number or 'NN_name.py'}: expected one of {known}")
    return chosen


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with 1e-3 read as the number it is and not as a string."""


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load_profile(root: Path, name: str) -> dict[str, dict[str, Given]]:
    """The profile `root/notebooks/profiles/<name>.yaml`: notebook number → parameter → value and line.

    Raises FileNotFoundError for an unknown name, ValueError naming file and line for a broken file.
    """
    folder = root / "notebooks/profiles"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"no profile {name!r}: expected one of {known} (the files of notebooks/profiles)")

    def entries(node: yaml.Node, expected: str) -> Iterator[tuple[str, yaml.Node, int]]:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}, line {node.start_mark.line + 1}: expected {expected}")
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise ValueError(f"{path}, line {key.start_mark.line + 1}: {key.value} is there twice; keep one of them")
            seen.add(key.value)
            yield key.value, value, key.start_mark.line + 1

    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        document = loader.get_single_node()
        profile: dict[str, dict[str, Given]] = {}
        for number, block, line in entries(document, 'a mapping of notebooks, such as `"00": {steps: 100}`') if document else ():
            if not re.fullmatch(r"\d\d", number):
                raise ValueError(f'{path}, line {line}: expected a notebook\'s number such as "00", found {number!r}')
            given = entries(block, "a mapping of parameters, such as `steps: 100`, or {} for none")
            profile[number] = {name: Given(loader.construct_object(node, deep=True), at) for name, node, at in given}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)}). "
                         'Expected a mapping such as `"00": {steps: 100}`') from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
    return profile


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of the type that a hint such as `int`, `list[float]` or `str | None` names."""
    outer = re.sub(r"\[.*\]", "", annotation)
    if "|" in outer:
        return any(_fits(value, part.strip()) for part in re.split(r"\|(?![^\[]*\])", annotation))
    inner = annotation[len(outer) + 1 : -1]
    if outer in ("list", "tuple"):
        return isinstance(value, list | tuple) and (not inner or all(_fits(each, inner.split(",")[0]) for each in value))
    if outer == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {"int": int, "str": str, "bool": bool, "dict": dict, "None": type(None)}
    kind = kinds.get(outer, object)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check_profile(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """Notebook number → parameters that differ from the notebook's own, checked against all notebooks.

    Raises ValueError, naming file and line, for a parameter that the notebook does not have or of another type, and
    for a default profile that differs from the notebooks. A notebook that is not there is not an error.
    """
    path = root / f"notebooks/profiles/{name}.yaml"
    profile, changed = load_profile(root, name), {}
    for notebook in find_notebooks(root):
        known = notebook.parameters()
        changed[notebook.number] = {}
        for parameter, (value, line) in profile.get(notebook.number, {}).items():
            where = f"{path}, line {line}: notebook {notebook.name}"
            if parameter not in known:
                close = difflib.get_close_matches(parameter, known, 1, 0)
                raise ValueError(f"{where} has no parameter {parameter!r}" + (f"; the closest is {close[0]!r}" if close else ""))
            if not _fits(value, known[parameter].annotation):
                raise ValueError(f"{where} expects {parameter}: {known[parameter].annotation}, found {value!r}")
            default = known[parameter].default
            if value != default and name == DEFAULT_PROFILE:
                raise ValueError(f"{where} has {parameter} = {default!r}, the profile {value!r}: make them equal, "
                                 "because the notebooks' own parameters are the default profile")
            if value != default:
                changed[notebook.number][parameter] = value
    return changed


# ---- what a run depends on --------------------------------------------------------------------------------------


def locked_versions(root: Path) -> dict[str, str]:
    """Package → version, from `root/requirements.lock`."""
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def data_files(folder: Path) -> dict[str, str]:
    """Hash of every file of the package that is not code: the embedded model, the style sheet."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"})
    return {path.relative_to(folder).as_posix(): sha256(path)[:16] for path in files}


def cells_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str, list[str]]]:
    """(type, source, tags) of every cell: what makes a notebook the pair of its .py."""
    return [(cell.cell_type, cell.source, list(cell.metadata.get("tags", []))) for cell in notebook.cells]


def conditions(root: Path, notebook: Notebook, changed: dict[str, Any]) -> dict[str, Any]:
    """All that a run's results may depend on, as plain values. Its digest is the run's key, itself its manifest."""
    parameters = {name: parameter.default for name, parameter in notebook.parameters().items()} | changed
    locked = locked_versions(root)
    trained = Path(__file__).with_name("lm") / "training.json"
    return {
        "source": digest(cells_of(notebook.read())),
        "code": source_closure(notebook.code()),
        "parameters": parameters,
        "data": data_files(Path(__file__).parent),
        "corpus": read_json(trained).get("corpus") if trained.exists() else None,
        "lock": digest(locked),
        "packages": {name: locked[name] for name in NAMED_PACKAGES if name in locked},
        "python": ".".join(platform.python_version_tuple()[:2]),
        "threads": parameters.get("threads", DEFAULT_THREADS),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


# ---- running ----------------------------------------------------------------------------------------------------


def kernel_environment(threads: int = DEFAULT_THREADS) -> dict[str, str | None]:
    """Environment of a kernel, here and under nbval; None: not set."""
    return {
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not of the user's home
        "TQDM_DISABLE": "1",  # progress bars would be stored as output
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
                self.peak = max(self.peak, sum(p.memory_info().rss for p in psutil.Process().children(recursive=True)))
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
        cell = nbformat.from_dict({**cell, "metadata": {"tags": tags} if tags else {}, "id": digest(index, cell.source)})
        for output in cell.get("outputs", []):
            output.pop("transient", None)
        cells.append(cell)
    return nbformat.from_dict({"cells": cells, "metadata": kept, "nbformat": 4, "nbformat_minor": 5})


class Failed(Exception):
    """A notebook did not run to its end; the message says where and why."""


def _indented(source: str) -> str:
    return "\n".join("    " + line for line in source.splitlines())


def _explain(error: Exception, node: nbformat.NotebookNode, monitor: _Monitor, kept: Path) -> str:
    """What to tell the reader about a run that ended in `error`; '' for an error that is not the notebook's."""
    if isinstance(error, PapermillExecutionError):
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()[-12:]
        parts = [f"[{error.exec_count}]:", _indented(error.source), "\n".join(trace), f"The notebook up to there: {kept}"]
        return "in the cell " + "\n\n".join(parts)
    if monitor.cell < 0:
        return f"because the kernel did not start ({type(error).__name__}: {error}). `make setup` installs it"
    if isinstance(error, DeadKernelError):
        source, megabytes = _indented(node.cells[monitor.cell].source), monitor.peak / 2**20
        return (f"because the kernel died in this cell, as it does when memory runs out (it used {megabytes:.0f} MB):\n\n"
                f"{source}\n\nPROFILE=smoke needs less")
    return ""


def _execute(notebook: Notebook, changed: dict[str, Any], threads: int, figures: Path, kept: Path,
             console: Console) -> tuple[nbformat.NotebookNode, _Monitor]:
    """Run one notebook with papermill; a kernel that fails to start is given a second chance."""
    settings = kernel_environment(threads) | {"JUMPRELU_FIGURES": str(figures), "JUMPRELU_CACHE": str(cache_root().resolve())}
    for attempt in (1, 2):
        node = notebook.read()
        with environment(settings), _Monitor(notebook.name, len(node.cells), console) as monitor:
            try:
                executed = papermill.execute_notebook(
                    node, str(kept), parameters=changed, kernel_name="python3", cwd=str(notebook.source.parent),
                    progress_bar=False, request_save_on_cell_execute=False, coalesce_streams=True,
                    on_cell_start=monitor.on_cell_start, extra_arguments=["--IPKernelApp.log_level=ERROR"],
                )  # fmt: skip
                return executed, monitor
            except Exception as error:
                if monitor.cell < 0 and attempt == 1:  # ports are chosen before they are bound, and may be lost in between
                    console.print(f"{notebook.name}: the kernel did not start ({type(error).__name__}), trying once more")
                    continue
                message = _explain(error, node, monitor, kept)
                if message:
                    raise Failed(message) from error
                raise
    raise AssertionError("the second attempt returns or raises")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: sha256(folder / name) if (folder / name).is_file() else "missing" for name in names}


def run_notebook(root: Path, notebook: Notebook, profile: str, changed: dict[str, Any], force: bool = False,
                 console: Console | None = None) -> dict[str, Any]:
    """Run a notebook unless it is up to date, and put its results into place.

    Returns {"state": "up to date" or "done", "seconds", "peak_mb", "facts"}. Raises Failed if a cell fails or the kernel
    dies; what an earlier run wrote is then untouched.
    """
    console = console or Console()
    base = root if profile == DEFAULT_PROFILE else cache_root() / "profiles" / profile
    figures = base / "figures"
    given = conditions(root, notebook, changed)
    key = digest(given)
    stamp_file = cache_root() / "stamps" / f"{profile}-{notebook.name}.json"
    stamp = read_json(stamp_file) if stamp_file.exists() else {}
    if not force and stamp.get("key") == key and stamp["outputs"] == _hashes(base, list(stamp["outputs"])):
        console.print(f"{notebook.name}: up to date")
        return {**stamp["cost"], "state": "up to date", "facts": _facts(figures, notebook)}
    console.print(f"{notebook.name}: running")
    kept = cache_root() / "failed" / f"{notebook.name}.ipynb"
    kept.parent.mkdir(parents=True, exist_ok=True)
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix=".figures-") as staging:  # on the same disk as where it goes
        executed, monitor = _execute(notebook, changed, given["threads"], Path(staging), kept, console)
        text = nbformat.writes(scrub(executed)) + "\n"
        write_json(Path(staging) / f"{notebook.name}.manifest.json", given | {"figures": _figure_hashes(Path(staging))})
        made = sorted(path.name for path in Path(staging).iterdir())
        foreign = [name for name in made if not name.startswith(f"{notebook.number}_")]
        if foreign:
            raise Failed(f"because it wrote {foreign[0]}: what it writes must be named {notebook.number}_…, after its number")
        figures.mkdir(exist_ok=True)
        for old in figures.glob(f"{notebook.number}_*"):
            if old.name not in made:
                old.unlink()  # of a figure that this notebook no longer makes
        for name in made:
            os.replace(Path(staging) / name, figures / name)
    write_text(base / "notebooks" / f"{notebook.name}.ipynb", text)
    kept.unlink(missing_ok=True)
    cost = {"seconds": round(time.monotonic() - monitor.started, 1), "peak_mb": round(monitor.peak / 2**20)}
    outputs = [f"notebooks/{notebook.name}.ipynb", *(f"figures/{name}" for name in made)]
    write_json(stamp_file, {"key": key, "outputs": _hashes(base, outputs), "cost": cost})
    timings = cache_root() / "timings.json"
    write_json(timings, (read_json(timings) if timings.exists() else {}) | {f"{profile}/{notebook.name}": cost})
    console.print(f"{notebook.name}: done in {cost['seconds']} s")
    return {**cost, "state": "done", "facts": _facts(figures, notebook)}


def _figure_hashes(folder: Path) -> dict[str, str]:
    return {path.stem: sha256(path)[:16] for path in sorted(folder.glob("*.csv"))}


def _facts(figures: Path, notebook: Notebook) -> dict[str, Any]:
    path = figures / f"{notebook.number}_facts.json"
    return read_json(path) if path.exists() else {}


def reproduce(root: Path, profile: str = DEFAULT_PROFILE, number: str | None = None, force: bool = False,
              console: Console | None = None) -> bool:
    """Run the notebooks of `root` (all, or one) in a profile and print the tables; True if all succeeded.

    Raises ValueError or FileNotFoundError, before anything runs, for a profile or a notebook that is not as it should be.
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
            console.print(f"{notebook.name}: FAILED {error}", markup=False, highlight=False, soft_wrap=True)
            costs.add_row(notebook.name, "FAILED", "", "")
            continue
        costs.add_row(notebook.name, result["state"], str(result["seconds"]), str(result["peak_mb"]))
        for fact, value in result["facts"].items():
            facts.add_row(notebook.number, fact, str(value))
    console.print(costs)
    if facts.row_count:
        console.print(facts)
    if succeeded and profile != DEFAULT_PROFILE:
        console.print(f"notebooks and figures of this profile: {cache_root() / 'profiles' / profile}", soft_wrap=True)
    return succeeded


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 if a notebook failed, or 2 if nothing could be run."""
    root = root or Path(__file__).resolve().parent.parent
    purpose = "Run the notebooks that are not up to date."
    parser = argparse.ArgumentParser(prog="python -m jumprelu.reproduce", description=purpose)
    parser.add_argument("--profile", default=DEFAULT_PROFILE, help="a file of notebooks/profiles (default: %(default)s)")
    parser.add_argument("--notebook", metavar="NN", help="only the notebook with this number")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument("--list", action="store_true", help="list notebooks, profiles and parameters, and run nothing")
    given = parser.parse_args(arguments)
    try:
        if given.list:
            print("profiles:", ", ".join(sorted(path.stem for path in (root / "notebooks/profiles").glob("*.yaml"))))
            changed = check_profile(root, given.profile)
            for notebook in find_notebooks(root, given.notebook):
                print(f"\n{notebook.name} in the profile {given.profile}")
                for name, (annotation, default) in notebook.parameters().items():
                    value = changed[notebook.number].get(name, default)
                    print(f"  {name}: {annotation or 'any'} = {value!r}")
            return 0
        return 0 if reproduce(root, given.profile, given.notebook, given.force) else 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
