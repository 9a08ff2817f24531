"""A profile is a file of notebook parameters: read, and checked against the notebooks.

Notable here:
- a notebook's parameters are what its cell tagged `parameters` assigns: literal values, read from
  the source and never run.
- the default profile is the notebooks' own parameters, and its file must say the same.
- an error names the file and the line.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jupytext
import nbformat
import yaml

DEFAULT_PROFILE = "laptop"


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
    """One notebook: `notebooks/NN_name.py`, its source, and `NN_name.ipynb`, what a run makes of
    it."""

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
        """What the cell tagged `parameters` assigns. Raises ValueError if it holds anything but
        literal values."""
        cells = [
            cell for cell in self.read().cells if "parameters" in cell.metadata.get("tags", [])
        ]
        found: dict[str, Parameter] = {}
        for statement in (line for cell in cells for line in ast.parse(cell.source).body):
            annotated = isinstance(statement, ast.AnnAssign) and isinstance(
                statement.target, ast.Name
            )
            plain = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
            try:
                value = ast.literal_eval(statement.value) if annotated or plain else None
            except ValueError:
                plain = annotated = False
            if not (annotated or plain):
                raise ValueError(
                    f"{self.source.name}: the cell tagged `parameters` has the line "
                    f"`{ast.unparse(statement)}`. Expected only `name: type = value  # help` with "
                    "a literal value"
                )
            target = statement.target if annotated else statement.targets[0]
            found[target.id] = Parameter(
                ast.unparse(statement.annotation) if annotated else "", value
            )
        return found


def find_notebooks(root: Path, number: str | None = None) -> list[Notebook]:
    """The notebooks of `root/notebooks`, in order, or the one with this number. Raises
    FileNotFoundError for none."""
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
    """The profile `root/notebooks/profiles/<name>.yaml`: notebook number → parameter → value and
    line.

    Raises FileNotFoundError for an unknown name, ValueError naming file and line for a broken file.
    """
    folder = root / "notebooks/profiles"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml"))) or "none"
        raise FileNotFoundError(
            f"no profile {name!r}: expected one of {known} (the files of notebooks/profiles)"
        )

    def entries(node: yaml.Node, expected: str) -> Iterator[tuple[str, yaml.Node, int]]:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}, line {node.start_mark.line + 1}: expected {expected}")
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise ValueError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value} is there twice; keep "
                    "one of them"
                )
            seen.add(key.value)
            yield key.value, value, key.start_mark.line + 1

    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        document = loader.get_single_node()
        profile: dict[str, dict[str, Given]] = {}
        for number, block, line in (
            entries(document, 'a mapping of notebooks, such as `"00": {steps: 100}`')
            if document
            else ()
        ):
            if not re.fullmatch(r"\d\d", number):
                raise ValueError(
                    f'{path}, line {line}: expected a notebook\'s number such as "00", found '
                    f"{number!r}"
                )
            given = entries(block, "a mapping of parameters, such as `steps: 100`, or {} for none")
            profile[number] = {
                name: Given(loader.construct_object(node, deep=True), at)
                for name, node, at in given
            }
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)}). "
            'Expected a mapping such as `"00": {steps: 100}`'
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
    return profile


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of the type that a hint such as `int`, `list[float]` or `str | None`
    names."""
    outer = re.sub(r"\[.*\]", "", annotation)
    if "|" in outer:
        return any(_fits(value, part.strip()) for part in re.split(r"\|(?![^\[]*\])", annotation))
    inner = annotation[len(outer) + 1 : -1]
    if outer in ("list", "tuple"):
        return isinstance(value, list | tuple) and (
            not inner or all(_fits(each, inner.split(",")[0]) for each in value)
        )
    if outer == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {"int": int, "str": str, "bool": bool, "dict": dict, "None": type(None)}
    kind = kinds.get(outer, object)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check_profile(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """Notebook number → parameters that differ from the notebook's own, checked against all
    notebooks.

    Raises ValueError, naming file and line, for a parameter that the notebook does not have or of
    another type, and for a default profile that differs from the notebooks. A notebook that is not
    there is not an error.
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
                raise ValueError(
                    f"{where} has no parameter {parameter!r}"
                    + (f"; the closest is {close[0]!r}" if close else "")
                )
            if not _fits(value, known[parameter].annotation):
                raise ValueError(
                    f"{where} expects {parameter}: {known[parameter].annotation}, found {value!r}"
                )
            default = known[parameter].default
            if value != default and name == DEFAULT_PROFILE:
                raise ValueError(
                    f"{where} has {parameter} = {default!r}, the profile {value!r}: make them "
                    "equal, because the notebooks' own parameters are the default profile"
                )
            if value != default:
                changed[notebook.number][parameter] = value
    return changed
