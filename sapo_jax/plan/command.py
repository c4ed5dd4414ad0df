"""What `sapo-jax plan` does.

Exit code 0: everything fits. Exit code 1: something does not fit, or there is no plan.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sapo_jax.config import Config
from sapo_jax.errors import PlanError
from sapo_jax.plan.planner import plan, rank_meshes
from sapo_jax.plan.tables import show, show_measured, show_ranking


def run_plan(
    cfg: Config,
    topology: str,
    functions: Sequence[str],
    out: Path | None,
    mean_tokens: float | None = None,
    sweep_mesh: bool = False,
) -> int:
    """Print the plan and write it to `out` as JSON. Returns the exit code.

    With `sweep_mesh` a ranking of the meshes and the plan of the best one are printed. The topology
    `cpu` runs the programs on the devices of this machine, to check the model against a clock.
    """
    console = Console(width=120)
    if topology == "cpu":
        from sapo_jax.plan.measure import measure

        measured = measure(cfg, functions)
        show_measured(measured, console)
        _write(measured, out)
        return 0

    try:
        if sweep_mesh:
            plans = rank_meshes(cfg, topology, functions)
        else:
            plans = [plan(cfg, topology, functions, mean_tokens)]
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not plans:
        print(f"error: no mesh over the devices of {topology} suits this config", file=sys.stderr)
        return 1

    best = plans[0]
    written = best
    if sweep_mesh:
        show_ranking(plans, console)
        written = best | {"sweep": [_summary(ranked) for ranked in plans]}
    show(best, console)
    _write(written, out)
    all_fit = all(report["fits"] for report in best["functions"].values())
    return 0 if all_fit else 1


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _summary(plan: dict[str, Any]) -> dict[str, Any]:
    """The mesh of a plan, and what tells it from the others."""
    summary = {"mesh": plan["mesh"]}
    for name, report in plan["functions"].items():
        summary[name] = {
            key: report.get(key) for key in ("fits", "peak_fraction", "bound", "mfu", "seconds")
        }
    return summary
