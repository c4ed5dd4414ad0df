"""What `sapo-jax plan` does. Exit code 0: all fits; 1: something does not, or there is no plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sapo_jax.config import Config
from sapo_jax.errors import PlanError
from sapo_jax.plan import plan, sweep
from sapo_jax.plan.report import show, show_measured, show_ranking


def run_plan(
    cfg: Config,
    topology: str,
    functions: Sequence[str],
    out: Path | None,
    mean_tokens: float | None = None,
    sweep_mesh: bool = False,
) -> int:
    """Print the plan, with sweep_mesh a ranking of the meshes and the plan of the best, and write it."""
    console = Console(width=120)
    if topology == "cpu":
        from sapo_jax.plan.measure import measure

        found = measure(cfg, functions)
        show_measured(found, console)
        _write(found, out)
        return 0
    try:
        if sweep_mesh:
            found = sweep(cfg, topology, functions)
        else:
            found = [plan(cfg, topology, functions, mean_tokens)]
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not found:
        print(f"error: no mesh over the devices of {topology} suits this config", file=sys.stderr)
        return 1
    if sweep_mesh:
        show_ranking(found, console)
    show(found[0], console)
    _write(found[0] | ({"sweep": [_summary(one) for one in found]} if sweep_mesh else {}), out)
    return 0 if all(report["fits"] for report in found[0]["functions"].values()) else 1


def _write(found: dict, out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _summary(one: dict) -> dict:
    keys = "fits", "peak_fraction", "bound", "mfu", "seconds"
    return {"mesh": one["mesh"]} | {
        name: {k: r.get(k) for k in keys} for name, r in one["functions"].items()
    }
