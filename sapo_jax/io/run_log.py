"""What a run leaves on disk to look at: .jsonl logs, TensorBoard events, summary.json.

metrics.jsonl holds one row per (stage, step): `{"stage": "rl", "step": 3, "loss": 0.25, ...}`.
Numbers are Python floats in full precision, so a resumed run writes the rows of the uninterrupted
one, but for keys under `time/`. Every row reaches the operating system before `write` returns, so a
kill -9 loses none.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np

from sapo_jax.distributed.processes import is_first
from sapo_jax.errors import LogError, is_out_of_space
from sapo_jax.io.files import (
    CHANGES,
    DIAGNOSTICS,
    METRICS,
    SAMPLES,
    SUMMARY,
    append_rows,
    json_line,
    plain_json,
    read_rows,
    read_rows_leniently,
    write_atomically,
)
from sapo_jax.io.run_folder import Folder
from sapo_jax.io.sinks import Sink, SinkProcess
from sapo_jax.io.tensorboard import Board

STAGES = ("cold_start", "rl")  # in the order in which they run
TENSORBOARD = "tensorboard"


class Log(Protocol):
    """What a loop writes to: a RunLog in the first process, a SilentLog in the others."""

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None: ...

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None: ...

    def rewind(self, stage: str, step: int) -> None: ...

    def missing_steps(self, stage: str, first: int, last: int) -> list[int]: ...

    def rows(self, stage: str) -> list[dict[str, Any]]: ...

    def changes(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_log(folder: Folder, sinks: Sequence[str]) -> Log:
    """The log of a run: RunLog in the first process, SilentLog in the others.

    sinks: where metrics go beside metrics.jsonl, as in `metrics.sinks`.
    """
    if not is_first():
        return SilentLog()

    def upload_now_and_then() -> None:
        folder.publish(now=False)

    return RunLog(folder.logs, upload_now_and_then, sinks)


class SilentLog:
    """In place of a RunLog: takes the same calls and writes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        pass

    def rewind(self, stage: str, step: int) -> None:
        pass

    def missing_steps(self, stage: str, first: int, last: int) -> list[int]:
        return []

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return []

    def changes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass


class RunLog:
    """The log of the run in `run_dir`; a context manager.

    Only the first of several processes may open it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        after_write: Callable[[], None] | None = None,
        sinks: Sequence[str] = ("tensorboard",),
    ):
        """after_write: called after each row of metrics. sinks: as in `open_log`."""
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = self.run_dir / METRICS
        self._samples = self.run_dir / SAMPLES
        self._diagnostics = self.run_dir / DIAGNOSTICS
        self._after_write = after_write
        self._sink_names = list(sinks)
        self._sinks: dict[str, Sink] = {}  # made at the first row, or at the end
        self._last_step: dict[str, int] = {}  # of the rows of metrics, by stage; -1: none
        self._repair()
        self._keep_rows(until=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the log; TensorBoard's files, and the other sinks, then hold every row."""
        self._open_sinks()
        self._close_sinks()

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row, and tell the sinks, which copy it for TensorBoard and others.

        metrics: numbers (Python, numpy or jax scalars) by name. Raises ValueError for an unknown
        stage, or for a step of the stage that is not after those written.
        """
        self._check_stage(stage)
        if step <= self._last_step[stage]:
            raise ValueError(
                f"{self._metrics} holds step {self._last_step[stage]} of {stage}, so step {step} "
                f"cannot follow. After a restore, call rewind({stage!r}, restored step) first."
            )
        reserved = {"stage", "step"} & metrics.keys()
        if reserved:
            raise ValueError(f"a metric cannot be named {reserved.pop()!r}")
        values = jax.device_get(dict(metrics))  # all in one transfer; it sorts the names
        row = {name: _as_float(name, values[name]) for name in metrics}
        self._append(self._metrics, [{"stage": stage, "step": step, **row}])
        self._last_step[stage] = step
        self._open_sinks()
        for sink in self._sinks.values():
            sink.wake()
        if self._after_write is not None:
            self._after_write()

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append completions to samples.jsonl, each with its stage and step. rows: JSON values."""
        self._check_stage(stage)
        self._append(self._samples, [{"stage": stage, "step": step, **row} for row in rows])

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Append a row of JSON values to diagnostics.jsonl."""
        self._check_stage(stage)
        self._append(self._diagnostics, [{"stage": stage, "step": step, **row}])

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of metrics of one stage, in order; metrics are floats."""
        self._check_stage(stage)
        rows = []
        for row in read_rows(self._metrics):
            if row["stage"] == stage:
                metrics = {k: float(v) for k, v in row.items() if k not in ("stage", "step")}
                rows.append({"stage": stage, "step": row["step"], **metrics})
        return rows

    def missing_steps(self, stage: str, first: int, last: int) -> list[int]:
        """The steps of the stage, from `first` to `last`, that metrics.jsonl has no row of."""
        self._check_stage(stage)
        logged = {row["step"] for row in self.rows(stage)}
        return [step for step in range(first, last + 1) if step not in logged]

    def rewind(self, stage: str, step: int) -> None:
        """Forget what came after (stage, step), the point that a checkpoint restored.

        That is: later steps of the stage, and later stages.
        """
        self._check_stage(stage)
        self._close_sinks()
        self._keep_rows(until=(STAGES.index(stage), step))

    def changes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write changes.jsonl: what was changed on purpose since the run was begun.

        Each row has the stage, the step from which on it counts, and the `key` with its values
        `before` and `after`, or, of what lies behind a key, a sentence: `content`.
        """
        path = self.run_dir / CHANGES
        if rows or path.exists():
            write_atomically(path, "".join(json_line(row) for row in rows))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(plain_json(values), indent=2, allow_nan=False) + "\n"
        write_atomically(self.run_dir / SUMMARY, text)

    def _check_stage(self, stage: str) -> None:
        if stage not in STAGES:
            raise ValueError(
                f"unknown stage {stage!r} in the log of {self.run_dir}; stages are "
                f"{', '.join(STAGES)}"
            )

    def _append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Append rows. Where the disk is full, TensorBoard's files make room: they are a copy."""
        try:
            append_rows(path, rows)
        except OSError as error:
            board_folder = self.run_dir / "tb"
            if not is_out_of_space(error) or not board_folder.is_dir():
                raise
            if TENSORBOARD in self._sinks:
                self._sinks.pop(TENSORBOARD).close()
            self._sink_names = [name for name in self._sink_names if name != TENSORBOARD]
            shutil.rmtree(board_folder, ignore_errors=True)
            append_rows(path, rows)
            _say(f"the disk of {self.run_dir} is full; TensorBoard's files were removed for {path}")

    def _open_sinks(self) -> None:
        for name in self._sink_names:
            if name in self._sinks:
                continue
            if name == TENSORBOARD:
                self._sinks[name] = Board(self._metrics, self.run_dir / "tb", STAGES)
            else:
                self._sinks[name] = SinkProcess(name, self.run_dir)

    def _close_sinks(self) -> None:
        for sink in self._sinks.values():
            sink.close()
        self._sinks = {}

    def _repair(self) -> None:
        """Drop lines that are no rows, and rows of metrics that are there twice; keep a copy.

        Raises LogError where metrics.jsonl has two different rows of one step: which of them counts
        cannot be known. (A row that is missing thereafter is found by `missing_steps`.)
        """
        for path in (self._metrics, self._samples, self._diagnostics):
            rows, repaired = read_rows_leniently(path)
            if path == self._metrics:
                unique_rows = _unique_rows(path, rows)
                if unique_rows != rows:
                    repaired.append("rows were there twice, or in another order")
                    rows = unique_rows
            if repaired:
                copy = _free_name(path)
                shutil.copyfile(path, copy)
                write_atomically(path, "".join(json_line(row) for row in rows))
                _say(f"{path} was repaired ({'; '.join(repaired[:3])}); {copy.name} is as it was")

    def _keep_rows(self, until: tuple[int, int] | None) -> None:
        """Keep the rows up to (index of the stage, step), None: all; drop a torn last line.

        A file is only written where that changes it.
        """
        for path in (self._metrics, self._samples, self._diagnostics):
            kept = []
            for row in read_rows(path):
                self._check_stage(row["stage"])
                position = (STAGES.index(row["stage"]), row["step"])
                if until is None or position <= until:
                    kept.append(row)
            text = "".join(json_line(row) for row in kept)
            if path.exists() and text.encode() != path.read_bytes():
                write_atomically(path, text)
        self._last_step = dict.fromkeys(STAGES, -1)
        for row in read_rows(self._metrics):
            stage = row["stage"]
            self._last_step[stage] = max(self._last_step[stage], row["step"])


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, str) or np.size(value) != 1 or value is None:
        raise TypeError(f"metric {name!r} must be one number, not {value!r}")
    return float(np.asarray(value).item())


def _unique_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of stages and steps, each once. Raises LogError for a contradiction."""
    by_position: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        if row["stage"] not in STAGES:
            return rows  # `_keep_rows` says so
        position = (STAGES.index(row["stage"]), row["step"])
        if by_position.setdefault(position, row) != row:
            raise LogError(
                f"{path} holds two different rows of {row['stage']} step {row['step']}; remove the "
                "wrong one, then run the same command again"
            )
    return [by_position[position] for position in sorted(by_position)]


def _free_name(path: Path) -> Path:
    """`path`.damaged-0, or the next number that is not taken."""
    number = 0
    while True:
        name = path.with_name(f"{path.name}.damaged-{number}")
        if not name.exists():
            return name
        number += 1


def _say(text: str) -> None:
    print(f"sapo_jax: {text}", file=sys.stderr, flush=True)
