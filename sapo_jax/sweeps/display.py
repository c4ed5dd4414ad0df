"""What a sweep shows: how its runs get on in a terminal, a line for each change in a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sapo_jax.io.files import METRICS
from sapo_jax.sweeps.job import Job
from sapo_jax.text import clock_time, visible

_RUNS_IN_PANEL = 12
_REFRESH = 1.0  # seconds between two looks at the logs
_NOTE_CHARACTERS = 8000  # so much of a failure's note is shown
_STYLE = {
    "finished": "green",
    "skipped": "green",
    "running": "cyan",
    "failed": "bold red",
    "busy": "yellow",
}
_DONE = ("finished", "skipped")
# The order of the runs in the panel: those that want a look come first.
_PANEL_ORDER = ("running", "failed", "busy", "stopped", *_DONE, "left")


class MetricsFollower:
    """Reads a metrics.jsonl as it grows.

    It keeps the stage and its newest step, and the first and the newest held-out accuracy.
    """

    def __init__(self, path: Path):
        self._path = path
        self._start_over()

    def _start_over(self) -> None:
        self._offset = 0  # bytes of whole lines that are read
        self.stage = ""  # cold_start or rl; "" before the first row
        self.step = 0  # of the stage
        self.held_out: list[float] = []  # the first and the newest one

    def read(self) -> None:
        """Reads what is new.

        A run that resumes cuts its log back. Then the log is read again from its beginning, if need
        be at the next call.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            if size < self._offset:
                self._start_over()
            file.seek(self._offset)
            *whole_lines, rest = file.read().split(b"\n")
            self._offset = file.tell() - len(rest)
        try:
            for line in whole_lines:
                self._take(json.loads(line))
        except ValueError:
            # The log was cut back and has grown past the offset since: this is half of a line.
            self._start_over()

    def _take(self, row: dict[str, Any]) -> None:
        self.stage = row["stage"]
        self.step = row["step"]
        if "held_out/avg" in row:
            first = self.held_out[:1]
            self.held_out = [*first, float(row["held_out/avg"])]

    @property
    def rl_step(self) -> int:
        """0 before the RL stage."""
        if self.stage == "rl":
            return self.step
        return 0

    def __str__(self) -> str:
        """The accuracies: `25.0 % -> 29.0 %`."""
        return " -> ".join(f"{100 * accuracy:.1f} %" for accuracy in self.held_out)


class SweepDisplay:
    """A context manager; `console` defaults to one on stdout."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
        self._clock = clock
        self._started = clock()
        self._last_update = float("-inf")
        # By the name of the run:
        self._followers: dict[str, MetricsFollower] = {}
        self._steps_before: dict[str, int] = {}  # there when this sweep first saw the run
        self._states: dict[str, str] = {}  # at the last update
        self._stages: dict[str, str] = {}  # of the running jobs, likewise

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line as it is, without markup; nothing for an empty text."""
        if text:
            self.console.print(Text(text), soft_wrap=True)

    def update(self, jobs: Sequence[Job]) -> None:
        """Shows where the jobs are.

        Their logs are read once a second, and whenever a state changes.
        """
        states = {job.run.name: job.state for job in jobs}
        if states == self._states and self._clock() < self._last_update + _REFRESH:
            return
        for job in jobs:
            self._follow(job)
        if self._live is not None:
            self._live.update(self._panel(jobs), refresh=True)
        else:
            for job in jobs:
                if self._has_changed(job):
                    self.say(self._change_line(job, jobs))
        self._states = dict(states)
        for job in jobs:
            self._stages[job.run.name] = self._followers[job.run.name].stage
        self._last_update = self._clock()

    def outcome(self, jobs: Sequence[Job]) -> None:
        """After the last process: a table of the runs, and why some failed."""
        if self._live is not None:
            self._live.stop()
        for job in jobs:
            self._follow(job)
        self.console.print(self._table(jobs))
        for job in jobs:
            if job.state in ("failed", "busy"):
                head = (f"{job.run.name} {job.state}: ", _STYLE[job.state])
                note = visible(job.note, limit=_NOTE_CHARACTERS, encoding=self.console.encoding)
                self.console.print(Text.assemble(head, note), soft_wrap=True)

    def _follow(self, job: Job) -> None:
        """Reads the job's log, unless nothing can be new in it."""
        name = job.run.name
        is_new = name not in self._followers
        if is_new:
            self._followers[name] = MetricsFollower(job.run.folder / METRICS)
        follower = self._followers[name]
        if is_new or job.state == "running" or job.state != self._states.get(name):
            follower.read()
        self._steps_before.setdefault(name, follower.rl_step)

    def _has_changed(self, job: Job) -> bool:
        """Whether the job has another state than at the last update or, running, another stage."""
        name = job.run.name
        if job.state != self._states.get(name, "left"):
            return True
        if job.state != "running":
            return False
        stage = self._followers[name].stage
        return stage != self._stages.get(name, "")

    def _change_line(self, job: Job, jobs: Sequence[Job]) -> str:
        name = job.run.name
        what = str(self._followers[name])
        if job.state == "running":
            what = self._stage(job)
        return f"{job.state:9}{name}  {what}  [{self._counts(jobs)}]"

    def _stage(self, job: Job) -> str:
        """What a job does: it starts (reads its data, compiles), or the stage that it is in."""
        if job.state == "running":
            stage = self._followers[job.run.name].stage
            return {"": "starting", "cold_start": "cold start", "rl": "RL"}[stage]
        return ""

    def _progress(self, job: Job) -> str:
        """The step of its stage and the stage's length; of a run that does not run, the RL step."""
        follower = self._followers[job.run.name]
        cfg = job.run.cfg
        in_cold_start = job.state == "running" and follower.stage == "cold_start"
        if in_cold_start or job.run.is_cold_start:
            return f"{follower.step}/{cfg.cold_start.steps}"
        return f"{follower.rl_step}/{cfg.train.steps}"

    def _counts(self, jobs: Sequence[Job]) -> str:
        """How many jobs are in which state, and how long it may take."""
        count = Counter(job.state for job in jobs)
        done = sum(count[state] for state in _DONE)
        parts = [
            f"{done}/{len(jobs)} done",
            f"{count['running']} running",
            f"{count['failed']} failed",
            f"{count['left']} left",
        ]
        parts += [f"{count[state]} {state}" for state in ("busy", "stopped") if count[state]]
        seconds = self._seconds_left(jobs)
        if seconds is not None:
            parts.append(f"ETA {clock_time(seconds)}")
        return ", ".join(parts)

    def _seconds_left(self, jobs: Sequence[Job]) -> float | None:
        """An estimate, by the RL steps taken since this sweep started and those that are left.

        None before the first step, and where none is left.
        """
        steps_taken = 0
        steps_left = 0
        for job in jobs:
            if job.run.is_cold_start:
                continue
            name = job.run.name
            step = self._followers[name].rl_step
            if job.state != "skipped":
                steps_taken += step - self._steps_before[name]
            if job.state in ("left", "running"):
                steps_left += max(job.run.cfg.train.steps - step, 0)
        if steps_taken <= 0 or steps_left == 0:
            return None
        return (self._clock() - self._started) * steps_left / steps_taken

    def _panel(self, jobs: Sequence[Job]) -> Panel:
        all_steps = 0
        steps_taken = 0
        for job in jobs:
            if job.run.is_cold_start:
                continue
            steps = job.run.cfg.train.steps
            all_steps += steps
            steps_taken += min(self._followers[job.run.name].rl_step, steps)
        bar = Table.grid(expand=True)  # a bar by itself would not end its line
        bar.add_row(ProgressBar(total=all_steps, completed=steps_taken))
        in_order = sorted(jobs, key=lambda job: _PANEL_ORDER.index(job.state))
        parts = [Text(self._counts(jobs)), bar, self._table(in_order[:_RUNS_IN_PANEL])]
        if len(jobs) > _RUNS_IN_PANEL:
            parts.append(Text(f"and {len(jobs) - _RUNS_IN_PANEL} more", style="dim"))
        return Panel(Group(*parts), title="sapo-jax sweep", title_align="left", border_style="cyan")

    def _table(self, jobs: Sequence[Job]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("run")
        table.add_column("")
        table.add_column("stage")
        table.add_column("step", justify="right")
        table.add_column("held-out accuracy")
        for job in jobs:
            follower = self._followers[job.run.name]
            name = Text(job.run.name)
            state = Text(job.state, style=_STYLE.get(job.state, "dim"))
            table.add_row(name, state, self._stage(job), self._progress(job), str(follower))
        return table
