"""What a run shows in the terminal: a live panel per step, sampled completions, the final summary.

Where the output is not a terminal (a file, CI) the panel becomes one plain line every few steps. Model output is shown
as text: markup is not interpreted and control characters appear as escapes such as \\x1b.
"""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sapo_jax.distributed.processes import is_first

# label, format of each value, metrics (those present are joined by "/")
_CELLS = (
    ("reward", "{:.3f}", ("reward/mean",)),
    ("accuracy", "{:.1%}", ("accuracy/mean",)),
    ("held-out", "{:.1%}", ("held_out/avg",)),
    ("length", "{:.1f}", ("completion/length_mean",)),
    ("truncated", "{:.1%}", ("completion/truncated_fraction",)),
    ("gate +/-", "{:.3f}", ("gate/pos_mean", "gate/neg_mean")),
    ("clip +/-", "{:.1%}", ("clip_fraction/pos_mean", "clip_fraction/neg_mean")),
    ("ratio min/mean/max", "{:.3f}", ("ratio/min", "ratio/mean", "ratio/max")),
    ("entropy", "{:.3f}", ("entropy/mean",)),
    ("replay difference", "{:.1%}", ("router/replay_difference_mean",)),
    ("token accuracy", "{:.1%}", ("accuracy/token",)),
    ("loss", "{:.4f}", ("loss",)),
    ("grad norm", "{:.3f}", ("grad_norm",)),
    ("lr", "{:.1e}", ("learning_rate",)),
)
_STATUS_STYLE = {"ok": "green", "wrong": "red", "unparsable": "yellow"}


def visible(text: str, limit: int = 600, encoding: str = "utf-8") -> str:
    """Untrusted text with control, bidirectional and unencodable characters as escapes; newlines stay."""
    rest = f" ... ({len(text) - limit} more characters)" if len(text) > limit else ""
    shown = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown.encode(encoding, "backslashreplace").decode(encoding) + rest


def clock_time(seconds: float) -> str:
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0")


def _cells(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, text) of what the row holds."""
    cells = []
    for label, form, names in _CELLS:
        if values := [form.format(metrics[name]) for name in names if name in metrics]:
            cells.append((label, "/".join(values)))
    return cells


class Display:
    """A context manager. every: steps between plain lines."""

    def __init__(
        self,
        console: Console | None = None,
        every: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or Console()
        self._every, self._clock = every, clock
        self._live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )
        self._stage, self._started, self._first = "", 0.0, 0
        self._held_out: dict[str, float] = {}  # the last evaluation, kept in view

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Shows the row of one step; `metrics` as in metrics.jsonl, times in seconds."""
        if stage != self._stage:
            self._stage, self._started, self._first = stage, self._clock(), step
        if stage == "rl" and "held_out/avg" in metrics:
            self._held_out = {"held_out/avg": metrics["held_out/avg"]}
        cells = _cells((self._held_out if stage == "rl" else {}) | dict(metrics))
        phases = {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/")}
        # From the second step of this process on: the first one compiles.
        pace = (
            (self._clock() - self._started) / (step - self._first) if step > self._first else None
        )
        eta = "" if pace is None else clock_time(pace * max(total - step, 0))
        if self._live:
            self._live.update(_panel(stage, step, total, cells, phases, eta), refresh=True)
        elif step % self._every == 0 or step in (self._first, total) or "held_out/avg" in metrics:
            line = [f"{stage} {step}/{total}", *(f"{label} {text}" for label, text in cells)]
            if phases:
                line.append(
                    "seconds: " + " ".join(f"{name} {value:.1f}" for name, value in phases.items())
                )
            line += [f"ETA {eta}"] if eta else []
            self.console.print(Text("  ".join(line)), soft_wrap=True)

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Prints completions: `question`, `completion`, `status`, `reward`, `advantage` of each row, as text."""
        for row in rows:
            status = str(row.get("status", "?"))
            head = Text(
                visible(status, encoding=self.console.encoding),
                style=_STATUS_STYLE.get(status, "magenta"),
            )
            for name, form in (("reward", "{:.3f}"), ("advantage", "{:+.3f}")):
                if row.get(name) is not None:
                    head.append(f"  {name} {form.format(float(row[name]))}", style="default")
            body = Table.grid(padding=(0, 1))
            for name in ("question", "completion"):
                text = visible(str(row.get(name, "")), encoding=self.console.encoding)
                body.add_row(Text(name, style="dim"), Text(text))
            self.console.print(Panel(body, title=head, title_align="left", border_style="dim"))

    def summary(
        self, summary: Mapping[str, Any], run_dir: str | Path, plot: str | Path | None = None
    ) -> None:
        """Prints `summary_table`, then where everything is; the live panel stays as it is, above."""
        if self._live:
            self._live.stop()
        self.console.print(summary_table(summary))
        seconds = summary.get("seconds")
        places = {
            "time": None if seconds is None else clock_time(seconds),
            "run folder": run_dir,
            "plot": plot,
            "TensorBoard": f"tensorboard --logdir {shlex.quote(f'{run_dir}/tb')}",
        }
        for name, place in places.items():
            if place is not None:
                self.console.print(Text(f"{name + ':':13}{place}"), soft_wrap=True)


def open_display() -> Display:
    """A display that shows nothing where this is not the first of several processes."""
    return Display(None if is_first() else Console(quiet=True, force_terminal=False))


def _panel(
    stage: str,
    step: int,
    total: int,
    cells: list[tuple[str, str]],
    phases: Mapping[str, float],
    eta: str,
) -> Panel:
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column()
    bar.add_column(ratio=1)
    bar.add_column(justify="right")
    bar.add_row(
        f"step {step}/{total}",
        ProgressBar(total=total, completed=step),
        f"ETA {eta}" if eta else "",
    )
    grid = Table.grid(padding=(0, 2))
    for start in range(0, len(cells), 3):
        grid.add_row(
            *(
                Text.assemble((f"{label} ", "dim"), (text, "bold"))
                for label, text in cells[start : start + 3]
            )
        )
    seconds = Text(
        "  ".join(f"{name} {value:.1f} s" for name, value in phases.items()), style="dim"
    )
    return Panel(
        Group(bar, grid, seconds),
        title=Text(f"sapo-jax {stage}"),
        title_align="left",
        border_style="cyan",
    )


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Held-out figures before and after RL, in percent.

    Keys, all optional: held_out_before, held_out_after, pass_before, pass_after (0..1), interval_before, interval_after
    (95 %, pairs), held_out_samples (completions judged in one evaluation), k (completions per problem),
    cold_start_steps, rl_steps.
    """
    k = summary.get("k", "k")
    samples = (
        f", {summary['held_out_samples']:.0f} samples" if "held_out_samples" in summary else ""
    )
    table = Table(
        title=f"held-out accuracy after {summary['rl_steps']} RL steps"
        if "rl_steps" in summary
        else None
    )
    table.add_column("")
    for heading in (
        "after cold start" if summary.get("cold_start_steps") else "before RL",
        "after RL",
        "change",
    ):
        table.add_column(heading, justify="right")
    for label, key in (
        (f"accuracy (avg@{k}{samples})", "held_out"),
        (f"solved at least once (pass@{k})", "pass"),
    ):
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if before is None and after is None:
            continue
        change = "" if before is None or after is None else f"{100 * (after - before):+.1f} points"
        table.add_row(label, *("-" if x is None else f"{x:.1%}" for x in (before, after)), change)
        if key == "held_out" and "interval_before" in summary:
            intervals = (summary["interval_before"], summary["interval_after"])
            table.add_row(
                "    95 % interval",
                *(f"{100 * low:.1f} to {high:.1%}" for low, high in intervals),
                "",
            )
    return table
