"""What `make reproduce` shows: which notebooks are done, which are left, and how long they take.

On a terminal a table that changes in place; elsewhere a line at the start and at the end of each
notebook, and one now and then while a long cell runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .profiles import Notebook
from .running import Cost

HEARTBEAT_SECONDS = 30
"""How often a long cell is reported where the output is not a terminal."""

UP_TO_DATE, LEFT, RUNNING, DONE, FAILED = "up to date", "left", "running", "done", "FAILED"


def clock(seconds: float) -> str:
    """Such as "4:05", minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@dataclass
class _Row:
    state: str
    expected: float | None
    cost: Cost | None = None
    began: float = 0.0
    detail: str = ""


class Display:
    """The notebooks of one run, in order. Use it as a context: it shows the plan when entered, and
    the table when left.

    current: whether a notebook is up to date; expected: seconds of a run, where known.
    """

    def __init__(
        self,
        console: Console,
        profile: str,
        current: Mapping[Notebook, bool],
        expected: Mapping[Notebook, float],
    ):
        self.console, self.profile, self.said = console, profile, 0.0
        self.rows = {
            notebook: _Row(UP_TO_DATE if known else LEFT, expected.get(notebook))
            for notebook, known in current.items()
        }
        self.live = (
            Live(get_renderable=self.table, console=console, refresh_per_second=2)
            if console.is_terminal
            else None
        )

    def table(self) -> Table:
        """The notebooks with their states, and the sums below them."""
        table = Table(title=f"profile {self.profile}")
        for name in ("notebook", "state", "expected", "took", "peak MB"):
            table.add_column(name, justify="left" if name in ("notebook", "state") else "right")
        for notebook, row in self.rows.items():
            took = clock(row.cost.seconds) if row.cost else ""
            if row.state == RUNNING:
                took = clock(time.monotonic() - row.began)
            state = f"{row.state}, {row.detail}" if row.detail else row.state
            expected = "" if row.expected is None else clock(row.expected)
            memory = str(row.cost.peak_mb) if row.cost else ""
            table.add_row(notebook.name, state, expected, took, memory)
        took = sum(row.cost.seconds for row in self.rows.values() if row.cost)
        table.add_section()
        table.add_row("in all", self.left(), "", clock(took) if took else "")
        return table

    def left(self) -> str:
        """How much is left to do, in words."""
        waiting = [row for row in self.rows.values() if row.state in (LEFT, RUNNING)]
        if not waiting:
            return "nothing left"
        unknown = sum(row.expected is None for row in waiting)
        seconds = 0.0
        for row in waiting:
            spent = time.monotonic() - row.began if row.state == RUNNING else 0.0
            seconds += max(0.0, (row.expected or 0.0) - spent)
        words = f"{len(waiting)} of {len(self.rows)} left"
        if unknown < len(waiting):
            words += f", about {clock(seconds)}"
        if unknown:
            words += f", {unknown} of unknown length"
        return words

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
            return self
        for notebook, row in self.rows.items():
            if row.state == LEFT:
                length = "unknown" if row.expected is None else f"about {clock(row.expected)}"
                self._say(f"{notebook.name}: to run, expected time {length}")
        self._say(self.left())
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
        else:
            self.console.print(self.table())

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def up_to_date(self, notebook: Notebook, cost: Cost) -> None:
        """The notebook need not run; cost: of the run that left its results."""
        row = self.rows[notebook]
        row.state, row.cost = UP_TO_DATE, None
        self._say(f"{notebook.name}: up to date (its run took {clock(cost.seconds)})")

    def start(self, notebook: Notebook) -> None:
        row = self.rows[notebook]
        row.state, row.began = RUNNING, time.monotonic()
        self.said = row.began
        if not self.live:
            self._say(f"{notebook.name}: running")

    def report(self, notebook: Notebook, detail: str) -> None:
        """What the running notebook is doing; called a few times a second."""
        row = self.rows[notebook]
        news = not detail.startswith("cell ") and detail != row.detail
        row.detail = detail
        now = time.monotonic()
        if news or (not self.live and now - self.said > HEARTBEAT_SECONDS):
            self.said = now
            of = "" if row.expected is None else f" of about {clock(row.expected)}"
            self._say(f"{notebook.name}: {detail}, {clock(now - row.began)}{of}")

    def done(self, notebook: Notebook, cost: Cost) -> None:
        row = self.rows[notebook]
        row.state, row.cost, row.detail = DONE, cost, ""
        self._say(f"{notebook.name}: done in {clock(cost.seconds)}; {self.left()}")

    def failed(self, notebook: Notebook, why: str) -> None:
        row = self.rows[notebook]
        row.state, row.detail = FAILED, ""
        self._say(f"{notebook.name}: FAILED {why}")


def facts_table(facts: Sequence[tuple[str, str, str]]) -> Table:
    """Rows of (notebook, fact, value)."""
    table = Table("notebook", "fact", "value")
    for row in facts:
        table.add_row(*row)
    return table
