"""Pages for people, made of what the notebooks left in `figures/`.

Notable here:
- four texts: all claims (figures/LEDGER.md), all figures (figures/README.md), and two blocks of
  README: each notebook's question and answer, and the claims that matter most.
- which claims those are, and the words around the numbers, stand in `headlines.yaml` beside this
  file. The numbers are never typed: `{J3b}` in an answer becomes the interval of claim J3b.
- what a figure shows, and which figure of a paper it redoes, is in the docstring of the function
  that draws it.

`python -m companion.rails.claims` writes all of it (`claims.py`).
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from jumprelu.files import read_json

from .figures import drawing_functions
from .profiles import DEFAULT_PROFILE

HEADLINES = "notebooks/companion/rails/headlines.yaml"
GENERATED = "<!-- Made by `python -m companion.rails.claims`; edits here are overwritten. -->"

LEDGER_HEAD = f"""# The ledger of claims

{GENERATED}

Every claim that a notebook tested. Nobody writes a verdict: a notebook computes a quantity with its
95 % interval and names the region in which the claim is true. An interval inside the region:
*reproduced*. One outside of it: *not reproduced*. One that reaches over its edge: *undecided*. The
language model is small and runs are short; what would need more is marked *out of reach at this
scale*, with what it would take. [claims.csv](claims.csv) has the same rows for programs."""

FIGURES_HEAD = f"""# The figures

{GENERATED}

Each notebook writes its figures here: as PNG and PDF, and the plotted numbers as CSV. The first
line of a CSV has a hash of its numbers and one of the code that drew them;
`companion.rails.figures.read_figure_data` reads it, and the function in the third column draws it
again.

Also here: [LEDGER.md](LEDGER.md), all claims; `NN_facts.json`, a notebook's table of facts;
`NN_*.manifest.json`, what a notebook's results were made from; `benchmark*.csv` and `gpu_*.csv`,
what `make benchmark` and `make gpu-evidence` measured. A folder holds another profile's results
(`make publish`)."""

# ---- markdown


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table; bars in cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def with_block(text: str, name: str, content: str) -> str:
    """The text with `content` between the lines <!-- name --> and <!-- /name -->, and nothing else
    there.

    Raises ValueError unless each marker is there once, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"README.md must have the lines {begin} and {end}, each once and in this order: "
            "put them where the generated block belongs"
        )
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def titles(root: Path) -> dict[str, tuple[str, str]]:
    """Notebook number → (file name without suffix, first heading) of the checkout `root`."""
    found = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.py")):
        heading = re.search(r"^# # (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found[path.name[:2]] = path.stem, heading[1] if heading else path.stem[3:]
    return found


def _link(folder: str, figure: str, profile: str) -> str:
    """A link to a figure from a page in the checkout (`folder` "figures/") or in figures/ ("")."""
    if not figure:
        return ""
    place = folder if profile == DEFAULT_PROFILE else f"{folder}{profile}/"
    return f"[{figure}]({place}{figure}.png)"


# ---- claims


def measured(row: pd.Series, digits: int = 6) -> str:
    """The numbers of a claim: "0.969 [0.946, 0.993]"."""
    if math.isnan(row.value):
        return "not measured"
    value, low, high = (f"{number:.{digits}g}" for number in (row.value, row.low, row.high))
    if math.isnan(row.low) or math.isnan(row.high):
        return f"{value}, without an interval"
    return f"{value} [{low}, {high}]"


def _verdict(row: pd.Series) -> str:
    return f"{row.verdict}: {row.reason}" if row.reason else row.verdict


def counts(frame: pd.DataFrame, verdicts: tuple[str, ...]) -> str:
    """How many claims have which verdict: a row a notebook and profile, and one of all."""
    rows = []
    for (profile, notebook), part in frame.groupby(["profile", "notebook"], sort=False):
        found = [part.verdict.eq(verdict).sum() for verdict in verdicts]
        rows.append((profile != DEFAULT_PROFILE, profile, notebook, found))
    rows.sort(key=lambda row: row[:3])
    shown = [[row[2], row[1], *map(str, row[3]), str(sum(row[3]))] for row in rows]
    sums = [frame.verdict.eq(verdict).sum() for verdict in verdicts]
    shown.append(["all", "", *map(str, sums), str(sum(sums))])
    return _table(["notebook", "profile", *verdicts, "all"], shown)


def ledger_page(root: Path, frame: pd.DataFrame, verdicts: tuple[str, ...]) -> str:
    """figures/LEDGER.md: every claim of :func:`claims.collect`, by notebook."""
    parts = [
        LEDGER_HEAD,
        counts(frame, verdicts),
    ]
    names = titles(root)
    for number, rows in frame.groupby("notebook", sort=True):
        stem, title = names.get(number, (number, number))
        parts.append(f"## {number} [{title}](../notebooks/{stem}.ipynb)")
        cells = [
            [
                row.id,
                row.paper,
                row.claim,
                f"{row.quantity}: {measured(row)}",
                _verdict(row),
                _link("", row.figure, row.profile),
                row.profile,
            ]
            for _, row in rows.iterrows()
        ]
        header = ["id", "paper", "claim", "measured: value [interval]", "verdict", "figure"]
        parts.append(_table([*header, "profile"], cells))
    return "\n\n".join(parts) + "\n"


# ---- README's blocks


class Headlines(NamedTuple):
    """What `headlines.yaml` says."""

    claims: dict[str, str | None]
    """Id → a sentence in place of the ledger's, or None."""
    notebooks: dict[str, dict[str, str]]
    """Number → "question" and "answer"."""


def read_headlines(root: Path) -> Headlines | None:
    """`headlines.yaml` of a checkout, None if it has none. Raises ValueError for another form."""
    import yaml

    path = root / HEADLINES
    if not path.exists():
        return None
    try:
        headlines = Headlines(**yaml.safe_load(path.read_text(encoding="utf-8")))
        right = all(set(each) == {"question", "answer"} for each in headlines.notebooks.values())
    except (TypeError, AttributeError, yaml.YAMLError):
        right = False
    if not right:
        raise ValueError(
            f"{HEADLINES} must have `claims`, ids with or without a sentence, and `notebooks`, "
            "numbers with `question` and `answer`"
        )
    return headlines


def _row(frame: pd.DataFrame, id: str) -> pd.Series:
    rows = frame[(frame.id == id) & (frame.profile == DEFAULT_PROFILE)]
    if len(rows) != 1:
        raise ValueError(
            f"{HEADLINES} names the claim {id}, which is in the ledger of the default profile "
            f"{len(rows)} times: choose another, or mend its id in the notebook"
        )
    return rows.iloc[0]


def filled(text: str, frame: pd.DataFrame, facts: dict[str, Any]) -> str:
    """The text with numbers in place of what stands in braces.

    {J3b}: value and interval of that claim, three digits; {fact: bits per byte}: that fact of the
    notebook. Raises ValueError for a claim or a fact that is not there.
    """

    def number(match: re.Match) -> str:
        name = match[1].strip()
        if not name.startswith("fact:"):
            return measured(_row(frame, name), digits=3)
        fact = name.removeprefix("fact:").strip()
        if fact not in facts:
            raise ValueError(
                f"{HEADLINES} names the fact {fact!r}; the notebook's facts are "
                + "; ".join(sorted(facts))
            )
        return str(facts[fact])

    return re.sub(r"\{([^{}]+)\}", number, text)


def notebook_table(root: Path, frame: pd.DataFrame, headlines: Headlines) -> str:
    """README's block of notebooks: question and answer of each."""
    rows = []
    for number, (stem, title) in titles(root).items():
        if number not in headlines.notebooks:
            raise ValueError(f"{HEADLINES} has no question and answer for notebook {number}")
        path = root / f"figures/{number}_facts.json"
        facts = read_json(path) if path.exists() else {}
        entry = headlines.notebooks[number]
        link = f"[{number} {title}](notebooks/{stem}.ipynb)"
        rows.append([link, entry["question"], filled(entry["answer"], frame, facts)])
    return _table(["notebook", "question", "answer, as measured [95 % interval]"], rows)


def headline_table(frame: pd.DataFrame, headlines: Headlines) -> str:
    """README's block of claims: those of `headlines.yaml`, in its order."""
    rows = []
    for id, sentence in headlines.claims.items():
        row = _row(frame, id)
        rows.append(
            [
                id,
                row.paper,
                sentence or row.claim,
                f"{row.quantity}: {measured(row, digits=3)}",
                _verdict(row),
                _link("figures/", row.figure, row.profile),
            ]
        )
    header = ["id", "who claims it", "claim", "measured here [95 % interval]", "verdict", "figure"]
    return _table(header, rows)


# ---- the page of figures


def described(path: Path, function: str) -> tuple[str, str]:
    """(what a plot shows, where in the papers) from its docstring: its first paragraph, and the
    line that begins with "Paper:"; '' for what it does not have."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            shows, *others = (" ".join(each.split()) for each in paragraphs)
            papers = [each[6:].strip() for each in others if each.startswith("Paper:")]
            return shows.rstrip("."), papers[0].rstrip(".") if papers else ""
    raise ValueError(f"{path} has no function {function}")


def figures_page(root: Path) -> str:
    """figures/README.md: each figure, what it shows, what draws it, from which numbers, and which
    figure of a paper it redoes; '' for a checkout without figures."""
    drawn = drawing_functions(root)
    if not drawn:
        return ""
    parts = [
        FIGURES_HEAD,
    ]
    others = sorted(path.parent.name for path in root.glob("figures/*/*_facts.json"))
    for number, (stem, title) in titles(root).items():
        rows = []
        for name, function in drawn.items():
            if name[:2] != number:
                continue
            module, _, plot = function.partition(":")
            source = f"notebooks/{module.replace('.', '/')}.py"
            shows, paper = described(root / source, plot)
            by = f"[`{module.removeprefix('companion.')}.{plot}`](../{source})"
            rows.append([f"[{name}]({name}.png)", shows, by, f"[csv]({name}.csv)", paper])
        if not rows:
            continue
        parts.append(f"## {number} [{title}](../notebooks/{stem}.ipynb)")
        parts.append(_table(["figure", "shows", "drawn by", "numbers", "in the papers"], rows))
        for profile in dict.fromkeys(others):
            pictures = sorted((root / "figures" / profile).glob(f"{number}_*.png"))
            links = [f"[{path.stem}]({profile}/{path.name})" for path in pictures]
            if links:
                parts.append(f"Of the profile {profile}: {', '.join(links)}.")
    return "\n\n".join(parts) + "\n"
