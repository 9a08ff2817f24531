"""Which source a function depends on: a hash of the function *and of every function, class and
constant of our packages that it uses*, found in the source by name.

Notable here:
- editing one function changes the hash of what uses it and of nothing else; comments, docstrings
  and type hints do not count.
- both our packages are followed together: a function of the companion depends on the functions of
  the library that it calls.

Names are followed where the source says them: `f(x)`, `module.f(x)`, imports inside functions. A
module that is passed around counts as a use of all that it defines, a name that cannot be resolved
as a use of the whole package. What is reached only through an argument is covered by the argument:
see :func:`companion.rails.cache.content`. The source is read from disk, so restart a notebook's
kernel after editing the package.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jumprelu.files import digest

OWN = frozenset({"jumprelu", "companion"})
"""The packages whose source is followed: what a notebook uses of either belongs to its key."""
EFFECTS = "<effects>"
"""Name for the statements of a module that bind nothing, such as a call: all of the module depends
on them."""


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
            f"the source of module {module!r} is not in a .py file: move what is to be cached "
            "into a module"
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
            f"cannot follow the source of {fn!r}: expected a function or class defined at the top "
            "level of a module. Move it into one, and pass what a lambda or an inner function "
            "captures as an argument"
        )
    return _closure([(module, name.split(".")[0])], followed(module))


def followed(module: str) -> frozenset[str]:
    """The packages to follow from a module: our own together, any other alone."""
    package = module.split(".")[0]
    return OWN if package in OWN else frozenset({package})


def source_closure(source: str, packages: frozenset[str] = OWN) -> str:
    """Like :func:`closure_hash`, of everything in `packages` that a piece of code uses: a
    notebook's, say."""
    tree = _Normalise().visit(ast.parse(source))
    code = _Definition("", _uses(tree), dict(_imports(tree, "")))
    return _closure(list(_dependencies(code, None, packages)), packages)
