"""What a sweep shows in the terminal: how its runs are getting on; in a file, one line for each thing that happens."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sapo_jax.io.display import clock_time, visible

if TYPE_CHECKING:
    from sapo_jax.sweeps.job import Job

_SHOWN = 12  # runs in the live panel
_REFRESH = 1.0  # seconds
_STYLE = {
    "finished": "green",
    "skipped": "green",
    "running": "cyan",
    "failed": "bold red",
    "busy": "yellow",
}
_DONE = ("finished", "skipped")


class Follower:
    """Reads a metrics.jsonl as it grows; keeps the newest RL step and the first and the newest held-out accuracy."""

    def __init__(self, path: Path):
        self._path = path
        self._start_over()

    def _start_over(self) -> None:
        self._offset, self.step = 0, 0
        self.held_out: list[float] = []  # at most two

    def read(self) -> None:
        """What is new. A log that was cut back, by a run that resumed, is read from its beginning."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._start_over()
            file.seek(self._offset)
            *lines, torn = file.read().split(b"\n")
            self._offset = file.tell() - len(torn)
        try:
            for row in map(json.loads, lines):
                self._take(row)
        except ValueError:  # it was cut back and has grown past the offset since
            self._start_over()

    def _take(self, row: dict) -> None:
        if row["stage"] == "rl":
            self.step = row["step"]
            if "held_out/avg" in row:
                self.held_out = [*self.held_out[:1], float(row["held_out/avg"])]

    def __str__(self) -> str:
        return " -> ".join(f"{100 * value:.1f} %" for value in self.held_out)


class SweepDisplay:
    """A context manager; `console` defaults to one on stdout."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console()
        self._clock, self._started, self._last = clock, clock(), float("-inf")
        self._live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )
        self._followers: dict[str, Follower] = {}
        self._before: dict[str, int] = {}  # steps that were there when this sweep first saw the run
        self._states: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        if text:
            self.console.print(Text(text), soft_wrap=True)

    def update(self, jobs: Sequence[Job]) -> None:
        """Shows where the jobs are; reads their logs once a second, and whenever a state changes."""
        states = {job.run.name: job.state for job in jobs}
        if states == self._states and self._clock() < self._last + _REFRESH:
            return
        for job in jobs:
            self._follow(job)
        if self._live:
            self._live.update(self._panel(jobs), refresh=True)
        else:
            for job in jobs:
                if states[job.run.name] != self._states.get(job.run.name, "left"):
                    self.say(
                        f"{job.state:9}{job.run.name}  {self._followers[job.run.name]}  [{self._counts(jobs)}]"
                    )
        self._states, self._last = states, self._clock()

    def outcome(self, jobs: Sequence[Job]) -> None:
        """After the last process: a table of the runs, and why some failed."""
        if self._live:
            self._live.stop()
        for job in jobs:
            self._follow(job)
        self.console.print(self._table(jobs))
        for job in jobs:
            if job.state in ("failed", "busy"):
                note = visible(job.note, limit=8000, encoding=self.console.encoding)
                head = (f"{job.run.name} {job.state}: ", _STYLE[job.state])
                self.console.print(Text.assemble(head, note), soft_wrap=True)

    def _follow(self, job: Job) -> None:
        name, new = job.run.name, job.run.name not in self._followers
        if new:
            self._followers[name] = Follower(job.run.folder / "metrics.jsonl")
        if new or job.state == "running" or job.state != self._states.get(name):
            self._followers[name].read()
        self._before.setdefault(name, self._followers[name].step)

    def _counts(self, jobs: Sequence[Job]) -> str:
        count = Counter(job.state for job in jobs)
        done = sum(count[state] for state in _DONE)
        others = "".join(
            f", {count[state]} {state}" for state in ("busy", "stopped") if count[state]
        )
        eta = self._seconds_left(jobs)
        text = f"{done}/{len(jobs)} done, {count['running']} running, {count['failed']} failed, {count['left']} left"
        return text + others + ("" if eta is None else f", ETA {clock_time(eta)}")

    def _seconds_left(self, jobs: Sequence[Job]) -> float | None:
        """By the RL steps taken since this sweep started and those that are left; None before the first one."""
        step = lambda job: self._followers[job.run.name].step
        taken = sum(
            step(job) - self._before[job.run.name] for job in jobs if job.state != "skipped"
        )
        left = sum(
            max(job.run.cfg.train.steps - step(job), 0)
            for job in jobs
            if job.state in ("left", "running")
        )
        return (self._clock() - self._started) * left / taken if taken > 0 and left else None

    def _panel(self, jobs: Sequence[Job]) -> Panel:
        total = sum(job.run.cfg.train.steps for job in jobs)
        steps = sum(
            min(self._followers[job.run.name].step, job.run.cfg.train.steps) for job in jobs
        )
        order = sorted(
            jobs,
            key=lambda job: ("running", "failed", "busy", "stopped", *_DONE, "left").index(
                job.state
            ),
        )
        bar = Table.grid(expand=True)  # by itself the bar would not end its line
        bar.add_row(ProgressBar(total=total, completed=steps))
        parts = [Text(self._counts(jobs)), bar, self._table(order[:_SHOWN])]
        if len(jobs) > _SHOWN:
            parts.append(Text(f"and {len(jobs) - _SHOWN} more", style="dim"))
        return Panel(Group(*parts), title="sapo-jax sweep", title_align="left", border_style="cyan")

    def _table(self, jobs: Sequence[Job]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("run", "", "RL step", "held-out accuracy"):
            table.add_column(heading, justify="right" if heading == "RL step" else "left")
        for job in jobs:
            follower = self._followers[job.run.name]
            state = Text(job.state, style=_STYLE.get(job.state, "dim"))
            table.add_row(
                Text(job.run.name),
                state,
                f"{follower.step}/{job.run.cfg.train.steps}",
                str(follower),
            )
        return table
