"""Results that are kept: computed once for a given code and given arguments, then read back.

Notable here:
- a result's key holds a hash of the function *and of every function, class and constant of the
  package that it uses*, found in the source by name. Editing one function forgets the results that
  depend on it and no others; comments, docstrings and type hints do not count.
- a fresh result is read back from disk before it is returned, so the first run and the second see
  the same values.
- nothing is pickled: tables are Parquet, tensors safetensors, everything else is JSON.

Names are followed where the source says them: `f(x)`, `module.f(x)`, imports inside functions. A
module that is passed around counts as a use of all that it defines, a name that cannot be resolved
as a use of the whole package. What is reached only through an argument is covered by the argument:
an instance of a class of the package brings the hash of its class. The source is read from disk, so
restart a notebook's kernel after editing the package.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from jumprelu.files import (
    cache_root,
    digest,
    read_json,
    sha256,
    tensor_digest,
    write_json,
    write_tensors,
    writing,
)

log = logging.getLogger(__name__)

TENSORS = "tensors.safetensors"
OWN = frozenset({"jumprelu", "companion"})
"""The packages whose source is followed: what a notebook uses of either belongs to its key."""
EFFECTS = "<effects>"
"""Name for the statements of a module that bind nothing, such as a call: all of the module depends
on them."""

# ---- the source that a function depends on


class _Definition(NamedTuple):
    text: str
    """Normalised source: no comments, docstrings or hints."""
    uses: frozenset[tuple[str, ...]]
    """Names it mentions, with the attributes behind them: ('np', 'log') for np.log."""
    imports: dict[str, str]
    """Imports inside a function: name bound there → dotted target."""


class _Module(NamedTuple):
    definitions: dict[str, list[_Definition]]
    imports: dict[str, str]


class _Normalise(ast.NodeTransformer):
    """Drop what a run does not see: docstrings (also those under a field or a constant) and hints
    of functions."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function


def _imports(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(name bound, dotted target) of every import in `node`; `package` is what a leading dot
    means."""
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield (
                    (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
                )
        elif isinstance(statement, ast.ImportFrom):
            base = importlib.util.resolve_name(
                "." * statement.level + (statement.module or ""), package
            )
            for alias in statement.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}"


def _uses(node: ast.AST) -> frozenset[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()

    def visit(node: ast.AST) -> None:
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            found.add((inner.id, *reversed(chain)))
            return
        for child in ast.iter_child_nodes(inner):
            visit(child)

    visit(node)
    return frozenset(found)


def _bound(statement: ast.stmt) -> list[str]:
    """Names that a statement of a module binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    names = [
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    return names + [
        node.name
        for node in ast.walk(statement)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]


@functools.lru_cache(maxsize=256)
def _parse(source: str, package: str) -> _Module:
    module = _Module({}, {})
    for statement in _Normalise().visit(ast.parse(source)).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module.imports.update(_imports(statement, package))
            continue
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            continue  # `if __name__ == "__main__"` is not run by an import
        if isinstance(statement, ast.If | ast.Try | ast.With):
            module.imports.update(_imports(statement, package))
        definition = _Definition(
            ast.unparse(statement), _uses(statement), dict(_imports(statement, package))
        )
        for name in _bound(statement) or [EFFECTS]:
            module.definitions.setdefault(name, []).append(definition)
    return module


def _file(module: str) -> Path | None:
    """Source file of a module, or None if there is no such module. Imports nothing but the parent
    package."""
    loaded = sys.modules.get(module)
    if getattr(loaded, "__file__", None):
        return Path(loaded.__file__)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _load(module: str) -> _Module:
    path = _file(module)
    if path is None or path.suffix != ".py":
        raise TypeError(
            f"the source of module {module!r} is not in a .py file: move what is to be cached into a module"
        )
    return _parse(
        path.read_text(encoding="utf-8"),
        module if path.name == "__init__.py" else module.rpartition(".")[0],
    )


def _everything(package: str) -> Iterator[tuple[str, str]]:
    path = _file(package)
    for file in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
        inner = (
            file.relative_to(path.parent).with_suffix("").parts
            if path.name == "__init__.py"
            else ()
        )
        module = ".".join([package, *(part for part in inner if part != "__init__")])
        yield from ((module, each) for each in _load(module).definitions)


def _resolve(
    target: str, rest: tuple[str, ...], packages: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """(module, name) pairs that the dotted `target`, followed by attributes `rest`, stands for.

    `target` is inside one of `packages`; a module without an attribute stands for all that it
    defines.
    """
    parent, _, name = target.rpartition(".")
    if parent:
        if _file(parent) is None:
            return  # a module that is not there has no code; the import itself will say so
        owner = _load(parent)
        if name in owner.definitions:
            yield parent, name
            return
        if name in owner.imports and owner.imports[name] != target:
            if owner.imports[name].split(".")[0] in packages:
                yield from _resolve(owner.imports[name], rest, packages)
            return
    if _file(target) is None:
        yield from _everything(
            target.split(".")[0]
        )  # a name made at run time: it may stand for anything
    elif rest:
        yield from _resolve(f"{target}.{rest[0]}", rest[1:], packages)
    else:
        yield from ((target, each) for each in _load(target).definitions)


def _dependencies(
    definition: _Definition, module: str | None, packages: frozenset[str]
) -> Iterator[tuple[str, str]]:
    known = _load(module) if module else _Module({}, {})
    for name, *rest in definition.uses:
        target = definition.imports.get(name) or known.imports.get(name)
        if module and name in known.definitions:
            yield module, name
        if target and target.split(".")[0] in packages:
            yield from _resolve(target, tuple(rest), packages)


def _closure(start: list[tuple[str, str]], packages: frozenset[str]) -> str:
    texts: dict[tuple[str, str], list[str]] = {}
    waiting = list(start)
    while waiting:
        module, name = waiting.pop()
        if (module, name) in texts:
            continue
        definitions = _load(module).definitions.get(name, [])
        texts[module, name] = [definition.text for definition in definitions]
        for definition in definitions:
            waiting += _dependencies(definition, module, packages)
        waiting.append((module, EFFECTS))
    return digest(sorted((*key, *value) for key, value in texts.items()))


def closure_hash(fn: Callable | type) -> str:
    """Hash of a function's or class's source and of all that it uses in its own top-level package.

    It changes with the code of anything reached, and not with comments, docstrings, hints or
    unrelated code. Raises TypeError for what cannot be found again by its name: lambdas, functions
    inside functions or typed into a notebook, callable objects.
    """
    name, module = getattr(fn, "__qualname__", None), getattr(fn, "__module__", None)
    if not name or not module or "<" in name or module == "__main__":
        raise TypeError(
            f"cannot follow the source of {fn!r}: expected a function or class defined at the top level of a "
            "module. Move it into one, and pass what a lambda or an inner function captures as an argument"
        )
    return _closure([(module, name.split(".")[0])], _followed(module))


def _followed(module: str) -> frozenset[str]:
    """The packages to follow from a module: our own together, any other alone."""
    package = module.split(".")[0]
    return OWN if package in OWN else frozenset({package})


def source_closure(source: str, packages: frozenset[str] = OWN) -> str:
    """Like :func:`closure_hash`, of everything in `packages` that a piece of code uses: a
    notebook's, say."""
    tree = _Normalise().visit(ast.parse(source))
    code = _Definition("", _uses(tree), dict(_imports(tree, "")))
    return _closure(list(_dependencies(code, None, packages)), packages)


# ---- the content of arguments


def _bytes_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def content(value: Any, packages: frozenset[str] = OWN) -> Any:
    """A value as plain lists, strings and numbers that are equal exactly if the contents are.

    Takes plain values, containers of them, dataclasses, NumPy arrays, tensors, DataFrames, paths
    (by the content of the file or folder), functions and classes, and objects with a `fingerprint`.
    Raises TypeError for the rest.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value)
    # an instance can only bring code along through its class
    code = closure_hash(kind) if kind.__module__.split(".")[0] in packages else ""
    if (
        hasattr(value, "fingerprint")
        and not inspect.isroutine(value)
        and not isinstance(value, type)
    ):
        return [kind.__qualname__, code, content(value.fingerprint, packages)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: content(getattr(value, f.name), packages) for f in dataclasses.fields(value)
        }
        return [kind.__qualname__, code, fields]
    if isinstance(value, torch.Tensor):
        return ["tensor", tensor_digest({"": value})]
    if isinstance(value, np.generic | np.ndarray) and value.dtype != object:
        return ["array", str(value.dtype), list(value.shape), _bytes_hash(value)]
    if isinstance(value, pd.DataFrame):
        rows = pd.util.hash_pandas_object(value).to_numpy()
        return [
            "table",
            [str(c) for c in value.columns],
            [str(t) for t in value.dtypes],
            _bytes_hash(rows),
        ]
    if isinstance(value, list | tuple):
        return [kind.__qualname__, code, [content(item, packages) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[content(k, packages), content(v, packages)] for k, v in value.items()]]
    if isinstance(value, Path):
        files = sorted(f for f in value.rglob("*") if f.is_file()) if value.is_dir() else [value]
        return ["path", [[f.relative_to(value).as_posix(), sha256(f)] for f in files]]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if inspect.isfunction(value) or isinstance(value, type):
        return ["code", value.__qualname__, closure_hash(value)]
    raise TypeError(
        f"cannot tell the content of a {kind.__module__}.{kind.__qualname__}: expected plain values, dataclasses, "
        "arrays, tensors, DataFrames, paths, or an object with a `fingerprint` that names its content"
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
        f"cannot keep a {type(value).__name__}{hint}. A remembered function returns a DataFrame, or numbers, "
        "strings, tensors and DataFrames in lists, tuples, NamedTuples or dicts with string keys; or it takes "
        "a folder `out`"
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
            f"{folder / 'result.json'} names the class {value['tuple']}, which is not of the package {sorted(packages)}"
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


def result_key(fn: Callable, arguments: dict[str, Any]) -> str:
    """Key of `fn` called with `arguments` (name → value): code, contents, versions of torch and
    NumPy, threads."""
    versions = [torch.__version__.split("+")[0], np.__version__, torch.get_num_threads()]
    packages = _followed(fn.__module__)
    return digest(
        closure_hash(fn),
        {name: content(value, packages) for name, value in arguments.items()},
        versions,
    )


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


def slot(fn: Callable, *args: Any, **kwargs: Any) -> Slot:
    """The place of `fn(*args, **kwargs)`, for what computes several results at once, or in other
    processes.

    A function with a parameter `out` is meant to be given the slot's folder there. Raises as
    :func:`remember`.
    """
    closure_hash(fn)  # first, for its error: a lambda's signature would be fine
    signature = inspect.signature(fn)
    keeps_itself = "out" in signature.parameters
    if keeps_itself and "out" in kwargs:
        raise TypeError(
            f"remember chooses the folder `out` of {fn.__name__}: leave it away, or call {fn.__name__} itself"
        )
    bound = signature.bind(*args, **kwargs, **({"out": None} if keeps_itself else {}))
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name != "out"}
    folder = cache_root() / "results" / f"{fn.__name__}-{result_key(fn, arguments)}"
    return Slot(folder, _followed(fn.__module__))


def remember(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)`, computed only if this code has not been run on these arguments yet.

    A function with a parameter `out` is given a folder of its own there and is always called: such
    functions (`harvest`, `train`) go on where they stopped and return at once when finished. Any
    other must return a DataFrame, or plain values, tensors and DataFrames in lists, tuples,
    NamedTuples or dicts; that is written under `cache_root()/results` and read back, so a fresh and
    a reused result are equal.

    Raises TypeError for a function that is not at the top level of a module, an argument whose
    content cannot be told, or a result that cannot be kept.
    """
    place = slot(fn, *args, **kwargs)
    if "out" in inspect.signature(fn).parameters:
        log.info("%s in %s", fn.__name__, place.folder.name)
        return fn(*args, **kwargs, out=place.folder)
    if place.filled:
        log.info("reused %s", place.folder.name)
        return place.read()
    result = place.write(fn(*args, **kwargs))
    log.info("computed %s", place.folder.name)
    return result
