"""Does this package gain from a CPU device for each core? One device and two, measured in turns.

    python experiments/benchmarks/cpu_devices.py [small mid moe] [--jobs rollout,update]

Seven minutes for small. The script measures as compare.py does (medians of `--runs`, each side in a
process of its own), but without the peers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from compare import ROWS, command
from peer_table import OURS
from runner import Measured, Runner, disagreement, take_turns
from work import write_work

DEVICE_COUNTS = ("1", "2")


def measure(workload: str, job: str, runs: int, folder: Path) -> dict[str, Measured]:
    """What was measured, by number of devices."""
    line = [*command(OURS, folder), str(write_work(workload, folder / "work")), job]

    def starter(devices: str) -> Callable[[], Runner]:
        return lambda: Runner(line, os.environ | {"JAX_NUM_CPU_DEVICES": devices})

    def progress(text: str) -> None:
        print(f"[{workload}/{job}] devices {text}", flush=True)

    results = {devices: Measured() for devices in DEVICE_COUNTS}
    start = {devices: starter(devices) for devices in DEVICE_COUNTS}
    take_turns(start, results, runs, None, progress)

    for measured in results.values():
        if measured.error:
            raise SystemExit(f"{workload}/{job} failed: {measured.error}")
    reason = disagreement(results["1"].evidence, results["2"].evidence)
    if reason:
        raise SystemExit(f"{workload}/{job}: one and two devices did other work: {reason}")
    return results


def table_line(workload: str, job: str, results: dict[str, Measured]) -> str:
    """A line of the table: seconds (memory, MB) with one device and with two, and their ratio."""
    seconds = {}
    cells = []
    for devices in DEVICE_COUNTS:
        seconds[devices] = float(np.median(results[devices].seconds))
        cells.append(f"{seconds[devices]:.3g} ({results[devices].peak_mb:,.0f})")
    return f"| {workload} | {job} | {' | '.join(cells)} | {seconds['1'] / seconds['2']:.2f} |"


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
    jobs = args.jobs.split(",")
    rows = [(workload, job) for workload, job in ROWS if workload in args.workloads and job in jobs]
    if not rows or args.runs < 1:
        existing = ", ".join("/".join(row) for row in ROWS)
        parser.error(f"nothing to measure; there are {existing}; --runs: at least 1")
    lines = []
    for workload, job in rows:
        results = measure(workload, job, args.runs, args.folder)
        lines.append(table_line(workload, job, results))
    print("\n| workload | job | one device, s (MB) | two | one / two |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
