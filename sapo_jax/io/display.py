"""What a run shows in the terminal: a live panel per step, sampled completions, the final summary.

Where the output is not a terminal (a file, CI), the panel becomes one plain line every few steps.
Model output is shown as text: markup is not interpreted, and control characters appear as escapes
such as \\x1b.
"""

from __future__ import annotations

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
from sapo_jax.text import clock_time, visible

# What the panel shows, in order: a label, the format of a value, and metrics, whose values are
# joined by "/" as far as they are there.
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


def _cells(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, text) of what the row holds."""
    cells = []
    for label, form, names in _CELLS:
        values = [form.format(metrics[name]) for name in names if name in metrics]
        if values:
            cells.append((label, "/".join(values)))
    return cells


class Display:
    """What a run shows in the terminal; a context manager."""

    def __init__(
        self,
        console: Console | None = None,
        every: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        """every: steps between plain lines, where the output is not a terminal."""
        self.console = console or Console()
        self._every = every
        self._clock = clock
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
        self._stage = ""
        self._first_step = 0  # of this process in the stage
        self._first_step_end = 0.0  # when that step ended
        self._held_out: dict[str, float] = {}  # the last evaluation, kept in view

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show the row of one step; `metrics` as in metrics.jsonl, times in seconds."""
        if stage != self._stage:
            self._stage = stage
            self._first_step = step
            self._first_step_end = self._clock()
        shown_metrics = dict(metrics)
        if stage == "rl":
            if "held_out/avg" in metrics:
                self._held_out = {"held_out/avg": metrics["held_out/avg"]}
            shown_metrics = self._held_out | shown_metrics
        cells = _cells(shown_metrics)
        phases = {}
        for name, value in metrics.items():
            if name.startswith("time/"):
                phases[name.removeprefix("time/")] = value
        eta = self._eta(step, total)
        if self._live:
            panel = _panel(stage, step, total, cells, phases, eta)
            self._live.update(panel, refresh=True)
            return
        is_due = step % self._every == 0 or step in (self._first_step, total)
        if is_due or "held_out/avg" in metrics:
            line = _plain_line(stage, step, total, cells, phases, eta)
            self.console.print(Text(line), soft_wrap=True)

    def _eta(self, step: int, total: int) -> str:
        """The time that is left, from this process's second step on: the first one compiles."""
        steps_timed = step - self._first_step
        if steps_timed <= 0:
            return ""
        seconds_per_step = (self._clock() - self._first_step_end) / steps_timed
        return clock_time(seconds_per_step * max(total - step, 0))

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Print completions, as text.

        The keys of a row are `question`, `completion`, `status` and, where there are some, `reward`
        and `advantage`.
        """
        encoding = self.console.encoding
        for row in rows:
            status = str(row.get("status", "?"))
            style = _STATUS_STYLE.get(status, "magenta")
            head = Text(visible(status, encoding=encoding), style=style)
            if row.get("reward") is not None:
                head.append(f"  reward {float(row['reward']):.3f}", style="default")
            if row.get("advantage") is not None:
                head.append(f"  advantage {float(row['advantage']):+.3f}", style="default")
            body = Table.grid(padding=(0, 1))
            for name in ("question", "completion"):
                text = visible(str(row.get(name, "")), encoding=encoding)
                body.add_row(Text(name, style="dim"), Text(text))
            self.console.print(Panel(body, title=head, title_align="left", border_style="dim"))

    def summary(
        self,
        summary: Mapping[str, Any],
        run_dir: str | Path,
        plot: str | Path | None = None,
        tensorboard: bool = True,
    ) -> None:
        """Print `summary_table`, then where everything is; the live panel stays above, as it is."""
        if self._live:
            self._live.stop()
        self.console.print(summary_table(summary))
        lines: dict[str, Any] = {}
        if summary.get("seconds") is not None:
            lines["time"] = clock_time(summary["seconds"])
        lines["run folder"] = run_dir
        if plot is not None:
            lines["plot"] = plot
        if tensorboard:
            lines["TensorBoard"] = f"tensorboard --logdir {shlex.quote(f'{run_dir}/tb')}"
        for name, value in lines.items():
            self.console.print(Text(f"{name + ':':13}{value}"), soft_wrap=True)


def open_display() -> Display:
    """A display that shows nothing where this is not the first of several processes."""
    if is_first():
        return Display()
    return Display(Console(quiet=True, force_terminal=False))


def _plain_line(
    stage: str,
    step: int,
    total: int,
    cells: list[tuple[str, str]],
    phases: Mapping[str, float],
    eta: str,
) -> str:
    parts = [f"{stage} {step}/{total}"]
    parts += [f"{label} {text}" for label, text in cells]
    if phases:
        seconds = [f"{name} {value:.1f}" for name, value in phases.items()]
        parts.append("seconds: " + " ".join(seconds))
    if eta:
        parts.append(f"ETA {eta}")
    return "  ".join(parts)


def _panel(
    stage: str,
    step: int,
    total: int,
    cells: list[tuple[str, str]],
    phases: Mapping[str, float],
    eta: str,
) -> Panel:
    """The live panel: a progress bar, the metrics in three columns, the seconds of each phase."""
    eta_text = ""
    if eta:
        eta_text = f"ETA {eta}"
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column()
    bar.add_column(ratio=1)
    bar.add_column(justify="right")
    bar.add_row(f"step {step}/{total}", ProgressBar(total=total, completed=step), eta_text)
    grid = Table.grid(padding=(0, 2))
    texts = [Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in cells]
    for start in range(0, len(texts), 3):
        grid.add_row(*texts[start : start + 3])
    seconds = "  ".join(f"{name} {value:.1f} s" for name, value in phases.items())
    return Panel(
        Group(bar, grid, Text(seconds, style="dim")),
        title=Text(f"sapo-jax {stage}"),
        title_align="left",
        border_style="cyan",
    )


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Held-out figures before and after RL, in percent.

    Keys, all optional: held_out_before, held_out_after, pass_before, pass_after (0..1);
    interval_before, interval_after (95 %, pairs); held_out_samples (completions graded in one
    evaluation); k (completions per problem); cold_start_steps; rl_steps.
    """
    title = None
    if "rl_steps" in summary:
        title = f"held-out accuracy after {summary['rl_steps']} RL steps"
    heading_before = "before RL"
    if summary.get("cold_start_steps"):
        heading_before = "after cold start"
    table = Table(title=title)
    table.add_column("")
    for heading in (heading_before, "after RL", "change"):
        table.add_column(heading, justify="right")

    k = summary.get("k", "k")
    samples = ""
    if "held_out_samples" in summary:
        samples = f", {summary['held_out_samples']:.0f} samples"
    has_accuracy = _add_summary_row(table, f"accuracy (avg@{k}{samples})", summary, "held_out")
    if has_accuracy and "interval_before" in summary:
        intervals = []
        for when in ("before", "after"):
            low, high = summary[f"interval_{when}"]
            intervals.append(f"{100 * low:.1f} to {high:.1%}")
        table.add_row("    95 % interval", *intervals, "")
    _add_summary_row(table, f"solved at least once (pass@{k})", summary, "pass")
    return table


def _add_summary_row(table: Table, label: str, summary: Mapping[str, Any], key: str) -> bool:
    """Add figures before and after, and their difference. Returns whether there were any."""
    before = summary.get(f"{key}_before")
    after = summary.get(f"{key}_after")
    if before is None and after is None:
        return False
    change = ""
    if before is not None and after is not None:
        change = f"{100 * (after - before):+.1f} points"
    table.add_row(label, _percent(before), _percent(after), change)
    return True


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%}"
