"""Plans of the pod configs: what the TPU compiler makes of this package, and a roofline's seconds.

    python experiments/pod_plans.py [NAME ...]    with the extra [plan]; 0.5 to 15 minutes a program

For each line of PLANS (or those named) the script runs `sapo-jax plan` and writes
results/plan_NAME.json. Then it prints the tables of sapo_jax/plan/README.md from what is in
results/. Programs that were compiled before come from .cache/plan.

Expected: the updates of Qwen3-30B-A3B on v5p are bound by compute, at no more than 1.4 times the
useful FLOPs and no more than 80 % of the chips' HBM.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sapo_jax.cli import main

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclasses.dataclass(frozen=True)
class Plan:
    topology: str
    mean_tokens: int  # mean length of a completion, for the seconds of an iteration


PLANS = {  # the config's name in configs/pod -> what it is compiled for
    "qwen3_4b_v5e_16": Plan("v5e:4x4", 1500),
    "qwen3_4b_v6e_8": Plan("v6e:2x4", 1500),
    "qwen3_30b_a3b_v5p_64_4k": Plan("v5p:4x4x4", 1500),
    "qwen3_30b_a3b_v5p_64": Plan("v5p:4x4x4", 8000),
    "qwen3_30b_a3b_v6e_256": Plan("v6e:16x16", 8000),
    "qwen3_235b_a22b_v5p_512": Plan("v5p:8x8x8", 8000),
}


def run(name: str) -> None:
    """Compiles the programs of one config and writes its report."""
    plan = PLANS[name]
    command = ["plan", str(HERE.parent / "configs" / "pod" / f"{name}.yaml")]
    command += ["--topology", plan.topology, "--mean-tokens", str(plan.mean_tokens)]
    command += ["--json", str(RESULTS / f"plan_{name}.json")]
    main(command)


def reports() -> dict[str, dict[str, Any]]:
    """The reports that are in results/, by the config's name."""
    found = {}
    for name in PLANS:
        path = RESULTS / f"plan_{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def programs_table() -> str:
    """A line for each program of each report: whether it fits, and what bounds it."""
    lines = [
        "| config | chips | row, tokens | function | fits, of HBM | FLOPs / useful | bound "
        "| MFU, roof / estimate | tokens/s/chip | compile |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports().items():
        row_tokens = report["workload"]["row_tokens"]
        for function, costs in report["functions"].items():
            start = f"| {name} | {report['topology']} | {row_tokens} | {function} "
            if "mfu" in costs:
                lines.append(start + costs_cells(costs))
            else:
                lines.append(start + refusal_cells(costs))
    return "\n".join(lines)


def costs_cells(costs: dict[str, Any]) -> str:
    """The cells of a program that was compiled."""
    fits = "yes" if costs["fits"] else "**no**"
    cells = [
        f"{fits}, {100 * costs['peak_fraction']:.0f} %",
        f"{costs['flops_ratio']:.2f}",
        costs["bound"],
        f"{100 * costs['mfu']:.0f} / {100 * costs['mfu_estimate']:.0f} %",
        f"{costs['tokens_per_second_per_chip']:,.0f}",
        f"{costs['compile_seconds']:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def refusal_cells(costs: dict[str, Any]) -> str:
    """The cells of a program that the compiler refused, because it does not fit."""
    fraction = ""
    if costs["peak_fraction"] is not None:
        fraction = f", {100 * costs['peak_fraction']:.0f} %"
    return f"| **no**{fraction} | | | | | {costs['compile_seconds']:.0f} s |"


def iterations_table() -> str:
    """Seconds of one RL iteration of each config, by phase."""
    lines = [
        "| config | completions: number, mean, longest | prefill | decode | score | update "
        "| iteration, s | completion tokens/s/chip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports().items():
        iteration = report.get("iteration")
        if not iteration:
            continue
        workload = report["workload"]
        mean_tokens = PLANS[name].mean_tokens
        phases = iteration["phases"]
        cells = [
            name,
            f"{workload['sequences']:,}, {mean_tokens:,}, {workload['new_tokens']:,}",
            *(f"{phases[phase]:,.3g}" for phase in ("prefill", "decode", "score", "update")),
            f"{iteration['seconds']:,.0f}",
            f"{iteration['completion_tokens_per_second_per_chip']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:] or PLANS:
        run(name)
    print(programs_table(), iterations_table(), sep="\n\n")
