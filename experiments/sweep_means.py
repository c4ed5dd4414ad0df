"""Means and largest values of metrics over the steps and seeds of each arm of a sweep.

    python experiments/sweep_means.py runs/objectives_moe [METRIC ...]       seconds on any machine

The script reads RUN/metrics.jsonl of all runs in a sweep's folder (`sapo-jax sweep`) and prints a
line for each arm and metric that the arm has logged. Without METRIC it prints those of METRICS:
what the objectives clip, how far the gates close, which routes differ, and how far sampler and
scorer are apart.

Expected for configs/sweeps/objectives_moe.yaml, at 60 steps: GRPO clips 1.6 % of the tokens, GSPO
39 %; SAPO's gates are 0.999 and 0.995; 0.4 to 0.5 % of the routes differ from the replayed ones.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

from sapo_jax.analysis.arms import read_arms

METRICS = (
    "clip_fraction/mean",
    "gate/neg_mean",
    "gate/pos_mean",
    "mismatch/live_max",
    "mismatch/max",
    "router/replay_difference_mean",
)


def logged_values(folder: Path, metrics: tuple[str, ...]) -> dict[tuple[str, str], list[float]]:
    """All values of each (arm, metric), over steps and seeds; without the pairs that have none."""
    arms, notes = read_arms([folder])
    for note in notes:
        print(note)
    values = collections.defaultdict(list)
    for arm in arms:
        for run in arm.runs:
            for row in run.rows:
                for metric in metrics:
                    if metric in row:
                        values[arm.label, metric].append(float(row[metric]))
    return dict(values)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    metrics = tuple(arguments[1:]) or METRICS
    values = logged_values(folder, metrics)
    for arm, metric in sorted(values):
        x = values[arm, metric]
        print(f"{arm:10s} {metric:32s} mean {sum(x) / len(x):.4g}  max {max(x):.4g}")


if __name__ == "__main__":
    main(sys.argv[1:])
