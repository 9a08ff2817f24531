"""Figures and facts: what a notebook leaves in `figures/`.

Notable here:
- one call writes the PDF, the PNG and the plotted numbers as CSV. The first line of the CSV says
  where it comes from: a hash of the numbers and a hash of the code that drew them. Never a date,
  never a commit.
- the same figure written twice is the same bytes, so git shows a change only where there is one.
"""

from __future__ import annotations

import ast
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jumprelu.files import digest, read_json, write_json, write_text, writing

from .closure import closure_hash

ROOT = Path(__file__).resolve().parents[3]
"""The checkout."""
MEASURED = ROOT / "figures"
"""Where `make benchmark` leaves what it measured."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""For curves of few points: one marker a curve, beside the colour and the line style that the style
sheet gives."""


def use_style() -> None:
    """Set matplotlib's defaults to `paper.mplstyle`; figures made from now on have the companion's
    look."""
    plt.style.use(Path(__file__).with_name("paper.mplstyle"))


def figures_folder() -> Path:
    """`$JUMPRELU_FIGURES`, or `figures` in this checkout."""
    return Path(os.environ.get("JUMPRELU_FIGURES", MEASURED))


def read_measured(name: str) -> pd.DataFrame | dict[str, Any]:
    """A table ("….csv") or facts ("….json") of `make benchmark`; FileNotFoundError if it has not
    run.

    Notebooks name what they read here in so many words: it is part of what they depend on
    (`reproduce.py`).
    """
    path = MEASURED / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: `make benchmark` makes it")
    return read_json(path) if path.suffix == ".json" else pd.read_csv(path)


def _csv(data: pd.DataFrame) -> str:
    if (
        not isinstance(data, pd.DataFrame)
        or not data.index.equals(pd.RangeIndex(len(data)))
        or data.columns.nlevels != 1
    ):
        raise ValueError(
            "data must be a DataFrame with plain columns and the default index, because it becomes "
            "a CSV: call data.reset_index() first"
        )
    text = data.to_csv(index=False, float_format="%.6g")
    if "#" in text:
        raise ValueError(
            "data must not contain '#', which begins a comment in the CSV: rename that column or "
            "value"
        )
    return text


def save_figure(
    notebook: str, draw: Callable[[pd.DataFrame], Figure], data: pd.DataFrame
) -> Figure:
    """Draw a figure and write it as PDF, PNG and CSV to the figures folder; return it, closed, for
    the cell to show once.

    notebook: its number, such as "03"; draw: a function of a module, from the data to the figure;
    data: what is plotted, six digits of it are kept. The files are called after both: 03_pareto.png
    is what a function `pareto` drew for notebook 03.

    Raises ValueError for a notebook that is no number, or data that a CSV cannot hold; TypeError
    for a function that cannot be found again by its name.
    """
    if not re.fullmatch(r"\d\d", notebook):
        raise ValueError(f"notebook must be its number, such as '03', got {notebook!r}")
    text, code = _csv(data), closure_hash(draw)
    figure = draw(data)
    provenance = f"jumprelu data={digest(text)} code={code}"
    path = figures_folder() / f"{notebook}_{draw.__name__}"
    write_text(path.with_suffix(".csv"), f"# {provenance}\n{text}")
    with writing(path.with_suffix(".pdf")) as temporary:
        figure.savefig(
            temporary, format="pdf", metadata={"CreationDate": None, "Subject": provenance}
        )
    with writing(path.with_suffix(".png")) as temporary:
        figure.savefig(
            temporary, format="png", metadata={"Software": None, "Description": provenance}
        )
    plt.close(figure)
    return figure


def read_figure_data(path: str | Path) -> pd.DataFrame:
    """The numbers of a saved figure, as the function that drew it takes them. Raises ValueError if
    they were edited by hand."""
    first, _, text = Path(path).read_text(encoding="utf-8").partition("\n")
    found = re.match(r"# jumprelu data=(\w+) ", first)
    if not found or found[1] != digest(text):
        raise ValueError(f"{path} is not as save_figure wrote it: `make reproduce` writes it again")
    return pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])


def drawing_functions(root: Path = ROOT) -> dict[str, str]:
    """Which function draws which figure, as the notebooks of the checkout `root` say.

    Returns "03_pareto" → "companion.training.plots.pareto:pareto", for `pkgutil.resolve_name`, by
    notebook and in the order of its cells. Read from the notebooks' sources; nothing is imported
    and nothing is run. Calls of `save_figure` with a function that does not come from a module of
    the companion are left out.
    """
    found = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion")
            for alias in node.names
        }
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Name(id="save_figure"),
                    args=[
                        ast.Constant(value=number),
                        ast.Attribute(value=ast.Name(id=module), attr=name),
                        *_,
                    ],
                ) if module in modules:
                    found[f"{number}_{name}"] = f"{modules[module]}:{name}"
    return found


def _plain(name: str, value: Any) -> bool | int | float | str:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"the fact {name!r} is a {type(value).__name__}: expected a number, a string or a "
            "truth value, rounded below what differs from machine to machine"
        )
    return value


def show_facts(notebook: str, values: dict[str, Any]) -> None:
    """Print a notebook's facts as a table and write them to `NN_facts.json` in the figures folder.

    notebook: its number, such as "00"; values: fact → number, string or truth value.
    """
    if not re.fullmatch(r"\d\d", notebook):
        raise ValueError(f"notebook must be its number, such as '00', got {notebook!r}")
    values = {name: _plain(name, value) for name, value in values.items()}
    write_json(figures_folder() / f"{notebook}_facts.json", values)
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")
