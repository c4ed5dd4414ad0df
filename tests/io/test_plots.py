"""The picture of a run holds the panels there is data for, with the logged values, whatever is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from sapo_jax.io.plots import draw, plot_run, smooth
from sapo_jax.io.run_log import RunLog

GATE = {
    "gate/pos_mean": 0.98,
    "gate/neg_mean": 0.97,
    "clip_fraction/pos_mean": 0.0,
    "clip_fraction/neg_mean": 0.0,
}
CLIP = {"clip_fraction/pos_mean": 0.02, "clip_fraction/neg_mean": 0.01}


def rl_row(step: int, **more: float) -> dict:
    if step == 0:
        return {"stage": "rl", "step": 0, "held_out/avg": 0.25}
    common = {
        "reward/mean": 0.2 + step / 100,
        "completion/length_mean": 9.0,
        "entropy/mean": 1 / step,
        "grad_norm": 1.0,
    }
    return {"stage": "rl", "step": step} | common | more


def cold_rows(n: int) -> list[dict]:
    return [
        {"stage": "cold_start", "step": i, "loss": 3.0 / i, "accuracy/token": 0.5}
        for i in range(1, n + 1)
    ]


def panels(rows: list[dict]) -> dict:
    return {axes.get_title(loc="left"): axes for axes in draw(rows, "run").axes}


def curves(axes) -> dict:
    """Label -> (x, y) of the labelled curves."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {
        line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines
    }


def test_the_curves_are_the_logged_values():
    rows = [*cold_rows(4), *(rl_row(step, **GATE) for step in range(6))]
    rows[-1]["held_out/avg"] = 0.75
    drawn = panels(rows)
    assert list(drawn) == [
        "Reward and held-out accuracy",
        "Cold start: loss per token",
        "Completion length (tokens)",
        "Entropy (nats per token)",
        "Mean gate weight",
        "Gradient norm",
    ]
    main = drawn["Reward and held-out accuracy"]
    assert curves(main)["held-out accuracy"] == ([0, 5], [0.25, 0.75])
    assert curves(main)["train reward (mean of the rollout)"] == (
        [1, 2, 3, 4, 5],
        [0.2 + step / 100 for step in range(1, 6)],
    )
    assert [text.get_text() for text in main.texts] == ["25.0%", "75.0%"]
    assert curves(drawn["Cold start: loss per token"])["loss"] == (
        [1, 2, 3, 4],
        [3.0, 1.5, 1.0, 0.75],
    )
    assert curves(drawn["Mean gate weight"])["A < 0"][1] == [0.97] * 5
    assert all(axes.get_xlabel() and axes.get_title(loc="left") for axes in drawn.values())


def test_an_objective_that_clips_shows_the_clip_fraction():
    drawn = panels([rl_row(step, **CLIP) for step in range(1, 4)])
    assert curves(drawn["Clipped tokens"])["A > 0"][1] == [0.02] * 3
    assert "Mean gate weight" not in drawn and "Cold start: loss per token" not in drawn


def test_a_long_run_is_smoothed_over_the_raw_curve():
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.1, size=90)
    drawn = panels([rl_row(i + 1) | {"reward/mean": 0.5 + noise[i]} for i in range(90)])
    raw, smoothed = drawn["Reward and held-out accuracy"].get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), 0.5 + noise)
    np.testing.assert_allclose(smoothed.get_ydata()[10], (0.5 + noise)[7:14].mean())
    assert smoothed.get_ydata().std() < 0.6 * noise.std()


def test_smooth_keeps_a_line_and_the_length():
    np.testing.assert_allclose(smooth(np.full(40, 2.0)), 2.0)
    np.testing.assert_allclose(smooth(np.arange(50.0))[5:-5], np.arange(50.0)[5:-5])
    assert len(smooth(np.arange(3.0))) == 3


@pytest.mark.parametrize(
    "rows",
    [
        [rl_row(0)],
        [rl_row(1)],
        cold_rows(1),
        [{"stage": "rl", "step": 1, "time/step": 1.0}],
        [{"stage": "rl", "step": 1, "reward/mean": math.nan, "grad_norm": math.inf}, rl_row(2)],
        [{"stage": "rl", "step": i, "reward/mean": -5.0 - i} for i in range(1, 40)],
    ],
    ids=[
        "evaluation only",
        "one step",
        "cold start only",
        "no known metric",
        "non-finite",
        "negative reward",
    ],
)
def test_a_picture_comes_out_of_any_rows(tmp_path, rows):
    run_dir = tmp_path / "run $x$ 100% _{"  # no name is taken for mathematics
    with RunLog(run_dir) as log:
        for row in rows:
            log.write(row.pop("stage"), row.pop("step"), row)
    path = plot_run(run_dir)
    assert path == run_dir / "progress.png" and not (run_dir / "progress.tmp.png").exists()
    image = np.asarray(Image.open(path).convert("L"))
    assert image.shape[1] == 1560 and 0.005 < (image < 200).mean() < 0.5, "some ink on a white page"


def test_a_negative_reward_is_in_view():
    main = panels([{"stage": "rl", "step": i, "reward/mean": -5.0 - i} for i in range(1, 40)])
    low, high = main["Reward and held-out accuracy"].get_ylim()
    assert low < -44 and high >= 0


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl holds no metrics"):
        plot_run(tmp_path)
