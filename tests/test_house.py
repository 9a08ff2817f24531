"""Where things live and which way arrows point: CONTRIBUTING.md draws it, these tests hold it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from importlib.util import resolve_name

FROM_THE_CORE = {("jumprelu.corpus", "jumprelu.subject.texts")}
"""Folders of the library see its core and not each other, `__main__` and `__init__` see all; and
this is what the core sees of the folders."""
SHARED = {"rails"}
"""Folders of the companion that every other one may see."""
CORE_LINES, LIBRARY_LINES = 5_000, 9_000
"""At most, with every line counted: a library that is read in one sitting."""
HEAVY = ("transformers", "datasets", "pandas", "matplotlib", "IPython", "sympy")


def sources(root):
    """Dotted module → path, of the library and of the companion."""
    found = {}
    for base, package in ((root, "jumprelu"), (root / "notebooks", "companion")):
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name, path, known):
    """(module imported, whether when the importing module is loaded) for the modules of `known`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    inside = {
        id(node)
        for each in ast.walk(tree)
        if isinstance(each, ast.FunctionDef)
        for node in ast.walk(each)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target, id(node) not in inside


def room(path, root):
    """(package, folder in it or '' for the flat files of the library and what lies at the
    companion's top)."""
    base = root / ("jumprelu" if (root / "jumprelu") in path.parents else "notebooks/companion")
    return base.name, path.relative_to(base).parts[0] if path.parent != base else ""


def test_arrows_point_one_way(root):
    known, wrong = sources(root), []
    for name, path in known.items():
        package, folder = room(path, root)
        for target, _ in imports(name, path, known):
            other_package, other = room(known[target], root)
            if package == "jumprelu":
                door = name in ("jumprelu", "jumprelu.__main__")
                allowed = other_package == "jumprelu" and (
                    door or other in ("", folder) or (name, target) in FROM_THE_CORE
                )
            else:
                allowed = other_package == "jumprelu" or other in SHARED | {folder}
            if not allowed:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_no_cycles(root):
    known = sources(root)
    graph = {
        name: {target for target, _ in imports(name, path, known) if target != "jumprelu"}
        for name, path in known.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_library_is_small(root):
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in (root / "jumprelu").rglob("*.py")
    }
    core = sum(
        n
        for path, n in lines.items()
        if path.parent == root / "jumprelu" and path.name != "__main__.py"
    )
    assert [path.name for path, n in lines.items() if n > 400] == []
    assert core <= CORE_LINES and sum(lines.values()) <= LIBRARY_LINES, (core, sum(lines.values()))


def test_private_names_stay_in_their_module(root):
    known, wrong = sources(root), []
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (
                node.level or node.module.startswith(("jumprelu", "companion"))
            ):
                wrong += [
                    f"{name}: {a.name}"
                    for a in node.names
                    if a.name.startswith("_") and a.name[1] != "_"
                ]
    assert wrong == []


def test_all_code_is_formatted_alike(root):
    marked = [name for name, path in sources(root).items() if "fmt: " in path.read_text("utf-8")]
    assert marked == []


def test_the_library_does_not_speak_of_the_companion(root):
    speaking = [
        str(path.relative_to(root))
        for path in (root / "jumprelu").rglob("*.py")
        if "companion" in path.read_text(encoding="utf-8").lower()
    ]
    assert speaking == []


def test_importing_the_library_is_light():
    """Seconds of the processor, the best of three: other tests may be running."""
    code = (
        "import time, sys, torch\nt = time.process_time()\nimport jumprelu\n"
        f"print(time.process_time() - t, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    took = []
    for _ in range(3):
        seconds, *loaded = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert loaded == []
        took.append(float(seconds))
    assert min(took) < 1.5, took
