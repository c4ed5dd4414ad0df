"""Does this package gain from a CPU device for each core? Ours with one device and with two, in turns.

    python experiments/benchmarks/cpu_devices.py [small mid moe] [--jobs rollout,update]      seven minutes for small

As compare.py measures (medians of `--runs`, each side in a process of its own), but without the peers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from compare import ROWS, command
from peer_table import OURS
from runner import Measured, Runner, disagreement, take_turns
from work import write_work

COUNTS = ("1", "2")


def measure(workload: str, job: str, runs: int, folder: Path) -> dict[str, Measured]:
    """By number of devices."""
    line = [*command(OURS, folder), str(write_work(workload, folder / "work")), job]
    start = {n: lambda n=n: Runner(line, os.environ | {"JAX_NUM_CPU_DEVICES": n}) for n in COUNTS}
    found = {n: Measured() for n in COUNTS}
    take_turns(
        start,
        found,
        runs,
        None,
        lambda text: print(f"[{workload}/{job}] devices {text}", flush=True),
    )
    if errors := [one.error for one in found.values() if one.error]:
        raise SystemExit(f"{workload}/{job} failed: {errors[0]}")
    if why := disagreement(*(found[n].evidence for n in COUNTS)):
        raise SystemExit(f"{workload}/{job}: one and two devices did other work: {why}")
    return found


def line_of(workload: str, job: str, found: dict[str, Measured]) -> str:
    seconds = [float(np.median(found[n].seconds)) for n in COUNTS]
    cells = [f"{s:.3g} ({found[n].peak_mb:,.0f})" for s, n in zip(seconds, COUNTS, strict=True)]
    return f"| {workload} | {job} | {' | '.join(cells)} | {seconds[0] / seconds[1]:.2f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["small"])
    parser.add_argument("--jobs", default="rollout,tail64,iteration,score,update")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/peers"), help="of the workloads"
    )
    args = parser.parse_args(argv)
    rows = [row for row in ROWS if row[0] in args.workloads and row[1] in args.jobs.split(",")]
    if not rows or args.runs < 1:
        parser.error(
            f"nothing to measure; there are {', '.join('/'.join(row) for row in ROWS)}; --runs: at least 1"
        )
    lines = [line_of(*row, measure(*row, args.runs, args.folder)) for row in rows]
    print(
        "\n| workload | job | one device, s (MB) | two | one / two |\n| --- | --- | --- | --- | --- |"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
