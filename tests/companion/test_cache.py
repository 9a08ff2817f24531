"""Keys that follow the code, and results that come back as they were."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from companion.rails import cache
from companion.rails.cache import content, remember, result_key
from companion.rails.closure import closure_hash, source_closure

SOURCES = {
    "__init__.py": "from .top import run\nfrom . import base\n",
    "base.py": '''
"""Docstring."""
SCALE = 2
"""Docstring of a constant."""
OTHER = 3

def helper(x: int) -> int:
    """Docstring."""
    return x * SCALE  # comment

def unrelated(x):
    return x + OTHER

class Thing:
    """Docstring."""
    size: int = 1
    """Docstring of a field."""
    fingerprint = "f"

    def method(self):
        return helper(self.size)
''',
    "other.py": """
from . import base
import numpy as np

def through_module(x):
    return base.helper(np.abs(x))
""",
    "top.py": """
from .base import Thing, helper as renamed

def run(x):
    return renamed(x)

def late(x):
    from .other import through_module
    return through_module(x)

def by_class():
    return Thing().method()

def whole():
    from . import base
    return getattr(base, "unre" + "lated")(1)

def by_package(x):
    import {package} as jr
    return jr.run(x)

def alone(x):
    return x

if __name__ == "__main__":
    alone(unused)
""",
}
TOY = frozenset({"toy"})
NAMES = ("run", "late", "by_class", "whole", "by_package", "alone")


@pytest.fixture
def hashes(tmp_path, monkeypatch):
    """hashes(file, old, new) writes a toy package with one edit and gives the hash of each function
    of top.py."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write_and_hash(file="", old="", new=""):
        package = "toy"  # one name, so that all hashes can be compared
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        for name, source in SOURCES.items():
            if name == file:
                assert old in source
                source = source.replace(old, new)
            (folder / name).write_text(source.replace("{package}", package))
        return {
            name: source_closure(f"from toy.top import {name}\n{name}()", frozenset({package}))
            for name in NAMES
        }

    yield write_and_hash
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def changed(hashes, *edit):
    before, after = hashes(), hashes(*edit)
    return {name for name in NAMES if before[name] != after[name]}


def test_comments_docstrings_and_hints_do_not_count(hashes):
    assert changed(hashes, "base.py", "# comment", "# another") == set()
    assert changed(hashes, "base.py", "Docstring", "Words") == set()
    assert changed(hashes, "base.py", "x: int) -> int", "x: float) -> float") == set()
    assert changed(hashes, "base.py", "x * SCALE", "x  *  ( SCALE )") == set()


def test_a_function_changes_what_depends_on_it_and_nothing_else(hashes):
    assert changed(hashes, "base.py", "return x * SCALE", "return SCALE + x") == set(NAMES) - {
        "alone"
    }
    assert changed(hashes, "base.py", "SCALE = 2", "SCALE = 4") == set(NAMES) - {"alone"}
    assert changed(hashes, "top.py", "return renamed(x)", "return renamed(x) + 1") == {
        "run",
        "by_package",
    }
    assert changed(hashes, "other.py", "np.abs(x)", "np.sin(x)") == {"late"}
    assert changed(hashes, "base.py", "size: int = 1", "size: int = 2") == {"by_class", "whole"}
    assert changed(
        hashes, "base.py", "return helper(self.size)", "return 1 + helper(self.size)"
    ) == {"by_class", "whole"}
    assert changed(hashes, "base.py", "return x + OTHER", "return x - OTHER") == {"whole"}
    assert changed(hashes, "top.py", "alone(unused)", "alone(1)") == set()


def test_a_statement_that_binds_nothing_counts_for_its_whole_module(hashes):
    assert changed(hashes, "base.py", "OTHER = 3", "OTHER = 3\nprint()") == set(NAMES) - {"alone"}


def test_a_name_that_cannot_be_resolved_counts_as_the_whole_package(hashes, tmp_path):
    hashes()
    source = "import toy as jr\njr.made_at_run_time()"
    before = source_closure(source, TOY)
    hashes("base.py", "return x + OTHER", "return x - OTHER")
    assert source_closure(source, TOY) != before


def test_a_module_that_is_missing_is_left_to_its_import(hashes):
    assert changed(hashes, "top.py", "from .other import", "from .missing import") == {"late"}


def test_closure_hash_is_that_of_the_real_package():
    from jumprelu import estimators

    assert closure_hash(estimators.jump_relu) != closure_hash(estimators.step)
    assert closure_hash(estimators.jump_relu) == source_closure(
        "from jumprelu.estimators import jump_relu as f\nf(1)"
    )


def copies(folder: Path, root: Path) -> Path:
    """Library and companion, to be edited."""
    for package in (root / "jumprelu", root / "notebooks/companion"):
        for path in package.rglob("*.py"):
            target = folder / path.relative_to(package.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return folder


def keys_of(folder: Path, cache: Path) -> dict[str, str]:
    """Name → key, in a new process, of a harvest, a run and two tables of the packages in
    `folder`."""
    code = """
import json, torch
import jumprelu as jr
from companion.rails.cache import slot
from companion.rails.jobs import make_job
from companion.rails.study import score_table
from jumprelu.activations import activations_from_tensor
from models import random_ids, tiny_lm
lm = tiny_lm()
tokens = jr.Tokens(random_ids(4, 8), torch.arange(4))
acts = activations_from_tensor(torch.arange(12.0).reshape(4, 3), "toy")
job = make_job(acts, jr.TrainConfig(d_sae=8), lm, tokens)
harvest = slot(jr.harvest, lm, tokens, layer=1).folder
table = slot(score_table, "name", []).folder
print(json.dumps({"harvest": harvest.name, "run": job.folder.name,
                  "report": job.report.folder.name, "table": table.name}))
"""
    helpers = Path(__file__).parents[1]
    paths = os.pathsep.join([str(folder), str(helpers)])
    settings = os.environ | {"PYTHONPATH": paths, "JUMPRELU_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=cache
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_expensive_data_is_found_again_after_an_edit_and_tables_are_not(tmp_path, root):
    """Errors in the modules of the language model, the harvest and training are worded anew: no
    text is harvested and no SAE trained again. What the companion computes with a function of the
    library is computed again when that changes."""
    folder, cache = copies(tmp_path / "copies", root), tmp_path / "other cache"
    cache.mkdir()

    def edit(name: str, pattern: str, new: str) -> None:
        path = folder / name
        source, number = re.subn(pattern, new, path.read_text())
        assert number, f"{name} has nothing like {pattern}"
        path.write_text(source)

    def changed(before: dict[str, str]) -> set[str]:
        after = keys_of(folder, cache)
        return {name for name in before if before[name] != after[name]}

    error = r'(raise ValueError\(\s*f?")'
    first = keys_of(folder, cache)
    for module in ("lm", "harvest", "train"):
        edit(f"jumprelu/{module}.py", error, r"\1! ")
    assert changed(first) == {"report"}
    second = keys_of(folder, cache)
    edit("jumprelu/harvest.py", r"(?m)^(harvest\.version.*?) = 1", r"\1 = 2")
    edit("companion/rails/study.py", '"seed": seed,', '"seed": seed + 1,')
    assert changed(second) == {"harvest", "table"}
    third = keys_of(folder, cache)
    edit("jumprelu/metrics.py", error, r"\1! ")
    assert changed(third) == {"report"}


@pytest.mark.parametrize("fn", [lambda x: x, torch.nn.ReLU(), (lambda: lambda: 0)()])
def test_what_has_no_name_is_refused(fn):
    with pytest.raises(TypeError, match="top level of a module"):
        closure_hash(fn)


# ---- arguments ----


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1


class Holder:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


def test_contents_differ_where_the_values_do(tmp_path):
    file = tmp_path / "a"
    values = [
        None,
        True,
        1,
        1.5,
        "1",
        [1],
        [1.0],
        {"a": 1},
        {"a": 2},
        Config(1),
        Config(2),
        Holder("a"),
        Holder("b"),
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.zeros(2).bfloat16(),
        torch.tensor(0.0),
        torch.tensor([0.0, 1.0]),
        np.zeros(2),
        np.zeros(2, dtype=np.float32),
        pd.DataFrame({"a": [1]}),
        pd.DataFrame({"b": [1]}),
        pd.DataFrame({"a": [2]}),
        torch.float32,
        torch.device("cpu"),
        closure_hash,
        content,
    ]
    seen = [cache.digest(content(value)) for value in values]
    assert len(set(seen)) == len(values)
    assert seen == [cache.digest(content(value)) for value in values]
    file.write_text("one")
    one, folder = content(file), content(tmp_path)
    file.write_text("two")
    assert content(file) != one and content(tmp_path) != folder
    assert content(torch.arange(4).reshape(2, 2).T) != content(torch.arange(4).reshape(2, 2))


def test_an_instance_brings_the_code_of_its_class(hashes):
    hashes()
    import toy.base

    thing = toy.base.Thing()
    before = content(thing, TOY)
    hashes("base.py", "return x + OTHER", "return x - OTHER")
    assert content(thing, TOY) == before
    hashes("base.py", "return helper(self.size)", "return 0")
    assert content(thing, TOY) != before


@pytest.mark.parametrize("value", [object(), torch.nn.Linear(1, 1), {1, 2}, [object()]])
def test_an_argument_of_unknown_content_is_refused(value):
    with pytest.raises(TypeError, match="cannot tell the content"):
        content(value)


# ---- results ----

calls: list[str] = []


class Result(NamedTuple):
    table: pd.DataFrame
    value: float


def table(rows: int, scale: float = 0.1) -> pd.DataFrame:
    calls.append("table")
    return pd.DataFrame({"x": np.arange(rows) * scale, "name": [f"r{i}" for i in range(rows)]})


def mixed(x: float) -> dict:
    calls.append("mixed")
    nan = float("nan")
    return {
        "z": [1, 2.5, None, True, "s"],
        "a": Result(table(2), np.float64(x)),
        "t": (1, 2),
        "nan": nan,
        "d": {"t": table(1)},
    }


def into_folder(text: str, out: Path | None = None) -> str:
    calls.append("into_folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / text).touch()
    return out.name


into_folder.version = 1


def without_version(out: Path) -> None:
    pass


def no_result() -> np.ndarray:
    return np.zeros(2)


def tensors() -> list:
    calls.append("tensors")
    x = torch.arange(6).reshape(2, 3).bfloat16()
    return [x, x.T, {"scalar": torch.tensor(1.5)}]


def bad_table() -> pd.DataFrame:
    return pd.DataFrame({"mixed": [1, "a", object()]})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    calls.clear()


def test_a_table_is_computed_once(caplog):
    caplog.set_level(logging.INFO, "companion")
    first, second = remember(table, 3), remember(table, rows=3, scale=0.1)
    assert calls == ["table"]
    pd.testing.assert_frame_equal(first, second)
    assert "computing table" in caplog.text and "reused table" in caplog.text
    remember(table, 4)
    assert calls == ["table", "table"]


def test_fresh_and_reused_results_are_equal():
    first = remember(mixed, 1.5)
    n_calls = len(calls)
    second = remember(mixed, 1.5)
    assert len(calls) == n_calls
    assert (
        list(first) == ["z", "a", "t", "nan", "d"]
        and first["z"] == [1, 2.5, None, True, "s"]
        and first["t"] == (1, 2)
    )
    assert (
        isinstance(first["a"], Result) and first["a"].value == 1.5 and first["nan"] != first["nan"]
    )
    pd.testing.assert_frame_equal(first["a"].table, second["a"].table)
    pd.testing.assert_frame_equal(first["d"]["t"], table(1))


def test_tensors_come_back_as_they_were():
    for result in (remember(tensors), remember(tensors)):
        x, transposed, scalar = result
        assert (
            x.dtype == torch.bfloat16
            and torch.equal(x, torch.arange(6).reshape(2, 3))
            and torch.equal(transposed, x.T)
        )
        assert scalar["scalar"].shape == () and scalar["scalar"] == 1.5
    assert calls == ["tensors"]


def test_the_threads_are_part_of_the_key():
    threads = torch.get_num_threads()
    one = result_key(table, {"rows": 1})
    torch.set_num_threads(threads + 1)
    two = result_key(table, {"rows": 1})
    torch.set_num_threads(threads)
    assert one != two and one == result_key(table, {"rows": 1})


def test_a_function_with_out_keeps_its_own_folder():
    first, second, other = (
        remember(into_folder, "a"),
        remember(into_folder, "a"),
        remember(into_folder, "b"),
    )
    assert first == second != other and calls == ["into_folder"] * 3
    assert (cache.cache_root() / "results" / first / "a").exists()
    with pytest.raises(TypeError, match="chooses the folder"):
        remember(into_folder, "a", out=Path("x"))
    with pytest.raises(TypeError, match=r"write `without_version.version = 1` below it"):
        remember(without_version)


@pytest.mark.parametrize(
    ("fn", "message"),
    [(no_result, r"\.item\(\) or \.tolist\(\)"), (bad_table, "one type a column")],
)
def test_a_result_that_cannot_be_kept_is_refused_and_leaves_nothing(fn, message):
    with pytest.raises(TypeError, match=message):
        remember(fn)
    assert not list(cache.cache_root().rglob("result.json"))


def patient_table(folder: str) -> pd.DataFrame:
    """Says that it has begun, and waits until it may end."""
    with open(f"{folder}/begun", "a") as file:
        file.write("x")
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.1)
    return table(2)


@pytest.mark.slow
def test_two_processes_compute_a_result_once(tmp_path):
    code = (
        "import test_cache; from companion.rails.cache import remember; "
        f"print(len(remember(test_cache.patient_table, {str(tmp_path)!r})))"
    )
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": settings}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as first:
        while not (tmp_path / "begun").exists() and first.poll() is None:
            time.sleep(0.1)
        with subprocess.Popen([sys.executable, "-c", code], **pipes) as second:
            assert "another process computes patient_table-" in second.stdout.readline()
            (tmp_path / "go").touch()
            assert second.stdout.read() == first.stdout.read() == "2\n"
    assert (tmp_path / "begun").read_text() == "x"


def test_an_unfinished_folder_is_computed_again():
    remember(table, 3)
    (stored,) = cache.cache_root().rglob("result.json")
    stored.unlink()
    remember(table, 3)
    assert calls == ["table", "table"]


def test_a_class_from_elsewhere_is_not_made():
    remember(mixed, 1.5)
    (stored,) = cache.cache_root().rglob("result.json")
    stored.write_text(stored.read_text().replace(f"{__name__}:Result", "os:stat_result"))
    with pytest.raises(TypeError, match="which is not of the package"):
        remember(mixed, 1.5)
