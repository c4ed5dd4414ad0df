"""Where the time of a rollout and of an update goes, by the kind of operation, beside what the machine can do.

    python experiments/benchmarks/where_time_goes.py [small|mid|vocab|moe] [rollout|update]     a minute for small

One traced run of the package's own compiled program on a workload of the comparison with the peers (workloads.py), on a
quiet CPU. Events of JAX's trace are summed by instruction, and instructions by what the program's text says of them:
products of attention, of weights, and all the rest (norms, softmax, copies, the optimiser). A trace slows a program
down; the first line says by how much. GFLOP/s counts what the model needs, not what padding or recomputing adds.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "peers")]
import sapo_jobs  # noqa: E402
import work as work_files  # noqa: E402
import workloads  # noqa: E402
from worker import Work  # noqa: E402

from sapo_jax.distributed import sharding  # noqa: E402
from sapo_jax.models.size import layer_flops  # noqa: E402
from sapo_jax.plan.measure import calibrate  # noqa: E402
from sapo_jax.rollout import Sampler, SamplingParams  # noqa: E402
from sapo_jax.rollout.sampler import _sample  # noqa: E402

# attention's einsums: decode_attention, _whole, blocked_attention
ATTENTION = re.compile(r"bkgh,bkht|bkgt,bkth|btkgh,bskh|bkgts,bskh|bkrh,bksh|bkrs,bk[sr]h")
COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(")
INSTRUCTION = re.compile(r" +(?:ROOT )?%([\w.\-]+) = ")
CALLED, SOURCE = re.compile(r"calls=%([\w.\-]+)"), re.compile(r'op_name="([^"]*)"')
NESTING = re.compile(r"(while|call|conditional)[.\d]*$")  # events that contain others
ATTENTIONS, WEIGHTS, REST = "attention's products", "products of weights", "the rest"
Program = tuple[str, Callable[[], object]]  # its text, and one run


def rollout_program(at: sapo_jobs.Setting, work: Work) -> Program:
    sampler = Sampler(
        at.policy, SamplingParams(), work.group, len(work.completions[0]), (), sapo_jobs.PAD
    )
    inputs = sharding.put_batch(sampler.inputs(sapo_jobs.prompts_of(work.prompts)), at.mesh)
    compiled = _sample.lower(sampler, at.params, *inputs, jax.random.key(0)).compile()
    return compiled.as_text(), lambda: compiled(at.params, *inputs, jax.random.key(0))


def update_program(at: sapo_jobs.Setting, work: Work) -> Program:
    update, state, batch = sapo_jobs.updating(at, work)
    batch = sharding.put_batch(batch, at.mesh)
    compiled = update.lower(state, batch).compile()
    return compiled.as_text(), sapo_jobs.repeated(compiled, state, batch)


PROGRAMS = {"rollout": rollout_program, "update": update_program}


def kinds(text: str) -> dict[str, str]:
    """Of each instruction of a program: what the product is of that it is, or that the fusion it calls holds."""
    products, called, inside = collections.defaultdict(list), {}, ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            inside = match[1]
        elif match := INSTRUCTION.match(line):
            source, fusion = SOURCE.search(line), CALLED.search(line)
            called[match[1]] = fusion[1] if fusion else match[1]
            if " dot(" in line:
                for name in (match[1], inside):
                    products[name].append(source[1] if source else "")
    kind = lambda sources: (
        ATTENTIONS if ATTENTION.search(" ".join(sources)) else WEIGHTS if sources else REST
    )
    return {name: kind(products.get(target, ())) for name, target in called.items()}


def traced(run: Callable[[], object]) -> collections.Counter:
    """Seconds of each instruction in one run."""
    seconds: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(run())
        with gzip.open(next(Path(folder).rglob("perfetto_trace.json.gz"))) as file:
            events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("ph") == "X" and not NESTING.match(event["name"]):
            seconds[event["name"]] += event["dur"] / 1e6
    return seconds


def report(job: str, at: sapo_jobs.Setting, work: Work) -> None:
    text, run = PROGRAMS[job](at, work)
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    plain = time.perf_counter() - start
    of, by_kind = kinds(text), collections.Counter()
    for name, seconds in traced(run).items():
        if name in of:
            by_kind[of[name]] += seconds
    model, predicted = at.cfg.model, len(work.completions) * len(work.completions[0])
    tokens = predicted + len(work.prompts) * len(
        work.prompts[0]
    )  # a group shares its prompt, in both jobs
    passes = {"rollout": 1, "update": 3}[job]  # backward: twice the forward
    needed = passes * (
        tokens * layer_flops(model)[0] + predicted * 2 * model.vocab_size * model.hidden_size
    )
    print(
        f"{work.name}, {job}: {plain:.2f} s, {sum(by_kind.values()):.2f} s of operations when traced"
    )
    for kind, seconds in by_kind.most_common():
        rate = f"{needed / seconds / 1e9:6.0f} GFLOP/s" if kind == WEIGHTS else ""
        print(f"  {kind:22} {seconds:6.2f} s {seconds / sum(by_kind.values()):5.0%} {rate}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="?", default="small", choices=workloads.SHAPES)
    parser.add_argument("job", nargs="?", choices=PROGRAMS, help="one of the two alone")
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/peers/work"), help="of the workloads' models"
    )
    args = parser.parse_args()
    speed = calibrate()
    print(
        f"this machine: {speed['flops'] / 1e9:.0f} GFLOP/s (1024^3, float32), {speed['hbm'] / 1e9:.1f} GB/s (x + 1)"
    )
    work = Work.read(work_files.write_work(args.workload, args.folder))
    at = sapo_jobs.Setting.of(work)
    if at.mesh.size > 1:
        parser.error("JAX_NUM_CPU_DEVICES: the programs of one device are traced; unset it")
    for job in [args.job] if args.job else PROGRAMS:
        report(job, at, work)


if __name__ == "__main__":
    main()
