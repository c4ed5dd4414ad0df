"""The run log survives kills and rewinds without gaps, duplicates or rounding; the display shows text as text."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from sapo_jax.io.display import Display
from sapo_jax.io.run_log import RunLog
from sapo_jax.text import visible


def lines(path: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- rows


def test_rows_are_python_floats_in_full_precision(tmp_path):
    values = {
        "reward/mean": np.float32(0.1),
        "loss": jnp.float32(1 / 3),
        "entropy/mean": 1 / 3,
        "held_out/samples": 256,
        "gate/pos_mean": np.array([0.7]),
        "half": jnp.bfloat16(0.1),
    }
    with RunLog(tmp_path) as log:
        log.write("rl", 3, values)
        (row,) = log.rows("rl")
    assert row == {"stage": "rl", "step": 3} | {
        k: float(np.asarray(v).item()) for k, v in values.items()
    }
    assert all(type(v) is float for k, v in row.items() if "/" in k) and type(row["step"]) is int
    assert np.float32(row["reward/mean"]) == np.float32(0.1) and row["entropy/mean"] == 1 / 3
    assert lines(tmp_path / "metrics.jsonl") == [row]


def test_non_finite_floats_stay_valid_json(tmp_path):
    with RunLog(tmp_path) as log:
        log.write("rl", 1, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": -np.inf})
        log.samples("rl", 1, [{"advantage": np.float32(np.nan)}])
        log.summary({"held_out_before": math.nan, "rl_steps": np.int64(3)})
        (row,) = log.rows("rl")
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    (raw,) = lines(tmp_path / "metrics.jsonl")
    assert (raw["a"], raw["b"], raw["c"]) == ("NaN", "Infinity", "-Infinity")
    assert lines(tmp_path / "samples.jsonl")[0]["advantage"] == "NaN"
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "held_out_before": "NaN",
        "rl_steps": 3,
    }


def test_samples_hold_any_text(tmp_path):
    text = 'quote " newline \n escape \x1b[31m nul \0 emoji \U0001f600 lone surrogate \udcff line \u2028'
    with RunLog(tmp_path) as log:
        log.samples(
            "rl",
            10,
            [{"completion": text, "reward": np.float32(1)}, {"completion": "b", "tokens": (1, 2)}],
        )
    first, second = [
        json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().split("\n")[:-1]
    ]
    assert first == {"stage": "rl", "step": 10, "completion": text, "reward": 1.0}
    assert second["tokens"] == [1, 2]


@pytest.mark.parametrize("value", ["0.5", None, np.zeros(2), [1.0, 2.0]])
def test_a_metric_is_one_number(tmp_path, value):
    with RunLog(tmp_path) as log:
        with pytest.raises(TypeError, match="'bad' must be one number"):
            log.write("rl", 1, {"good": 1.0, "bad": value})
        assert log.rows("rl") == []


def test_one_row_per_step_in_order(tmp_path):
    with RunLog(tmp_path) as log:
        log.write("rl", 0, {"held_out/avg": 0.1})
        log.write("rl", 2, {"a": 1})
        for step in (2, 1):
            with pytest.raises(ValueError, match="rewind"):
                log.write("rl", step, {"a": 1})
        with pytest.raises(ValueError, match="unknown stage 'RL'"):
            log.write("RL", 3, {"a": 1})
        with pytest.raises(ValueError, match="named 'step'"):
            log.write("rl", 3, {"step": 1})
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match="rewind"):
        log.write("rl", 2, {"a": 1})  # another process, the same folder


# ---------------------------------------------------------------- rewind


def fill(log: RunLog, stage: str, steps: range) -> None:
    for step in steps:
        log.write(stage, step, {"loss": 1 / (step + 1), "time/step": 0.5})
        log.samples(stage, step, [{"completion": f"{stage} {step} {i}"} for i in range(2)])
        log.diagnostics(stage, step, {"sum": {"tokens": [step, 0, 1]}})


def test_rewind_then_going_on_gives_the_uninterrupted_files(tmp_path):
    with RunLog(tmp_path / "whole") as log:
        fill(log, "cold_start", range(1, 4))
        fill(log, "rl", range(6))
    with RunLog(tmp_path / "resumed") as log:
        fill(log, "cold_start", range(1, 4))
        fill(log, "rl", range(5))
    with RunLog(tmp_path / "resumed") as log:
        log.rewind("rl", 2)
        assert [row["step"] for row in log.rows("rl")] == [0, 1, 2] and len(
            log.rows("cold_start")
        ) == 3
        fill(log, "rl", range(3, 6))
    for name in ("metrics.jsonl", "samples.jsonl", "diagnostics.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_rewind_into_an_earlier_stage_drops_the_later_one(tmp_path):
    with RunLog(tmp_path) as log:
        fill(log, "cold_start", range(1, 4))
        fill(log, "rl", range(3))
        log.rewind("cold_start", 2)
        assert [row["step"] for row in log.rows("cold_start")] == [1, 2] and log.rows("rl") == []
        assert (
            len(lines(tmp_path / "samples.jsonl")) == 4
            and len(lines(tmp_path / "diagnostics.jsonl")) == 2
        )
        log.rewind("cold_start", -1)  # nothing was restored: start again
        assert (
            (tmp_path / "metrics.jsonl").read_text()
            == ""
            == (tmp_path / "samples.jsonl").read_text()
        )
        fill(log, "cold_start", range(1, 2))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "torn", ['{"stage": "rl", "st', '{"stage": "rl", "step": 9, "loss": 1.0}', "\udcff"]
)
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    with RunLog(tmp_path) as log:
        fill(log, "rl", range(2))
    for name in ("metrics.jsonl", "samples.jsonl", "diagnostics.jsonl"):
        with (tmp_path / name).open("a", errors="surrogateescape") as file:
            file.write(torn)
    with RunLog(tmp_path) as log:
        log.write("rl", 2, {"loss": 0.0})
        assert [row["step"] for row in log.rows("rl")] == [0, 1, 2]
    assert (
        len(lines(tmp_path / "samples.jsonl")) == 4
        and len(lines(tmp_path / "diagnostics.jsonl")) == 2
    )


def test_a_bad_line_inside_is_dropped_named_and_kept_in_a_copy(tmp_path, capfd):
    text = '{"stage": "rl", "step": 1}\nnonsense\n{"stage": "rl", "step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with RunLog(tmp_path) as log:
        assert log.missing_steps("rl", 0, 3) == [0, 2]
    assert "metrics.jsonl was repaired (line 2 is not a row" in capfd.readouterr().err
    assert (tmp_path / "metrics.jsonl.damaged-0").read_text() == text
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 3]


def test_rewinding_is_atomic(tmp_path, monkeypatch):
    with RunLog(tmp_path) as log:
        fill(log, "rl", range(4))
        before = (tmp_path / "metrics.jsonl").read_bytes()

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log.rewind("rl", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    with RunLog(tmp_path) as log:
        log.rewind("rl", 1)
        assert len(log.rows("rl")) == 2


def test_rows_are_on_disk_when_the_process_is_killed(tmp_path):
    script = (
        "import os, sys, signal; from sapo_jax.io.run_log import RunLog; log = RunLog(sys.argv[1])\n"
        "for step in range(5): log.write('rl', step, {'loss': step}); log.samples('rl', step, [{'completion': 'x'}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in RunLog(tmp_path).rows("rl")] == [0, 1, 2, 3, 4]
    assert len(lines(tmp_path / "samples.jsonl")) == 5


# ---------------------------------------------------------------- TensorBoard


def events(folder: Path) -> list[list[event_pb2.Event]]:
    """The events of every file, oldest first (TFRecord: length, crc, data, crc)."""
    files = []
    for path in sorted(folder.glob("events*"), key=lambda p: p.stat().st_mtime_ns):
        data, events = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        files.append(events)
    return files


def test_tensorboard_sees_each_step_once(tmp_path):
    with RunLog(tmp_path) as log:
        log.write("cold_start", 1, {"loss": 2.0})
        for step in range(5):
            log.write("rl", step, {"reward/mean": step / 4, "loss": -step})
        log.rewind("rl", 2)
        log.write("rl", 3, {"reward/mean": 9.0})
    (file,) = events(tmp_path / "tb" / "rl")
    scalars = [(e.step, v.tag, v.simple_value) for e in file for v in e.summary.value]
    assert scalars == [
        *((s, t, v) for s in range(3) for t, v in (("reward/mean", s / 4), ("loss", -s))),
        (3, "reward/mean", 9.0),
    ]
    starts = [e.step for e in file if e.HasField("session_log")]
    assert starts == [0], "a TensorBoard that is running forgets what it has read"
    assert len(events(tmp_path / "tb" / "cold_start")) == 1


# ---------------------------------------------------------------- display

ROW = {
    "reward/mean": 0.512,
    "reward/std": 0.1,
    "accuracy/mean": 0.5,
    "completion/length_mean": 7.25,
    "gate/pos_mean": 0.98,
    "gate/neg_mean": 0.97,
    "clip_fraction/pos_mean": 0.01,
    "clip_fraction/neg_mean": 0.02,
    "learning_rate": 1e-3,
    "time/rollout": 1.5,
    "time/update": 2.5,
    "time/step": 4.0,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(terminal: bool, drive, encoding: str = "utf-8", **options) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=stream,
        force_terminal=terminal,
        width=110,
        color_system=None,
        _environ={"TERM": "xterm"},
    )
    with Display(console, **options) as display:
        drive(display)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_plain_display_is_one_line_per_n_steps():
    clock = Clock()

    def drive(display):
        for step in range(1, 21):
            clock.now += 10.0
            display.step("rl", step, 20, ROW | ({"held_out/avg": 0.75} if step == 13 else {}))

    output = shown(False, drive, every=5, clock=clock)
    assert "\x1b" not in output
    rows = output.splitlines()
    assert [row.split()[1] for row in rows] == ["1/20", "5/20", "10/20", "13/20", "15/20", "20/20"]
    for text in (
        "rl 10/20",
        "reward 0.512",
        "accuracy 50.0%",
        "length 7.2",
        "gate +/- 0.980/0.970",
        "lr 1.0e-03",
    ):
        assert text in rows[2], rows[2]
    for text in ("rollout 1.5", "update 2.5", "ETA 1:40", "clip +/- 1.0%/2.0%"):
        assert text in rows[2], rows[2]
    assert "ETA" not in rows[0] and "held-out 75.0%" in rows[3]
    assert "held-out 75.0%" in rows[4], "the last evaluation stays in view"


def test_a_terminal_shows_the_same_live_and_samples_above():
    def drive(display):
        display.step(
            "cold_start", 1, 2, {"loss": 2.5, "accuracy/token": 0.3, "learning_rate": 1e-3}
        )
        display.step("rl", 1, 20, ROW)
        display.samples(
            [
                {
                    "question": "1+1?",
                    "completion": "2",
                    "status": "ok",
                    "reward": 1.0,
                    "advantage": 0.5,
                }
            ]
        )

    output = shown(True, drive)
    for text in ("rl", "1/20", "0.512", "50.0%", "rollout", "1+1?", "ok", "+0.500", "2.5"):
        assert text in output


HOSTILE = (
    "[bold]no[/bold] [/] [link=x] \x1b]0;title\x07 \x1b[2J \rover \x08 \u202eevil \udcff \0 end"
)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_model_output_is_shown_as_text(terminal, encoding):
    row = {
        "question": HOSTILE,
        "completion": HOSTILE + " \U0001f600",
        "status": "wrong",
        "reward": 0,
        "advantage": -1,
    }
    output = shown(terminal, lambda display: display.samples([row]), encoding=encoding)
    assert "[bold]no[/bold] [/] [link=x]" in output
    assert (
        not {"\x07", "\x08", "\u202e", "\0"} & set(output)
        and "\x1b]0" not in output
        and "\x1b[2J" not in output
    )
    assert r"\x1b[2J" in output and r"\u202eevil" in output


def test_visible_keeps_lines_and_shortens():
    assert visible("a\nb\tc") == "a\nb\\tc"
    assert visible("x" * 50, limit=10) == "x" * 10 + " ... (40 more characters)"


def test_samples_may_lack_fields_and_be_non_finite():
    rows = [
        {
            "question": "q",
            "completion": "",
            "status": "timeout",
            "reward": math.nan,
            "advantage": None,
        },
        {},
    ]
    assert "timeout" in shown(False, lambda display: display.samples(rows))


def test_summary_table(tmp_path):
    summary = {
        "held_out_before": 0.25,
        "held_out_after": 0.625,
        "pass_before": 0.5,
        "pass_after": 0.875,
        "held_out_samples": 1600,
        "k": 8,
        "rl_steps": 100,
        "cold_start_steps": 50,
        "seconds": 3725.0,
    }
    output = shown(
        False,
        lambda display: display.summary(
            summary, "runs/quick [x]", plot="runs/quick [x]/progress.png"
        ),
    )
    for text in (
        "after cold start",
        "after RL",
        "25.0%",
        "62.5%",
        "+37.5",
        "avg@8",
        "pass@8",
        "87.5%",
        "1600 samples",
    ):
        assert text in output
    for text in (
        "1:02:05",
        "runs/quick [x]",
        "progress.png",
        "tensorboard --logdir 'runs/quick [x]/tb'",
    ):
        assert text in output
    short = shown(False, lambda display: display.summary({"held_out_after": 0.5}, "runs/q"))
    assert "50.0%" in short and "pass@" not in short


def test_neither_the_package_nor_its_log_imports_torch(tmp_path):
    """It is installed here; tensorboardX would import it where it can."""
    script = """
        import pkgutil, sys
        import sapo_jax
        from sapo_jax.io.run_log import RunLog

        for module in pkgutil.walk_packages(sapo_jax.__path__, "sapo_jax."):
            __import__(module.name)
        with RunLog(sys.argv[1]) as log:
            log.write("rl", 1, {"loss": 1.0})
        print([name for name in ("torch", "transformers") if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
    assert importlib.util.find_spec("torch") and len(events(tmp_path / "tb" / "rl")) == 1
