"""What a run leaves on disk to look at: metrics, samples and diagnostics (.jsonl), TensorBoard events, summary.json.

metrics.jsonl holds one row per (stage, step): `{"stage": "rl", "step": 3, "reward/mean": 0.25, ...}`. Numbers are
Python floats in full precision, so a resumed run writes the rows of the uninterrupted one, but for keys under `time/`.
JSON has no NaN: non-finite floats are the strings "NaN", "Infinity", "-Infinity" (as in protobuf's JSON), which
float() reads. Every row reaches the operating system before `write` returns, so a kill -9 loses none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from sapo_jax.distributed.processes import is_first
from sapo_jax.io.files import DIAGNOSTICS, _line, _plain, append_rows, read_rows, write_atomically
from sapo_jax.io.run_folder import Folder

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

STAGES = ("cold_start", "rl")  # in the order they run


def _scalar(name: str, value: Any) -> float:
    if isinstance(value, str) or np.size(value) != 1 or value is None:
        raise TypeError(f"metric {name!r} must be one number, not {value!r}")
    return float(np.asarray(value).item())


def _summary_writer() -> type[SummaryWriter]:
    """tensorboardX imports torch where that is installed (187 MB, 1.8 s), for a type hint. While it is imported here
    there is no torch, for other threads neither."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # `import torch` raises ImportError
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def open_log(folder: Folder) -> RunLog | Silent:
    """The log of a run: RunLog in the first process, Silent in the others."""
    return RunLog(folder.logs, lambda: folder.publish(now=False)) if is_first() else Silent()


class Silent:
    """In place of a RunLog: takes the same calls and writes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        pass

    def rewind(self, stage: str, step: int) -> None:
        pass


class RunLog:
    """The log of the run in `run_dir`; a context manager. Only the first of several processes may open it."""

    def __init__(self, run_dir: str | Path, written: Callable[[], None] = lambda: None):
        """written: called after each row of metrics."""
        self.run_dir, self._written = Path(run_dir), written
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics, self._samples = (
            self.run_dir / "metrics.jsonl",
            self.run_dir / "samples.jsonl",
        )
        self._diagnostics = self.run_dir / DIAGNOSTICS
        self._boards: dict[str, SummaryWriter] = {}
        self._keep(lambda _: True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row and its TensorBoard events. metrics: numbers (Python, numpy or jax scalars) by name.

        Raises ValueError for an unknown stage, or for a step of the stage that is not after those written.
        """
        if step <= self._last[self._known(stage)]:
            raise ValueError(
                f"{self._metrics} holds step {self._last[stage]} of {stage}, so step {step} cannot follow. After a "
                f"restore, call rewind({stage!r}, restored step) first."
            )
        if reserved := {"stage", "step"} & metrics.keys():
            raise ValueError(f"a metric cannot be named {reserved.pop()!r}")
        values = jax.device_get(dict(metrics))  # all in one transfer; sorts the names
        row = {name: _scalar(name, values[name]) for name in metrics}
        append_rows(self._metrics, [{"stage": stage, "step": step, **row}])
        self._last[stage] = step
        if stage not in self._boards:
            self._boards[stage] = self._open_board(stage, step)
        for name, value in row.items():
            self._boards[stage].add_scalar(name, value, step)
        self._boards[stage].flush()
        self._written()

    def samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends completions to samples.jsonl, each with its stage and step. rows: JSON values."""
        self._known(stage)
        append_rows(self._samples, [{"stage": stage, "step": step, **row} for row in rows])

    def diagnostics(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Appends a row of JSON values to diagnostics.jsonl."""
        self._known(stage)
        append_rows(self._diagnostics, [{"stage": stage, "step": step, **row}])

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of one stage in order, metrics as floats."""
        rows = [row for row in read_rows(self._metrics) if row["stage"] == self._known(stage)]
        return [
            {k: v if k in ("stage", "step") else float(v) for k, v in row.items()} for row in rows
        ]

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what came after (stage, step), the point a checkpoint restored: later steps and later stages."""
        here = STAGES.index(self._known(stage))
        self.close()
        self._keep(
            lambda row: (STAGES.index(self._known(row["stage"])), row["step"]) <= (here, step)
        )

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        write_atomically(
            self.run_dir / "summary.json",
            json.dumps(_plain(values), indent=2, allow_nan=False) + "\n",
        )

    def _known(self, stage: str) -> str:
        if stage not in STAGES:
            raise ValueError(
                f"unknown stage {stage!r} in the log of {self.run_dir}; stages are {', '.join(STAGES)}"
            )
        return stage

    def _open_board(self, stage: str, step: int) -> SummaryWriter:
        """purge_step: TensorBoard forgets what an earlier, killed process wrote from this step on.

        The suffix: file names hold whole seconds, and a second file of that name would overwrite the first.
        """
        folder, suffix = str(self.run_dir / "tb" / stage), f".{time.time_ns()}"
        return _summary_writer()(folder, purge_step=step, flush_secs=1, filename_suffix=suffix)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the files with the wanted rows, and without a torn last line, where that changes them."""
        for path in (self._metrics, self._samples, self._diagnostics):
            text = "".join(_line(row) for row in read_rows(path) if wanted(row))
            if path.exists() and text.encode() != path.read_bytes():
                write_atomically(path, text)
        self._last = dict.fromkeys(STAGES, -1)
        for row in read_rows(self._metrics):
            self._last[self._known(row["stage"])] = max(self._last[row["stage"]], row["step"])
