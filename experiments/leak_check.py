"""Does a long run stay as large as it is? Memory, open files, threads and the folder, step by step.

    python experiments/leak_check.py [STEPS]   minutes for 600 steps on two cores

It trains the tiniest policy for so many RL steps, with a checkpoint every 10, an evaluation every
50 and a plug-in verifier process, and looks at the run from outside after every few of them. The
script writes results/leak_check.csv and .png: resident memory of the run's process (after the
allocator has settled) and of its verifiers, open files, threads, processes, and what the folder
holds in logs and in checkpoints.

Expected: from a third of the run on, all is flat but the logs, which grow by the same amount every
step. (A short cold start comes first: while no answer is right the optimiser's moments are zeros,
which compress well, so that checkpoints would grow with the first right one.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sapo_jax.analysis.figures import finish
from sapo_jax.io.files import METRICS, last_row, write_csv
from sapo_jax.io.plots import BLUE, ORANGE

RESULTS = Path(__file__).parent / "results"
STEPS = 600
SECONDS_BETWEEN_LOOKS = 0.2
CONFIG = """
name: leak_check
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, num_key_value_heads: 1,
        head_dim: 16, intermediate_size: 32, initializer_range: 0.1}}
data:
  held_out: 8
  max_prompt_tokens: 8
  chat_template: plain
  tasks: [{{kind: file, path: {problems}, verifier: math}}]
cold_start: {{steps: 100, batch_size: 16, optimizer: {{learning_rate: 1.0e-2}}}}
rollout: {{prompts_per_step: 4, group_size: 4, max_new_tokens: 4}}
train: {{steps: {steps}, mini_batches: 1, epochs: 2, print_samples_every: 0}}
evaluate: {{every: 50, samples: 2, batch_prompts: 8}}
checkpoint: {{every: 10}}
"""
# What may grow from the first third of the run to its last, as a factor.
LIMITS = {
    "memory_mb": 1.05,
    "verifiers_mb": 1.10,
    "open_files": 1.0,
    "threads": 1.0,
    "processes": 1.0,
    "checkpoints_kb": 1.05,
}
MOST_LOG_GROWTH = 1.1  # of the bytes of log per step


def write_config(folder: Path, steps: int) -> Path:
    """The config and its problems, a + b for digits a and b, in a folder."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "leak_check.yaml"
    path.write_text(CONFIG.format(problems=folder / "problems.jsonl", steps=steps))
    return path


def watch(folder: Path, steps: int) -> list[dict[str, float]]:
    """Train in a process of its own; what was seen of it, one row for each look at a new step."""
    run_dir = folder / "run"
    config = write_config(folder, steps)
    command = [sys.executable, "-m", "sapo_jax.cli", "train", str(config), f"run_dir={run_dir}"]
    rows: list[dict[str, float]] = []
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            row = last_row(run_dir / METRICS)
            step = row.get("step", 0) if row.get("stage") == "rl" else 0
            if step > 0 and (not rows or step > rows[-1]["step"]):
                seen = look(process.pid, run_dir)
                if seen:
                    rows.append({"step": step, **seen})
    if process.returncode != 0:
        raise RuntimeError((folder / "output.txt").read_text()[-2000:])
    return rows


def look(pid: int, run_dir: Path) -> dict[str, float]:
    """What the process uses now; {} where it has just ended."""
    try:
        status = read_status(pid)
        children = [read_status(child) for child in children_of(pid)]
        open_files = len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return {}
    checkpoints = folder_bytes(run_dir / "checkpoints")
    return {
        "memory_mb": status["VmRSS"] / 1024,
        "verifiers_mb": sum(child["VmRSS"] for child in children) / 1024,
        "open_files": open_files,
        "threads": status["Threads"],
        "processes": 1 + len(children),
        "checkpoints_kb": checkpoints / 1000,
        "logs_kb": (folder_bytes(run_dir) - checkpoints) / 1000,
    }


def read_status(pid: int) -> dict[str, int]:
    """VmRSS (kB) and Threads of a process."""
    numbers = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "Threads"):
            numbers[name] = int(value.split()[0])
    if len(numbers) < 2:  # it has ended and waits to be collected
        raise ProcessLookupError(pid)
    return numbers


def children_of(pid: int) -> list[int]:
    """All processes below this one."""
    children = []
    for task in os.listdir(f"/proc/{pid}/task"):
        text = Path(f"/proc/{pid}/task/{task}/children").read_text()
        for child in map(int, text.split()):
            children += [child, *children_of(child)]
    return children


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder; a file that goes away meanwhile counts as nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def growth(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of the last sixth of the run over that of the sixth after its first third; and,
    as `logs_kb`, the bytes of log per step of the last third over those of the middle one."""
    step_R = np.array([row["step"] for row in rows])
    last = step_R.max()
    is_early_R = (step_R > last / 3) & (step_R <= last / 2)
    is_late_R = step_R > last * 5 / 6
    factors = {}
    for name in LIMITS:
        value_R = np.array([row[name] for row in rows])
        factors[name] = float(np.median(value_R[is_late_R]) / np.median(value_R[is_early_R]))
    logs_R = np.array([row["logs_kb"] for row in rows])
    is_middle_R = (step_R > last / 3) & (step_R <= last * 2 / 3)
    is_last_R = step_R > last * 2 / 3
    middle = np.polyfit(step_R[is_middle_R], logs_R[is_middle_R], 1)[0]
    end = np.polyfit(step_R[is_last_R], logs_R[is_last_R], 1)[0]
    factors["logs_kb"] = float(end / middle)
    return factors


def leaks(rows: list[dict[str, float]]) -> list[str]:
    """What grows beyond its limit, as sentences."""
    limits = {**LIMITS, "logs_kb": MOST_LOG_GROWTH}
    sentences = []
    for name, factor in growth(rows).items():
        if factor > limits[name]:
            sentences.append(f"{name} grows by a factor of {factor:.3f}, beyond {limits[name]}")
    return sentences


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Four panels over RL steps."""
    panels = {
        "resident memory, MB": {"memory_mb": "the run", "verifiers_mb": "its verifiers"},
        "open files, threads": {"open_files": "open files", "threads": "threads"},
        "processes": {"processes": "the run and its verifiers"},
        "the run's folder, kB": {"checkpoints_kb": "checkpoints", "logs_kb": "logs"},
    }
    step_R = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes_of_panel = figure.subplots(2, 2).flat
    for axes, (title, lines) in zip(axes_of_panel, panels.items(), strict=True):
        for (name, label), colour in zip(lines.items(), (BLUE, ORANGE), strict=False):
            axes.plot(step_R, [row[name] for row in rows], color=colour, label=label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        finish(axes, title, "RL step", "")
    figure.savefig(path, dpi=120)


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = watch(Path(folder), steps)
    write_csv(RESULTS / "leak_check.csv", rows)
    plot(rows, RESULTS / "leak_check.png")
    for name, factor in growth(rows).items():
        print(f"{name:<16} x {factor:.3f}")
    for sentence in leaks(rows):
        print(sentence)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
