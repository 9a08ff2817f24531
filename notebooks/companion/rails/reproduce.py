"""Run the notebooks: `make reproduce`, or `python -m companion.rails.reproduce --help`.

Notable here:
- only what is not up to date runs (`running.py`). First comes the plan with the expected times
  (`costs.py`), then a table of what is done and what is left (`display.py`).
- the default profile is the notebooks' own parameters. The results of any other profile stay out of
  the tree, in the cache, under `profiles/<name>`, until `make publish PROFILE=<name>` copies them
  to `figures/<name>` (`publish.py`).
- after a run of the default profile, the ledger of claims and the pages made of it are written
  again (`claims.py`).
- one run at a time: a second one waits for the first.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from pathlib import Path

from rich.console import Console

from jumprelu.files import cache_root, locked

from .costs import expected_seconds, keep_cost, record_costs
from .display import Display, facts_table
from .figures import ROOT
from .profiles import DEFAULT_PROFILE, check_profile, find_notebooks
from .publish import publish, renew_ledger
from .running import Cost, Failed, base_of, facts_of, read_stamp, run_notebook, up_to_date


def reproduce(
    root: Path,
    profile: str = DEFAULT_PROFILE,
    number: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> bool:
    """Run the notebooks of `root` (all, or one) in a profile and print the tables; True if all
    succeeded.

    force: run also what is up to date. Raises ValueError or FileNotFoundError, before anything
    runs, for a profile or a notebook that is not as it should be.
    """
    console = console or Console()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    chosen = find_notebooks(root, number)
    changed = check_profile(root, profile)
    console.print(f"profile {profile}: looking at what is up to date", highlight=False)
    lock = locked(cache_root() / "locks" / "reproduce", waiting=WAITING)
    with lock:
        current = {
            notebook: not force and up_to_date(root, notebook, profile, changed[notebook.number])
            for notebook in chosen
        }
        left = [notebook for notebook in chosen if not current[notebook]]
        expected = expected_seconds(root, profile, left)
        facts, succeeded = [], True
        with Display(console, profile, current, expected) as display:
            for notebook in chosen:
                if current[notebook]:
                    display.up_to_date(notebook, Cost(**read_stamp(profile, notebook)["cost"]))
                else:
                    display.start(notebook)
                    report = functools.partial(display.report, notebook)
                    parameters = changed[notebook.number]
                    try:
                        cost = run_notebook(root, notebook, profile, parameters, report)
                    except Failed as error:
                        succeeded = False
                        display.failed(notebook, str(error))
                        continue
                    keep_cost(profile, notebook, cost)
                    display.done(notebook, cost)
                found = facts_of(base_of(root, profile) / "figures", notebook)
                facts += [(notebook.number, fact, str(value)) for fact, value in found.items()]
        if facts:
            console.print(facts_table(facts))
        if succeeded and profile == DEFAULT_PROFILE:
            renew_ledger(root, console)
    if succeeded and profile != DEFAULT_PROFILE:
        folder = base_of(root, profile)
        console.print(f"notebooks and figures of this profile: {folder}", soft_wrap=True)
    return succeeded


WAITING = "another `make reproduce` is at work with this cache: waiting until it has ended"


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 if a notebook failed, or 2 if nothing
    could be run."""
    root = root or ROOT
    purpose = "Run the notebooks that are not up to date."
    parser = argparse.ArgumentParser(
        prog="python -m companion.rails.reproduce", description=purpose
    )
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        help="a file of notebooks/profiles (default: %(default)s)",
    )
    parser.add_argument("--notebook", metavar="NN", help="only the notebook with this number")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="run nothing; copy the profile's finished results to figures/",
    )
    parser.add_argument(
        "--record-costs",
        action="store_true",
        help="after the run, write what the notebooks took to notebooks/profiles/costs.json",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list notebooks, profiles and parameters, and run nothing",
    )
    given = parser.parse_args(arguments)
    try:
        if given.list:
            print(
                "profiles:",
                ", ".join(
                    sorted(path.stem for path in (root / "notebooks/profiles").glob("*.yaml"))
                ),
            )
            changed = check_profile(root, given.profile)
            for notebook in find_notebooks(root, given.notebook):
                print(f"\n{notebook.name} in the profile {given.profile}")
                for name, (annotation, default) in notebook.parameters().items():
                    value = changed[notebook.number].get(name, default)
                    print(f"  {name}: {annotation or 'any'} = {value!r}")
            return 0
        if given.publish:
            publish(root, given.profile, given.notebook)
            return 0
        succeeded = reproduce(root, given.profile, given.notebook, given.force)
        if succeeded and given.record_costs:
            record_costs(root, given.profile, find_notebooks(root))
        return 0 if succeeded else 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
