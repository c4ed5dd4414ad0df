"""What a sweep costs: wall time, CPU time of a run, steps per second, and what a larger one takes.

    python experiments/benchmarks/sweep_time.py                        # 2 arms x 3 seeds
    python experiments/benchmarks/sweep_time.py --arms 7 --seeds 10 --max-parallel 2   # an hour
    python experiments/benchmarks/sweep_time.py --package ../before --not-shared       # other code

The arms are SAPO and rivals of configs/sweeps/remedies.yaml that need no further settings, on
configs/quickstart_moe.yaml with 120 RL steps. The sweep is started as a user starts it, in a new
folder and with an empty compilation cache (--cache FOLDER: with that one). The script appends a row
to results/sweep_time.csv and prints what 7 arms x 10 seeds would take at the same speed. Hardware:
a quiet CPU. A run's CPU seconds are those of its process and of its verifiers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "sweep_time.csv"
ARMS: dict[str, dict[str, Any]] = {
    "sapo": {"objective": {"name": "sapo", "tau_pos": 1.0, "tau_neg": 1.05}},
    "sapo_steep": {"objective": {"name": "sapo", "tau_pos": 1.0, "tau_neg": 5.0}},
    "grpo": {"objective": {"name": "grpo", "clip_low": 0.2, "clip_high": 0.27}},
    "grpo_narrow": {"objective": {"name": "grpo", "clip_low": 0.1, "clip_high": 0.2}},
    "gspo": {"objective": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}},
    "cispo": {"objective": {"name": "cispo"}},
    "sapo_slow": {"optimizer.learning_rate": 3e-4},
}
TARGET_RUNS = 70  # 7 arms x 10 seeds


def write_sweep(folder: Path, args: argparse.Namespace) -> Path:
    """The sweep file."""
    content: dict[str, Any] = {
        "base": str(args.package / "configs" / "quickstart_moe.yaml"),
        "folder": str(folder / "runs"),
        "set": {"train.steps": args.steps},
        "arms": dict(list(ARMS.items())[: args.arms]),
        "seeds": list(range(args.seeds)),
    }
    if not args.not_shared:
        content["shared"] = "cold_start"
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def environment(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """That of a user, with a compilation cache of its own, or none for code that knows of none."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    kept.pop("XLA_FLAGS", None)
    kept["PYTHONPATH"] = str(args.package)
    kept["XDG_CACHE_HOME"] = str(args.cache or folder / "cache")
    return kept


def step_seconds(runs: Path) -> list[float]:
    """Of every RL step of all runs."""
    seconds = []
    for path in runs.glob("*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["stage"] == "rl" and "time/step" in row:
                seconds.append(row["time/step"])
    return seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the sweep, and returns the row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "sapo_jax.cli", "sweep", str(write_sweep(folder, args))]
        command += ["--max-parallel", str(args.max_parallel)]
        started = time.monotonic()
        # Relative paths in the base are relative to the working directory.
        subprocess.run(command, cwd=args.package, env=environment(args, folder), check=True)
        wall = time.monotonic() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = sorted(step_seconds(folder / "runs"))
    cpu = used.ru_utime + used.ru_stime
    num_runs = args.arms * args.seeds
    median = seconds[len(seconds) // 2]
    return {
        "date": datetime.date.today().isoformat(),
        "code": args.label,
        "arms": args.arms,
        "seeds": args.seeds,
        "steps": args.steps,
        "shared": not args.not_shared,
        "max_parallel": args.max_parallel,
        "cores": os.cpu_count(),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "cpu_s_per_run": round(cpu / num_runs, 1),
        "median_step_s": round(median, 3),
        "longest_step_s": round(seconds[-1], 1),
        "steps_per_s": round(len(seconds) / wall, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=int, default=2, choices=range(1, len(ARMS) + 1))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="RL steps of a run")
    parser.add_argument("--max-parallel", type=int, default=1)
    parser.add_argument("--not-shared", action="store_true", help="each run has its cold start")
    parser.add_argument("--package", type=Path, default=ROOT, help="a checkout to measure")
    parser.add_argument("--cache", type=Path, help="a folder with compiled programs")
    parser.add_argument("--label", default="here", help="what the table calls this code")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.package = args.package.absolute()

    row = measure(args)
    rows = []
    if args.out.exists():
        with args.out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    for key, value in row.items():
        print(f"{key:>16}  {value}")
    minutes = row["wall_s"] / (args.arms * args.seeds) * TARGET_RUNS / 60
    print(f"{TARGET_RUNS} runs at the same speed: {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
