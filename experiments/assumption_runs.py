"""The two short runs that figure2_ratios.py and figure3_dispersion.py look at; a run that is finished is not repeated.

A tiny dense policy (configs/quickstart.yaml, 0.1 M parameters) and a tiny mixture of experts (quickstart_moe.yaml, 8
experts), each after a shortened cold start of 300 steps, for 40 RL steps of 4 updates. They are TINY, and so are their
completions (2 to 6 tokens): they show that the measurement works and what it looks like, not what a 30 B policy does.
Their steps are large too: the quickstart's learning rate is hundreds of times that of a large model.
"""

from __future__ import annotations

from pathlib import Path

from sapo_jax.analyze import Diagnosed, read_diagnostics
from sapo_jax.config import load
from sapo_jax.train import train

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHORT = ["cold_start.steps=300", "train.steps=40", "evaluate.every=0", "checkpoint.every=40"]


def variants() -> dict[str, tuple[Path, list[str]]]:
    """Config and overrides of each run, by its label."""
    configs = {"tiny dense": "quickstart.yaml", "tiny MoE": "quickstart_moe.yaml"}
    return {label: (HERE.parent / "configs" / name, SHORT) for label, name in configs.items()}


def runs(folder: Path = Path("runs/assumptions")) -> dict[str, Diagnosed]:
    """Train them (2 minutes each on two cores), or read what is there. From the repository's root: the configs name
    files by relative paths."""
    found = {}
    for label, (config, overrides) in variants().items():
        run_dir = folder / label.replace(" ", "_")
        if not (run_dir / "summary.json").exists():
            train(load(config, [*overrides, f"name={label.replace(' ', '_')}", f"run_dir={run_dir}"]))
        found[label] = read_diagnostics(run_dir)
    return found
