"""This package against its peers on the same work, the same weights and the same machine.

    make bench                                                        # all of it: about an hour on two cores
    python experiments/benchmarks/compare.py --workloads small --jobs update,score --peers hf,tunix

Peers: install_peers.py; workloads: workloads.py; what each one does: peers/. For a row of the table all take turns,
A B C A B C, each in a process of its own: one warm-up, then `--runs` timed runs (3 where one takes more than 30 s).
It is checked that they did the same: equal log-probs, losses and gradient norms, numbers of new tokens. Medians go to
results/peers.csv (rows that were not measured stay as they are) and the tables to results/peers.md.

Exit code: 0; 1 if a peer is missing, failed, or did something else; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peer_table
from install_peers import installed, python_of
from peer_table import OURS
from runner import Measured, Runner, available_gb, disagreement, take_turns

HERE = Path(__file__).parent
PEERS = {
    "tunix": "tunix",
    "trl": "torch",
    "hf": "torch",
    "vllm": "vllm",
}  # and the environment they live in
ROWS = {  # (workload, job) -> the peers that do it
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
NEEDS_GB = {
    ("vocab", "update"): 20.0,
    ("vocab", "score"): 12.0,
    ("mid", "update"): 13.0,
}  # with all that take part
DEVICES = {
    "small": 2
}  # of ours, where more than 1 pay on two cores, unless JAX_NUM_CPU_DEVICES says another number
APART = {("vocab", "update")}  # one peer with us at a time: they do not fit into memory together


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workloads, jobs = (list(dict.fromkeys(names)) for names in zip(*ROWS, strict=True))
    for option, names in (("workloads", workloads), ("jobs", jobs), ("peers", list(PEERS))):
        parser.add_argument(
            f"--{option}", default=names, type=_some_of(names), metavar="A,B", help=", ".join(names)
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
    args.rows = [row for row in ROWS if row[0] in args.workloads and row[1] in args.jobs]
    if not args.rows:
        parser.error(
            f"no row has one of these workloads and jobs; there are {', '.join('/'.join(r) for r in ROWS)}"
        )
    return args


def _some_of(names: list[str]):
    def parsed(text: str) -> list[str]:
        chosen = text.split(",") if text else []
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are {', '.join(names)}"
            )
        return chosen

    return parsed


def command(who: str, folder: Path) -> list[str]:
    """The start of a runner's command line."""
    if who == OURS:
        return [sys.executable, str(HERE / "peers" / "sapo_jobs.py")]
    return [str(python_of(folder, PEERS[who])), str(HERE / "peers" / f"{who}_jobs.py")]


def environment(who: str, workload: str, folder: Path) -> dict[str, str]:
    """vLLM asks for its OpenMP runtime to be loaded first; ours shares a small model's batch out to CPU devices;
    others stay as their users find them."""
    added = {
        "vllm": {"LD_PRELOAD": str((folder / "vllm" / "lib" / "libiomp5.so").resolve())},
        OURS: {
            "JAX_NUM_CPU_DEVICES": os.environ.get(
                "JAX_NUM_CPU_DEVICES", str(DEVICES.get(workload, 1))
            )
        },
    }
    return os.environ | added.get(who, {})


def measure(
    row: tuple[str, str], peers: Sequence[str], args: argparse.Namespace, say
) -> dict[str, Measured]:
    """Ours and these peers on a row."""
    workload, job = row
    path = args.folder / "work" / workload / "workload.json"
    found = {who: Measured() for who in (OURS, *peers)}
    for group in [[peer] for peer in peers] if row in APART else [peers]:
        start = {
            who: lambda who=who: Runner(
                [*command(who, args.folder), str(path), job],
                environment(who, workload, args.folder),
            )
            for who in (OURS, *group)
        }
        take_turns(start, found, args.runs, args.lock, say)
    return found


def figures(row: tuple[str, str], found: dict[str, Measured]) -> list[peer_table.Figures]:
    return [
        {
            "workload": row[0], "job": row[1], "who": who, "seconds": float(np.median(one.seconds)),
            "fastest": min(one.seconds), "runs": len(one.seconds), "first": one.first, "peak_mb": one.peak_mb,
            "built_mb": one.built_mb, "new_tokens": sum(one.evidence.get("new_tokens", [])),
            "others": float(np.median(one.others)),
        }
        for who, one in found.items() if one.seconds and not one.error
    ]  # fmt: skip


def faults(found: dict[str, Measured]) -> list[str]:
    """What went wrong in a row, one sentence each."""
    wrong = [
        f"{who} failed: {one.error.splitlines()[-1]}" for who, one in found.items() if one.error
    ]
    ours = found[OURS]
    for who, one in found.items():
        if not (who == OURS or ours.error or one.error):
            if why := disagreement(ours.evidence, one.evidence):
                wrong.append(f"{who} did other work than ours: {why}")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    missing = {PEERS[peer] for peer in args.peers if not installed(args.folder, PEERS[peer])}
    if missing and not args.table:
        without = ",".join(peer for peer in args.peers if PEERS[peer] not in missing)
        names = " ".join(sorted(missing))
        print(
            f"not installed: {names}; run install_peers.py {names}, or leave them out: --peers '{without}'"
        )
        return 1
    wrong: list[str] = []
    for workload, job in [] if args.table else args.rows:
        label = f"{workload}/{job}"
        if (needs := NEEDS_GB.get((workload, job), 0)) > (free := available_gb()):
            wrong.append(f"{label} needs {needs:.0f} GB of memory, {free:.1f} are free: left out")
            continue
        subprocess.run(
            [sys.executable, str(HERE / "work.py"), workload, str(args.folder / "work")], check=True
        )
        peers = [peer for peer in ROWS[workload, job].split() if peer in args.peers]
        found = measure(
            (workload, job), peers, args, lambda text, at=label: print(f"[{at}] {text}", flush=True)
        )
        wrong += [f"{label}: {why}" for why in faults(found)]
        peer_table.write(
            args.out, peer_table.merge(peer_table.read(args.out), figures((workload, job), found))
        )
    text = peer_table.tables(peer_table.read(args.out), list(ROWS), list(PEERS))
    if not args.table:
        args.out.with_suffix(".md").write_text(text + "\n")
    print("\n" + text)
    for why in wrong:
        print(f"\n{why}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
