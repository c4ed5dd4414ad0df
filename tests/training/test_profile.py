"""`--profile N`."""

from __future__ import annotations

import pytest

from sapo_jax.cli import main
from sapo_jax.training import profile


@pytest.mark.slow
def test_profile_leaves_a_trace_of_steps_after_warm_up(tiny_config, tmp_path, monkeypatch):
    begun, start = [], profile.jax.profiler.start_trace
    monkeypatch.setattr(
        profile.jax.profiler, "start_trace", lambda folder: (begun.append(folder), start(folder))
    )
    words = ["cold_start.steps=1", "train.steps=3", "evaluate.every=0", f"run_dir={tmp_path}"]
    assert main(["train", str(tiny_config), "--profile", "1", *words]) == 0
    assert begun == [tmp_path / "trace"]
    for pattern in ("*.xplane.pb", "*.trace.json.gz"):
        (found,) = (tmp_path / "trace").rglob(pattern)
        assert found.stat().st_size > 1000


def test_profile_says_so_where_too_few_steps_are_left(tiny_config, tmp_path, capsys):
    words = ["cold_start.steps=1", "train.steps=3", "evaluate.every=0", f"run_dir={tmp_path}"]
    assert main(["train", str(tiny_config), "--profile", "2", *words]) == 1
    assert "--profile 2 needs 4 steps, 3 are left" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_profile_wants_a_number_of_steps(tiny_config, number):
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(tiny_config), "--profile", number])
    assert exit_.value.code == 2


@pytest.mark.parametrize(("steps", "first", "after"), [(1, 2, 3), (2, 2, 4)])
def test_which_steps_are_traced(steps, first, after, tmp_path, monkeypatch):
    calls, now = [], [0]
    monkeypatch.setattr(
        profile.jax.profiler, "start_trace", lambda _: calls.append(("start", now[0]))
    )
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: calls.append(("stop", now[0])))
    with profile.Trace(tmp_path, steps) as traced:
        for now[0] in range(6):
            traced.next()
    assert calls == [("start", first), ("stop", after)]
