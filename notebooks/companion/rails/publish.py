"""Finished results of another profile than the default, copied to where they can be committed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from jumprelu.files import cache_root, digest, read_json, write_json

from .claims import write_ledger
from .profiles import DEFAULT_PROFILE, Notebook, check_profile, find_notebooks
from .running import conditions, put_into_place, read_stamp, results_of, table_hashes


def finished(figures: Path, notebook: Notebook) -> dict[str, Any] | None:
    """The manifest of a notebook's results in a figures folder if they are there and as its run
    left them, else None."""
    path = figures / f"{notebook.name}.manifest.json"
    manifest = read_json(path) if path.exists() else {}
    made = table_hashes(figures, notebook)
    return (
        manifest
        if manifest
        and made == {name: manifest[name] for name in ("figures", "claims") if name in manifest}
        else None
    )


def publish(
    root: Path, profile: str, number: str | None = None, console: Console | None = None
) -> None:
    """Copy a profile's finished results from the cache to `figures/<profile>`, where they can be
    committed.

    For each notebook (or the one with this number) that has a finished run: PNGs, tables, facts,
    manifest and claims; no PDFs, which are large. `costs.json` beside them says the device and, if
    the run was made here, seconds and memory. What was published of other notebooks stays. Then the
    ledger is made again.

    Raises ValueError for the default profile, FileNotFoundError for an unknown one and if no run
    has finished.
    """
    console = console or Console()
    if profile == DEFAULT_PROFILE:
        raise ValueError(
            f"the results of {profile} are in figures/ as they are: choose another profile with "
            "--profile"
        )
    changed = check_profile(root, profile)
    source, target = cache_root() / "profiles" / profile / "figures", root / "figures" / profile
    chosen = {notebook: finished(source, notebook) for notebook in find_notebooks(root, number)}
    if not any(chosen.values()):
        which = f"notebook {number}" if number else "any notebook"
        raise FileNotFoundError(
            f"{source} has no finished run of {which}: first `make reproduce PROFILE={profile}`"
        )
    for notebook, manifest in chosen.items():
        if manifest is None:
            console.print(f"{notebook.name}: no finished run, nothing to publish")
            continue
        with tempfile.TemporaryDirectory(dir=root, prefix=".figures-") as staging:
            for name in results_of(source, notebook):
                if not name.endswith(".pdf"):
                    shutil.copyfile(source / name, Path(staging) / name)
            put_into_place(Path(staging), target, notebook)
        costs = target / "costs.json"
        cost = {"device": manifest["device"], "threads": manifest["threads"]} | _cost_of(
            profile, notebook, manifest
        )
        write_json(costs, (read_json(costs) if costs.exists() else {}) | {notebook.name: cost})
        now = conditions(root, notebook, changed[notebook.number])
        older = [
            name
            for name in ("source", "code", "parameters", "data", "measured")
            if manifest.get(name) != now[name]
        ]
        note = (
            f"; its {', '.join(older)} changed since it ran: `make reproduce PROFILE={profile}` "
            "runs it again"
            if older
            else ""
        )
        console.print(f"{notebook.name}: published{note}", soft_wrap=True)
    renew_ledger(root, console)


def _cost_of(profile: str, notebook: Notebook, manifest: dict[str, Any]) -> dict[str, float]:
    """Seconds and memory of the run that a manifest is of, or {} if it is not the last one made
    here."""
    stamp = read_stamp(profile, notebook)
    given = {
        name: value
        for name, value in manifest.items()
        if name not in ("figures", "claims", "processor")
    }
    return stamp["cost"] if stamp.get("key") == digest(given) else {}


def renew_ledger(root: Path, console: Console) -> None:
    """Make the ledger of claims, and the pages that show figures and claims, again, in a
    checkout."""
    if (root / "pyproject.toml").exists():  # elsewhere, README is somebody else's
        for path in write_ledger(root):
            console.print(f"{path.relative_to(root)}: written again", highlight=False)
