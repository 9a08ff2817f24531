"""Results that are kept: computed once for given arguments, then read back.

Notable here:
- two kinds of key. A cheap result, such as a table, is kept under the code that computes it
  (`closure.py`) and the content of its arguments: edit a function, and what depends on it is
  computed again. Expensive data (a store of activations, a trained SAE: functions with a parameter
  `out`) are kept under the function's name, its `version` and the content of the arguments: a
  better error message must not cost a day of training. Whoever changes what such a function
  computes raises its `version`.
- a fresh result is read back from disk before it is returned, so the first run and the second see
  the same values.
- nothing is pickled: tables are Parquet, tensors safetensors, everything else is JSON.
- of two processes that want one result at the same time, one computes it, and the other waits and
  reads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from jumprelu.files import (
    cache_root,
    digest,
    locked,
    read_json,
    sha256,
    tensor_digest,
    write_json,
    write_tensors,
    writing,
)

from .closure import OWN, closure_hash, followed

log = logging.getLogger(__name__)

TENSORS = "tensors.safetensors"

# ---- the content of arguments


def _bytes_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def content(value: Any, packages: frozenset[str] = OWN, code: bool = True) -> Any:
    """A value as plain lists, strings and numbers that are equal exactly if the contents are.

    Takes plain values, containers of them, dataclasses, NumPy arrays, tensors, DataFrames, paths
    (by the content of the file or folder), functions and classes, and objects with a `fingerprint`.
    code: an instance of a class of `packages` counts as another one when the source of its class
    has changed. Functions and classes themselves always go by their source.

    Raises TypeError for the rest.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value

    def inner(part: Any) -> Any:
        return content(part, packages, code)

    kind = type(value)
    # an instance can only bring code along through its class
    ours = kind.__module__.split(".")[0] in packages
    source = closure_hash(kind) if code and ours else ""
    if (
        hasattr(value, "fingerprint")
        and not inspect.isroutine(value)
        and not isinstance(value, type)
    ):
        return [kind.__qualname__, source, inner(value.fingerprint)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [kind.__qualname__, source, fields]
    if isinstance(value, torch.Tensor):
        return ["tensor", tensor_digest({"": value})]
    if isinstance(value, np.generic | np.ndarray) and value.dtype != object:
        return ["array", str(value.dtype), list(value.shape), _bytes_hash(value)]
    if isinstance(value, pd.DataFrame):
        columns, types = [str(c) for c in value.columns], [str(t) for t in value.dtypes]
        return ["table", columns, types, _bytes_hash(pd.util.hash_pandas_object(value).to_numpy())]
    if isinstance(value, list | tuple):
        return [kind.__qualname__, source, [inner(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[inner(key), inner(item)] for key, item in value.items()]]
    if isinstance(value, Path):
        files = sorted(f for f in value.rglob("*") if f.is_file()) if value.is_dir() else [value]
        return ["path", [[f.relative_to(value).as_posix(), sha256(f)] for f in files]]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if inspect.isfunction(value) or isinstance(value, type):
        return ["code", value.__qualname__, closure_hash(value)]
    raise TypeError(
        f"cannot tell the content of a {kind.__module__}.{kind.__qualname__}: expected plain "
        "values, dataclasses, arrays, tensors, DataFrames, paths, or an object with a "
        "`fingerprint` that names its content"
    )


# ---- results on disk


def _store(value: Any, tables: list[pd.DataFrame], tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; DataFrames and tensors are put into `tables` and `tensors` and leave their
    number behind."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, pd.DataFrame):
        tables.append(value)
        return {"table": len(tables) - 1}
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = (
            value.detach().clone()
        )  # safetensors refuses two views of one memory
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"tuple": named, "items": [_store(item, tables, tensors) for item in value]}
    if isinstance(value, list | tuple):
        items = [_store(item, tables, tensors) for item in value]
        return items if isinstance(value, list) else {"tuple": "", "items": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {
            "dict": [[key, _store(item, tables, tensors)] for key, item in value.items()]
        }  # keeps the order
    hint = ": call .item() or .tolist()" if isinstance(value, np.ndarray) else ""
    raise TypeError(
        f"cannot keep a {type(value).__name__}{hint}. A remembered function returns a DataFrame, "
        "or numbers, strings, tensors and DataFrames in lists, tuples, NamedTuples or dicts with "
        "string keys; or it takes a folder `out`"
    )


def _restore(value: Any, folder: Path, packages: frozenset[str]) -> Any:
    if isinstance(value, list):
        return [_restore(item, folder, packages) for item in value]
    if not isinstance(value, dict):
        return value
    if "table" in value:
        return pd.read_parquet(folder / f"{value['table']}.parquet")
    if "tensor" in value:
        with safe_open(folder / TENSORS, framework="pt") as f:
            return f.get_tensor(value["tensor"])
    if "dict" in value:
        return {key: _restore(item, folder, packages) for key, item in value["dict"]}
    items = tuple(_restore(item, folder, packages) for item in value["items"])
    module, _, name = value["tuple"].partition(":")
    if not name:
        return items
    if module.split(".")[0] not in packages:  # a file must not be able to name any class at all
        raise TypeError(
            f"{folder / 'result.json'} names the class {value['tuple']}, which is not of the "
            f"package {sorted(packages)}"
        )
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))(*items)


def _write_result(value: Any, folder: Path) -> None:
    tables: list[pd.DataFrame] = []
    tensors: dict[str, torch.Tensor] = {}
    tree = _store(value, tables, tensors)
    if tensors:
        write_tensors(folder / TENSORS, tensors)
    for number, table in enumerate(tables):
        try:
            with writing(folder / f"{number}.parquet") as temporary:
                table.to_parquet(temporary, engine="pyarrow")
        except (ValueError, TypeError) as error:  # pyarrow's errors are ValueErrors or TypeErrors
            raise TypeError(
                f"cannot keep a DataFrame with columns {list(table.columns)}: {error}. "
                "Expected named columns of numbers or strings, one type a column"
            ) from error
    write_json(
        folder / "result.json", {"result": tree}
    )  # last: a folder without it is an unfinished one


# ---- keys and slots


def keeps_itself(fn: Callable) -> bool:
    """Whether a function has a parameter `out`: a folder that it fills and reads back by itself."""
    return "out" in inspect.signature(fn).parameters


def result_key(fn: Callable, arguments: dict[str, Any]) -> str:
    """Key of `fn` called with `arguments` (name → value).

    For a table: code, contents, versions of torch and NumPy, number of threads. For a function with
    a parameter `out`: its name and `version`, and the contents, without the code of their classes,
    of the arguments that differ from their defaults, so that a new parameter with a default changes
    no key. The last bits of a training run also depend on torch's version and the number of
    threads, which are part of the key, too, unless the function says `threads_matter = False`. So
    say those that write a store of activations: a store is taken as it is, wherever it was
    computed. Its fingerprint is of its bytes, so what is computed from it has a key of its own.

    Raises TypeError for a function with `out` that has no `version`.
    """
    torch_here = [torch.__version__.split("+")[0], torch.get_num_threads()]
    packages = followed(fn.__module__)
    if not keeps_itself(fn):
        contents = {name: content(value, packages) for name, value in arguments.items()}
        return digest(closure_hash(fn), contents, [*torch_here, np.__version__])
    if not hasattr(fn, "version"):
        raise TypeError(
            f"{fn.__name__} keeps its result in a folder `out` and has no version to find it by: "
            f"write `{fn.__name__}.version = 1` below it, and raise the number with every change "
            "of what it computes"
        )
    contents = {name: content(value, packages, code=False) for name, value in arguments.items()}
    for name, parameter in inspect.signature(fn).parameters.items():
        given, default = contents.get(name), parameter.default
        if default is not parameter.empty and given == content(default, packages, code=False):
            contents.pop(name, None)
    machine = torch_here if getattr(fn, "threads_matter", True) else []
    return digest(fn.__name__, fn.version, contents, machine)


class Slot(NamedTuple):
    """Where the result of one call is kept."""

    folder: Path
    packages: frozenset[str]
    """Whose classes may be read back."""

    @property
    def filled(self) -> bool:
        return (self.folder / "result.json").exists()

    def read(self) -> Any:
        return _restore(
            read_json(self.folder / "result.json")["result"], self.folder, self.packages
        )

    def write(self, value: Any) -> Any:
        """Keep a result, and return it as it will be read from now on."""
        _write_result(value, self.folder)
        return self.read()

    def locked(self) -> AbstractContextManager[None]:
        """For the time of a block, no other process that asks for it, too, has this slot.

        The lock is beside the results and not in the slot's folder, where a function with `out` may
        have one of its own.
        """
        folder = cache_root() / "locks" / self.folder.name
        return locked(folder, waiting=f"another process computes {self.folder.name}: waiting")


def slot(fn: Callable, *args: Any, **kwargs: Any) -> Slot:
    """The place of `fn(*args, **kwargs)`, for what computes several results at once, or in other
    processes.

    A function with a parameter `out` is meant to be given the slot's folder there. Raises as
    :func:`remember`.
    """
    closure_hash(fn)  # first, for its error: a lambda's signature would be fine
    if keeps_itself(fn) and "out" in kwargs:
        raise TypeError(
            f"remember chooses the folder `out` of {fn.__name__}: leave it away, or call "
            f"{fn.__name__} itself"
        )
    empty = {"out": None} if keeps_itself(fn) else {}
    bound = inspect.signature(fn).bind(*args, **kwargs, **empty)
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name != "out"}
    folder = cache_root() / "results" / f"{fn.__name__}-{result_key(fn, arguments)}"
    return Slot(folder, followed(fn.__module__))


def remember(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)`, computed only if that has not been done yet; see
    :func:`result_key`.

    A function with a parameter `out` is given a folder of its own there and is always called: such
    functions (`harvest`, `train`) go on where they stopped and return at once when finished. Any
    other must return a DataFrame, or plain values, tensors and DataFrames in lists, tuples,
    NamedTuples or dicts; that is written under `cache_root()/results` and read back, so a fresh and
    a reused result are equal.

    Raises TypeError for a function that is not at the top level of a module, one with `out` and
    without `version`, an argument whose content cannot be told, or a result that cannot be kept.
    """
    place = slot(fn, *args, **kwargs)
    if keeps_itself(fn):
        log.info("%s in %s", fn.__name__, place.folder.name)
        with place.locked():
            return fn(*args, **kwargs, out=place.folder)
    if not place.filled:
        with place.locked():
            if not place.filled:  # by a process that had the lock
                log.info("computing %s", place.folder.name)
                return place.write(fn(*args, **kwargs))
    log.info("reused %s", place.folder.name)
    return place.read()
