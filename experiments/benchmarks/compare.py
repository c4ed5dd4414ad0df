"""This package against its peers on the same work, the same weights and the same machine.

    make bench                                         # all of it: about an hour on two cores
    python experiments/benchmarks/compare.py --workloads small --jobs update,score --peers hf,tunix

The peers are installed by install_peers.py, the workloads are those of workloads.py, and what
each side does is in peers/. For a row of the table all sides take turns, A B C A B C, each in a
process of its own: one warm-up, then `--runs` timed runs (3 where one takes more than 30 s). It
is checked that they did the same: equal log-probs, losses and gradient norms, or numbers of new
tokens. Medians go to results/peers.csv (rows that were not measured stay as they are) and the
tables to results/peers.md.

Exit code: 0; 1 if a peer is missing, failed, or did something else; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peer_table
from install_peers import installed, python_of
from peer_table import OURS
from runner import Measured, Runner, available_gb, disagreement, take_turns

HERE = Path(__file__).parent
Row = tuple[str, str]  # of the table: (workload, job)

PEERS = {  # and the environment they live in
    "tunix": "tunix",
    "trl": "torch",
    "hf": "torch",
    "vllm": "vllm",
}
ROWS: dict[Row, str] = {  # the peers that do this job
    ("small", "update"): "tunix trl hf",
    ("small", "score"): "tunix trl hf",
    ("small", "rollout"): "tunix trl hf vllm",  # 16 requests of 192 new tokens
    ("small", "tail16"): "tunix hf vllm",  # 16 of heavy-tailed lengths
    ("small", "tail64"): "tunix hf vllm",  # 64 of them through 16 slots
    ("small", "iteration"): "tunix trl hf",  # rollout, verification, one update
    ("mid", "update"): "tunix trl hf",
    ("mid", "score"): "tunix trl hf",
    ("mid", "rollout"): "tunix hf vllm",
    ("vocab", "update"): "tunix trl hf",
    ("vocab", "score"): "tunix trl hf",
    ("moe", "update"): "tunix trl hf",
    ("moe", "score"): "tunix trl hf",
    ("moe", "rollout"): "tunix hf",
}
NEEDS_GB: dict[Row, float] = {  # with all that take part
    ("vocab", "update"): 20.0,
    ("vocab", "score"): 12.0,
    ("mid", "update"): 13.0,
}
# The CPU devices of our side, where more than 1 pay on two cores. JAX_NUM_CPU_DEVICES overrides
# them.
DEVICES = {"small": 2}
# Rows in which one peer at a time runs beside us: together they do not fit into memory.
APART = {("vocab", "update")}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, and as `rows` what it chooses of the table. Exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workloads = list(dict.fromkeys(workload for workload, _ in ROWS))
    jobs = list(dict.fromkeys(job for _, job in ROWS))
    for option, names in (("workloads", workloads), ("jobs", jobs), ("peers", list(PEERS))):
        parser.add_argument(
            f"--{option}",
            default=names,
            type=_comma_separated(names),
            metavar="A,B",
            help=", ".join(names),
        )
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (5)")
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/peers"), help="environments and workloads"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "peers.csv")
    parser.add_argument(
        "--lock", type=Path, help="hold the lock of this file during each run, on a shared machine"
    )
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the tables of what is there"
    )
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs: at least 1")
    args.rows = [
        (workload, job) for workload, job in ROWS if workload in args.workloads and job in args.jobs
    ]
    if not args.rows:
        existing = ", ".join("/".join(row) for row in ROWS)
        parser.error(f"no row has one of these workloads and jobs; there are {existing}")
    return args


def _comma_separated(names: list[str]) -> Callable[[str], list[str]]:
    """A parser of "A,B" that accepts only these names."""

    def parse_names(text: str) -> list[str]:
        if not text:
            return []
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are {', '.join(names)}"
            )
        return chosen

    return parse_names


def command(side: str, folder: Path) -> list[str]:
    """The start of the command line of a side's process."""
    if side == OURS:
        return [sys.executable, str(HERE / "peers" / "sapo_jobs.py")]
    python = python_of(folder, PEERS[side])
    return [str(python), str(HERE / "peers" / f"{side}_jobs.py")]


def environment(side: str, workload: str, folder: Path) -> dict[str, str]:
    """The environment variables of a side's process.

    vLLM asks for its OpenMP runtime to be loaded first. Our side shares a small model's batch out
    to CPU devices. The others stay as their users find them.
    """
    if side == "vllm":
        library = folder / "vllm" / "lib" / "libiomp5.so"
        return os.environ | {"LD_PRELOAD": str(library.resolve())}
    if side == OURS:
        devices = os.environ.get("JAX_NUM_CPU_DEVICES", str(DEVICES.get(workload, 1)))
        return os.environ | {"JAX_NUM_CPU_DEVICES": devices}
    return dict(os.environ)


def measure(
    row: Row, peers: Sequence[str], args: argparse.Namespace, progress: Callable[[str], None]
) -> dict[str, Measured]:
    """Our side and these peers on a row of the table, by side."""
    workload, job = row
    work_file = args.folder / "work" / workload / "workload.json"
    results = {side: Measured() for side in (OURS, *peers)}

    def starter(side: str) -> Callable[[], Runner]:
        line = [*command(side, args.folder), str(work_file), job]
        return lambda: Runner(line, environment(side, workload, args.folder))

    together = [list(peers)]
    if row in APART:
        together = [[peer] for peer in peers]
    for group in together:
        start = {side: starter(side) for side in (OURS, *group)}
        take_turns(start, results, args.runs, args.lock, progress)
    return results


def figures(row: Row, results: dict[str, Measured]) -> list[peer_table.Figures]:
    """The rows of the CSV file, one for each side that did not fail."""
    workload, job = row
    rows = []
    for side, measured in results.items():
        if not measured.seconds or measured.error:
            continue
        rows.append(
            {
                "workload": workload,
                "job": job,
                "who": side,
                "seconds": float(np.median(measured.seconds)),
                "fastest": min(measured.seconds),
                "runs": len(measured.seconds),
                "first": measured.first,
                "peak_mb": measured.peak_mb,
                "built_mb": measured.built_mb,
                "new_tokens": sum(measured.evidence.get("new_tokens", [])),
                "others": float(np.median(measured.others)),
            }
        )
    return rows


def faults(results: dict[str, Measured]) -> list[str]:
    """What went wrong in a row, one sentence each."""
    sentences = [
        f"{side} failed: {measured.error.splitlines()[-1]}"
        for side, measured in results.items()
        if measured.error
    ]
    ours = results[OURS]
    for side, measured in results.items():
        if side == OURS or ours.error or measured.error:
            continue
        reason = disagreement(ours.evidence, measured.evidence)
        if reason:
            sentences.append(f"{side} did other work than ours: {reason}")
    return sentences


def measure_rows(args: argparse.Namespace) -> list[str]:
    """Measures the chosen rows and stores their figures. Returns what went wrong."""
    faults_of_all: list[str] = []
    for workload, job in args.rows:
        label = f"{workload}/{job}"
        needed = NEEDS_GB.get((workload, job), 0.0)
        free = available_gb()
        if needed > free:
            faults_of_all.append(
                f"{label} needs {needed:.0f} GB of memory, {free:.1f} are free: left out"
            )
            continue
        write_work = [sys.executable, str(HERE / "work.py"), workload, str(args.folder / "work")]
        subprocess.run(write_work, check=True)

        def progress(text: str, label: str = label) -> None:
            print(f"[{label}] {text}", flush=True)

        peers = [peer for peer in ROWS[workload, job].split() if peer in args.peers]
        results = measure((workload, job), peers, args, progress)
        faults_of_all += [f"{label}: {fault}" for fault in faults(results)]
        stored = peer_table.read(args.out)
        new = figures((workload, job), results)
        peer_table.write(args.out, peer_table.merge(stored, new))
    return faults_of_all


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.table:
        print("\n" + tables(args.out))
        return 0
    missing = {PEERS[peer] for peer in args.peers if not installed(args.folder, PEERS[peer])}
    if missing:
        rest = ",".join(peer for peer in args.peers if PEERS[peer] not in missing)
        names = " ".join(sorted(missing))
        print(
            f"not installed: {names}; run install_peers.py {names}, "
            f"or leave them out: --peers '{rest}'"
        )
        return 1
    faults_of_all = measure_rows(args)
    text = tables(args.out)
    args.out.with_suffix(".md").write_text(text + "\n")
    print("\n" + text)
    for fault in faults_of_all:
        print(f"\n{fault}", file=sys.stderr)
    return 1 if faults_of_all else 0


def tables(path: Path) -> str:
    return peer_table.tables(peer_table.read(path), list(ROWS), list(PEERS))


if __name__ == "__main__":
    sys.exit(main())
