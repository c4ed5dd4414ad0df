"""Where the time of a rollout and of an update goes, by the kind of operation.

    python experiments/benchmarks/where_time_goes.py [small|mid|vocab|moe] [rollout|update]

It takes a minute for small, and also prints the machine's own speed at a matrix product.

The script traces one run of the package's own compiled program on a workload of the comparison
with the peers (workloads.py), on a quiet CPU. Events of JAX's trace are summed by instruction,
and instructions by what the program's text says of them: products of attention, of weights, and
all the rest (norms, softmax, copies, the optimiser). A trace slows a program down; the first line
says by how much. GFLOP/s counts what the model needs, not what padding or recomputing adds.
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
from collections.abc import Callable, Sequence
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

# The einsums of attention in ops/attention_xla.py: of whole rows, of a decode step, in blocks.
ATTENTION_EINSUM = re.compile(r"bkgh,bkht|bkgt,bkth|btkgh,bskh|bkgts,bskh|bkrh,bksh|bkrs,bk[sr]h")
# How a program's text (HLO) is read.
COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(")
INSTRUCTION = re.compile(r" +(?:ROOT )?%([\w.\-]+) = ")
CALLED_COMPUTATION = re.compile(r"calls=%([\w.\-]+)")
SOURCE = re.compile(r'op_name="([^"]*)"')
CONTAINER = re.compile(r"(while|call|conditional)[.\d]*$")  # events that contain others

ATTENTIONS = "attention's products"
WEIGHTS = "products of weights"
REST = "the rest"
Program = tuple[str, Callable[[], object]]  # its text, and one run


def rollout_program(setting: sapo_jobs.Setting, work: Work) -> Program:
    new_tokens = len(work.completions[0])
    sampler = Sampler(setting.policy, SamplingParams(), work.group, new_tokens, (), sapo_jobs.PAD)
    inputs = sampler.inputs(sapo_jobs.prompts_of(work.prompts))
    inputs = sharding.put_batch(inputs, setting.mesh)
    key = jax.random.key(0)
    compiled = _sample.lower(sampler, setting.params, *inputs, key).compile()
    return compiled.as_text(), lambda: compiled(setting.params, *inputs, key)


def update_program(setting: sapo_jobs.Setting, work: Work) -> Program:
    updates = sapo_jobs.updates_of(setting, work)
    updates.batch = sharding.put_batch(updates.batch, setting.mesh)
    updates.update = updates.update.lower(updates.state, updates.batch).compile()
    return updates.update.as_text(), updates


PROGRAMS = {"rollout": rollout_program, "update": update_program}


def kinds(text: str) -> dict[str, str]:
    """The kind of each instruction of a program, by the instruction's name.

    An instruction is a product if it is one itself, or if the fusion that it calls holds one.
    """
    # The sources of all products, by the instruction's name and by that of its computation.
    products: dict[str, list[str]] = collections.defaultdict(list)
    # What tells the kind of an instruction: the computation that it calls, or itself.
    described_by: dict[str, str] = {}
    computation = ""
    for line in text.splitlines():
        opening = COMPUTATION.match(line)
        if opening:
            computation = opening[1]
            continue
        instruction = INSTRUCTION.match(line)
        if not instruction:
            continue
        name = instruction[1]
        fusion = CALLED_COMPUTATION.search(line)
        described_by[name] = fusion[1] if fusion else name
        if " dot(" in line:
            source = SOURCE.search(line)
            source_text = source[1] if source else ""
            products[name].append(source_text)
            products[computation].append(source_text)
    return {name: kind_of(products.get(key, [])) for name, key in described_by.items()}


def kind_of(sources: Sequence[str]) -> str:
    """The kind of an instruction that holds products with these sources."""
    if not sources:
        return REST
    if ATTENTION_EINSUM.search(" ".join(sources)):
        return ATTENTIONS
    return WEIGHTS


def traced_seconds(run: Callable[[], object]) -> collections.Counter[str]:
    """Seconds of each instruction in one run."""
    seconds: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(run())
        with gzip.open(next(Path(folder).rglob("perfetto_trace.json.gz"))) as file:
            events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("ph") == "X" and not CONTAINER.match(event["name"]):
            seconds[event["name"]] += event["dur"] / 1e6
    return seconds


def needed_flops(job: str, setting: sapo_jobs.Setting, work: Work) -> float:
    """FLOPs of the products of weights that the model needs, nothing recomputed."""
    model = setting.cfg.model
    completion_tokens = len(work.completions) * len(work.completions[0])
    prompt_tokens = len(work.prompts) * len(work.prompts[0])
    # A group shares its prompt, in both jobs.
    body = (completion_tokens + prompt_tokens) * layer_flops(model)[0]
    head = completion_tokens * 2 * model.vocab_size * model.hidden_size
    passes = {"rollout": 1, "update": 3}[job]  # backward takes twice the forward
    return passes * (body + head)


def report(job: str, setting: sapo_jobs.Setting, work: Work) -> None:
    text, run = PROGRAMS[job](setting, work)
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds_untraced = time.perf_counter() - start

    kind_of_instruction = kinds(text)
    seconds_by_kind: collections.Counter[str] = collections.Counter()
    for name, seconds in traced_seconds(run).items():
        if name in kind_of_instruction:
            seconds_by_kind[kind_of_instruction[name]] += seconds
    total = sum(seconds_by_kind.values())
    print(f"{work.name}, {job}: {seconds_untraced:.2f} s, {total:.2f} s of operations when traced")
    for kind, seconds in seconds_by_kind.most_common():
        rate = ""
        if kind == WEIGHTS:
            rate = f"{needed_flops(job, setting, work) / seconds / 1e9:6.0f} GFLOP/s"
        print(f"  {kind:22} {seconds:6.2f} s {seconds / total:5.0%} {rate}")


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
        f"this machine: {speed['flops'] / 1e9:.0f} GFLOP/s (1024^3, float32), "
        f"{speed['hbm'] / 1e9:.1f} GB/s (x + 1)"
    )
    work = Work.read(work_files.write_work(args.workload, args.folder))
    setting = sapo_jobs.Setting.of(work)
    if setting.mesh.size > 1:
        parser.error("JAX_NUM_CPU_DEVICES: the programs of one device are traced; unset it")
    jobs = [args.job] if args.job else list(PROGRAMS)
    for job in jobs:
        report(job, setting, work)


if __name__ == "__main__":
    main()
