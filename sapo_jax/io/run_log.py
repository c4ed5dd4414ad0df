"""What a run leaves on disk to look at: .jsonl logs, TensorBoard events, summary.json.

metrics.jsonl holds one row per (stage, step): `{"stage": "rl", "step": 3, "loss": 0.25, ...}`.
Numbers are Python floats in full precision, so a resumed run writes the rows of the uninterrupted
one, but for keys under `time/`. Every row reaches the operating system before `write` returns, so a
kill -9 loses none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import numpy as np

from sapo_jax.distributed.processes import is_first
from sapo_jax.io.files import (
    DIAGNOSTICS,
    METRICS,
    SAMPLES,
    SUMMARY,
    append_rows,
    json_line,
    plain_json,
    read_rows,
    write_atomically,
)
from sapo_jax.io.run_folder import Folder

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

STAGES = ("cold_start", "rl")  # in the order in which they run


class Log(Protocol):
    """What a loop writes to: a RunLog in the first process, a SilentLog in the others."""

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None: ...

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None: ...

    def rewind(self, stage: str, step: int) -> None: ...

    def rows(self, stage: str) -> list[dict[str, Any]]: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_log(folder: Folder) -> Log:
    """The log of a run: RunLog in the first process, SilentLog in the others."""
    if not is_first():
        return SilentLog()

    def upload_now_and_then() -> None:
        folder.publish(now=False)

    return RunLog(folder.logs, upload_now_and_then)


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

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return []

    def summary(self, values: Mapping[str, Any]) -> None:
        pass


class RunLog:
    """The log of the run in `run_dir`; a context manager.

    Only the first of several processes may open it.
    """

    def __init__(self, run_dir: str | Path, after_write: Callable[[], None] | None = None):
        """after_write: called after each row of metrics."""
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = self.run_dir / METRICS
        self._samples = self.run_dir / SAMPLES
        self._diagnostics = self.run_dir / DIAGNOSTICS
        self._after_write = after_write
        self._boards: dict[str, SummaryWriter] = {}
        self._last_step: dict[str, int] = {}  # of the rows of metrics, by stage; -1: none
        self._keep_rows(until=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row and its TensorBoard events.

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
        append_rows(self._metrics, [{"stage": stage, "step": step, **row}])
        self._last_step[stage] = step
        if stage not in self._boards:
            self._boards[stage] = self._open_board(stage, step)
        for name, value in row.items():
            self._boards[stage].add_scalar(name, value, step)
        self._boards[stage].flush()
        if self._after_write is not None:
            self._after_write()

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append completions to samples.jsonl, each with its stage and step. rows: JSON values."""
        self._check_stage(stage)
        append_rows(self._samples, [{"stage": stage, "step": step, **row} for row in rows])

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Append a row of JSON values to diagnostics.jsonl."""
        self._check_stage(stage)
        append_rows(self._diagnostics, [{"stage": stage, "step": step, **row}])

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of metrics of one stage, in order; metrics are floats."""
        self._check_stage(stage)
        rows = []
        for row in read_rows(self._metrics):
            if row["stage"] == stage:
                metrics = {k: float(v) for k, v in row.items() if k not in ("stage", "step")}
                rows.append({"stage": stage, "step": row["step"], **metrics})
        return rows

    def rewind(self, stage: str, step: int) -> None:
        """Forget what came after (stage, step), the point that a checkpoint restored.

        That is: later steps of the stage, and later stages.
        """
        self._check_stage(stage)
        self.close()
        self._keep_rows(until=(STAGES.index(stage), step))

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

    def _open_board(self, stage: str, step: int) -> SummaryWriter:
        """A TensorBoard writer for the stage, which goes on from `step`.

        purge_step makes TensorBoard forget what an earlier, killed process wrote from this step on.
        The names of its files hold whole seconds, and a second file of that name would overwrite
        the first; hence the suffix.
        """
        writer_class = _summary_writer_class()
        return writer_class(
            str(self.run_dir / "tb" / stage),
            purge_step=step,
            flush_secs=1,
            filename_suffix=f".{time.time_ns()}",
        )

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


def _summary_writer_class() -> type[SummaryWriter]:
    """tensorboardX's writer, without torch.

    tensorboardX imports torch where that is installed (187 MB, 1.8 s), for a type hint. While it is
    imported here, there is no torch; for other threads neither.
    """
    hide_torch = "torch" not in sys.modules
    if hide_torch:
        # With None in its place, `import torch` raises ImportError.
        modules: dict[str, Any] = sys.modules
        modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide_torch:
            del sys.modules["torch"]
    return SummaryWriter
