"""Plans of the pod configs: what the TPU compiler makes of this package, and what a roofline says of that.

    python experiments/pod_plans.py [NAME ...]      needs the extra [plan]; 0.5 to 15 minutes a program

Runs `sapo-jax plan` for each line of PLANS (or those named) and writes results/plan_NAME.json; then prints the tables
of README.md from what is in results/. Programs that were compiled before come from .cache/plan.

Expected: the updates of Qwen3-30B-A3B on v5p are bound by compute, at no more than 1.4 times the useful FLOPs
and no more than 80 % of the chips' HBM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sapo_jax.cli import main

HERE = Path(__file__).parent
PLANS = {  # config -> options
    "qwen3_4b_v5e_16": "--topology v5e:4x4 --mean-tokens 1500",
    "qwen3_4b_v6e_8": "--topology v6e:2x4 --mean-tokens 1500",
    "qwen3_30b_a3b_v5p_64_4k": "--topology v5p:4x4x4 --mean-tokens 1500",
    "qwen3_30b_a3b_v5p_64": "--topology v5p:4x4x4 --mean-tokens 8000",
    "qwen3_30b_a3b_v6e_256": "--topology v6e:16x16 --mean-tokens 8000",
    "qwen3_235b_a22b_v5p_512": "--topology v5p:8x8x8 --mean-tokens 8000",
}


def run(name: str) -> None:
    config, out = HERE.parent / f"configs/pod/{name}.yaml", HERE / f"results/plan_{name}.json"
    main(["plan", str(config), *PLANS[name].split(), "--json", str(out)])


def table() -> str:
    """Chip x model x context, of the reports in results/."""
    lines = [
        "| config | chips | row, tokens | function | fits, of HBM | FLOPs / useful | bound | MFU, roof / estimate "
        "| tokens/s/chip | compile |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PLANS:
        path = HERE / f"results/plan_{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for function, r in found["functions"].items():
            row = (
                f"| {name} | {found['topology']} | {found['workload']['row_tokens']} | {function} "
            )
            if "mfu" not in r:
                fraction = (
                    "" if r["peak_fraction"] is None else f", {100 * r['peak_fraction']:.0f} %"
                )
                lines.append(f"{row}| **no**{fraction} | | | | | {r['compile_seconds']:.0f} s |")
                continue
            lines.append(
                f"{row}| {'yes' if r['fits'] else '**no**'}, {100 * r['peak_fraction']:.0f} % | {r['flops_ratio']:.2f} "
                f"| {r['bound']} | {100 * r['mfu']:.0f} / {100 * r['mfu_estimate']:.0f} % "
                f"| {r['tokens_per_second_per_chip']:,.0f} | {r['compile_seconds']:.0f} s |"
            )
    return "\n".join(lines)


def iterations() -> str:
    """Seconds of one RL iteration of each, by phase, of the reports in results/."""
    lines = [
        "| config | completions: number, mean, longest | prefill | decode | score | update | iteration, s "
        "| completion tokens/s/chip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, options in PLANS.items():
        path = HERE / f"results/plan_{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if one := found.get("iteration"):
            work, mean = found["workload"], options.split("--mean-tokens ")[1]
            phases = " | ".join(
                f"{one['phases'][phase]:,.3g}" for phase in ("prefill", "decode", "score", "update")
            )
            lines.append(
                f"| {name} | {work['sequences']:,}, {int(mean):,}, {work['new_tokens']:,} | {phases} "
                f"| {one['seconds']:,.0f} | {one['completion_tokens_per_second_per_chip']:,.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:] or PLANS:
        run(name)
    print(table(), iterations(), sep="\n\n")
