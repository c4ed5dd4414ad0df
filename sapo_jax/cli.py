"""`sapo-jax <command> CONFIG key=value ...`: the only place that reads a command line.

Exit codes: 0 what was asked for is done; 1 it failed; 2 the command line or the config is wrong;
75 the run was told to stop (SIGTERM, Ctrl-C), has saved, and the same command resumes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sapo_jax.config import Config, ConfigError, load, warnings

EPILOG = """examples:
  sapo-jax config configs/quickstart.yaml                      what would run: shapes, FLOPs, memory; compiles nothing
  sapo-jax train configs/quickstart.yaml objective.name=grpo name=grpo
  sapo-jax train configs/quickstart.yaml --profile 3           a trace of three RL steps, runs/quickstart/trace
  sapo-jax eval runs/quickstart evaluate.samples=32
  sapo-jax sample runs/quickstart --prompt "Calculate 3 + 4."
  sapo-jax export runs/quickstart exported --dtype bfloat16
  sapo-jax convert model.gguf models/model
  sapo-jax plan configs/pod/qwen3_30b_a3b_v5p_64.yaml --topology v5p:4x4x4
  sapo-jax analyze runs/quickstart                             what the gate does, whether A1 and A2 hold; plots
  sapo-jax sweep configs/sweeps/temperature.yaml               arms x seeds -> run folders, results.csv
  sapo-jax report runs/temperature                             their curves over seeds, with intervals
"""

THREADS = """A run takes all cores, or all accelerators, that it sees: one at a time on each machine is the rule, and
--shard uses several machines. With --max-parallel N on a CPU, give each run its share of threads: PJRT_NPROC=2 sapo-jax
sweep ... (rounding depends on it: keep it over the whole sweep). Each run also has rewards.workers processes."""

DTYPES = ("float32", "bfloat16", "float16")
RUN = "a YAML file, or the folder of a run"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sapo-jax", description="RL of language models with SAPO and its baselines, in JAX.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_runs, _add_plan_and_export, _add_files, _add_sweeps):
        add(commands)
    return parser


def _command(
    commands, name: str, summary: str, what: str = "a YAML file", *further: str
) -> argparse.ArgumentParser:
    """A command on a config."""
    sub = commands.add_parser(name, help=summary, description=summary)
    sub.add_argument("config", metavar="CONFIG", type=Path, help=what)
    for word in further:
        sub.add_argument(word, metavar=word.upper(), type=Path)
    sub.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="changes to the config, e.g. train.steps=50",
    )
    return sub


def _add_runs(commands) -> None:
    training = _command(
        commands,
        "train",
        "cold start (if cold_start.steps > 0), then RL; on an existing run folder, resume it",
        RUN,
    )
    training.add_argument(
        "--profile",
        type=_count,
        default=0,
        metavar="N",
        help="leave a trace of N RL steps in the run folder, trace/",
    )
    together = [training, _command(commands, "sft", "the cold start alone", RUN)]
    _command(
        commands,
        "config",
        "dry run: the resolved config, parameters, tokens, FLOPs, memory; compiles nothing",
        RUN,
    )
    for name, summary in (
        ("eval", "avg@k and pass@k of a run's checkpoint on its held-out problems"),
        ("sample", "look at completions of a run's checkpoint"),
    ):
        sub = _command(commands, name, summary, RUN)
        sub.add_argument("--step", type=int, help="RL step of the checkpoint (default: the newest)")
        together += [sub] * (name == "eval")
        if name == "sample":
            sub.add_argument(
                "--prompt",
                action="append",
                help="a question (repeatable; default: held-out problems)",
            )
            sub.add_argument(
                "-n",
                type=int,
                default=4,
                help="completions per prompt, and held-out problems shown (4)",
            )
            sub.add_argument(
                "--greedy", action="store_true", help="the most probable tokens instead of samples"
            )
    for sub in together:
        sub.add_argument(
            "--processes", metavar="HOW", help="one of several processes that are one job, each started with the same "
            "command: `auto` (TPU pods, GKE, Slurm: found out), or HOST:PORT,N,I (process I of N; 0 listens there)"
        )  # fmt: skip


def _add_plan_and_export(commands) -> None:
    summary = "compile the run's programs for a TPU topology that need not be here: what fits, what bounds it"
    sub = _command(commands, "plan", summary)
    sub.add_argument(
        "--topology",
        required=True,
        help="e.g. v5p:4x4x4, v5e:4x4, v6e:16x16; cpu: check the model here",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    sub.add_argument(
        "--functions", default="update,score,prefill,decode", help="some of them, with commas (all)"
    )
    sub.add_argument(
        "--mean-tokens",
        type=float,
        help="mean length of completions (default: rollout.max_new_tokens)",
    )
    sub.add_argument(
        "--sweep-mesh", action="store_true", help="try every mesh that divides, rank them"
    )
    sub = _command(
        commands,
        "export",
        "write a run's policy as a Hugging Face model directory",
        RUN,
        "directory",
    )
    sub.add_argument("--step", type=int, help="RL step of the checkpoint (default: the newest)")
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights (float32: nothing is rounded)",
    )


def _add_files(commands) -> None:
    summary = "a GGUF file (llama.cpp) into a Hugging Face model directory"
    sub = commands.add_parser("convert", help=summary, description=summary)
    sub.add_argument(
        "source", metavar="FILE.gguf", type=Path, help="architecture llama, qwen3 or qwen3moe"
    )
    sub.add_argument(
        "target", metavar="DIR", type=Path, help="new or empty; appears when it is complete"
    )
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")

    summary = "A1/A2 statistics, gate and gradient shares of a run, from its diagnostics.jsonl: a table and plots"
    sub = commands.add_parser("analyze", help=summary, description=summary)
    sub.add_argument(
        "run", metavar="RUN", type=Path, help="the folder of a run; nothing else of it is needed"
    )
    sub.add_argument(
        "--out", type=Path, help="folder of phases.csv and the plots (default: RUN/analysis)"
    )


def _add_sweeps(commands) -> None:
    summary = (
        "train the runs of a sweep file (arms x seeds) that are not finished; writes results.csv"
    )
    sub = commands.add_parser("sweep", help=summary, description=summary, epilog=THREADS)
    sub.add_argument(
        "file", metavar="FILE", type=Path, help="a sweep file, e.g. configs/sweeps/temperature.yaml"
    )
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*", help="changes to the config of all its runs"
    )
    sub.add_argument(
        "--folder",
        type=Path,
        help="of the runs and results.csv (default: the file's, or runs/NAME)",
    )
    sub.add_argument(
        "--max-parallel", type=_count, default=1, metavar="N", help="runs at a time (1)"
    )
    sub.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="i/n",
        help="only the i-th of n parts, i from 1",
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="list the runs and how far they are; start nothing"
    )

    summary = "curves of the arms of a sweep, or of runs, over their seeds: a table, report.png, curves.csv, final.csv"
    sub = commands.add_parser("report", help=summary, description=summary)
    sub.add_argument(
        "paths", metavar="FOLDER", type=Path, nargs="+", help="folders of sweeps or runs"
    )
    sub.add_argument(
        "--metric",
        metavar="NAME,...",
        help="metrics to show (held_out/avg,reward/mean,entropy/mean)",
    )
    sub.add_argument(
        "--out", type=Path, help="folder to write to (default: report/ in FOLDER, or where all lie)"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not i/n with i from 1 to n, such as 1/3, 2/3, 3/3"
        )
    return int(i), int(n)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.command in WITHOUT_CONFIG:
        return WITHOUT_CONFIG[args.command](args)
    try:
        path, overrides = args.config, list(args.overrides)
        if path.is_dir():  # a run folder: its own config, wherever it was moved to
            path, overrides = path / "config.yaml", [f"run_dir={json.dumps(str(path))}", *overrides]
        cfg = load(path, overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for warning in warnings(cfg):
        print(f"warning: {warning}", file=sys.stderr)
    if getattr(args, "processes", None) is None:
        return _guarded(COMMANDS[args.command], cfg, args)
    return _one_of_several(COMMANDS[args.command], cfg, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value words may stand before or after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return args
    if wrong := [
        word for word in [*args.overrides, *rest] if word.startswith("-") or "=" not in word
    ]:
        parser.error(
            f"unrecognized arguments: {' '.join(wrong)} (overrides look like key.path=value)"
        )
    args.overrides += rest
    return args


def _one_of_several(command, cfg: Config, args: argparse.Namespace) -> int:
    """As `_guarded`, in a job of several processes."""
    from sapo_jax.distributed import processes
    from sapo_jax.errors import STOPPED

    try:
        processes.start(args.processes)
        code = _guarded(command, cfg, args)
    except processes.ProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        processes.explain(error)
        code = 1
    return code if code in (0, STOPPED) else processes.leave(code)


def _guarded(command, cfg: Config, args: argparse.Namespace) -> int:
    """Errors with a message for people become that message; anything else is a bug and keeps its traceback."""
    if command in (describe_command, plan_command):
        return command(cfg, args)
    from sapo_jax.errors import (
        STOPPED,
        CheckpointError,
        DataError,
        FolderError,
        RunError,
        Stopped,
        WorkerError,
    )

    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        command(cfg, args)
    except Stopped:
        print(
            "stopped as told; the state is saved, and the same command goes on from here",
            file=sys.stderr,
        )
        return STOPPED
    except (CheckpointError, ConfigError, DataError, FolderError, RunError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- commands; each imports what it needs: quick `--help`


def train_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.training.loop import train

    train(cfg, traced=args.profile)


def sft_command(cfg: Config, _args: argparse.Namespace) -> None:
    from sapo_jax.training.sft import sft

    sft(cfg)


def describe_command(cfg: Config, _args: argparse.Namespace) -> int:
    from sapo_jax.data import load_tokenizer
    from sapo_jax.plan.dry_run import describe

    print(describe(cfg, load_tokenizer(cfg.data.tokenizer).vocab_size))
    return 0


def plan_command(cfg: Config, args: argparse.Namespace) -> int:
    from sapo_jax.data import load_tokenizer
    from sapo_jax.plan.command import run_plan

    if not cfg.model.vocab_size:
        size = load_tokenizer(cfg.data.tokenizer).vocab_size
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))
    functions = args.functions.split(",")
    return run_plan(cfg, args.topology, functions, args.json, args.mean_tokens, args.sweep_mesh)


def eval_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.training.evaluate import evaluate_run

    evaluate_run(cfg, args.step)


def sample_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.training.evaluate import show_samples

    show_samples(cfg, args.step, args.prompt, args.n, args.greedy)


def export_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.training.export import export_run

    export_run(cfg, args.directory, args.step, args.dtype)


def convert_command(args: argparse.Namespace) -> int:
    from sapo_jax.errors import GGUFError
    from sapo_jax.hub.gguf import convert

    try:
        found = convert(args.source, args.target, args.dtype)
    except (GGUFError, OSError) as error:  # OSError: the disk is full, the place cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    millions, gigabytes = found.parameters / 1e6, found.bytes / 1e9
    print(
        f"{args.target}: {found.config['model_type']}, {millions:,.1f} M parameters, {gigabytes:.2f} GB {args.dtype}"
    )
    return 0


def analyze_command(args: argparse.Namespace) -> int:
    from sapo_jax.analysis.phases import analyze
    from sapo_jax.errors import AnalysisError

    try:
        analyze(args.run, args.out)
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def sweep_command(args: argparse.Namespace) -> int:
    from sapo_jax.sweeps.load import load_sweep

    try:
        plan = load_sweep(args.file, args.overrides, args.folder)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for warning in plan.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    from sapo_jax.errors import FolderError, RunError
    from sapo_jax.sweeps.launch import plan_lines, sweep

    try:
        if args.dry_run:
            print("\n".join(plan_lines(plan, args.shard)))
            return 0
        return sweep(plan, max_parallel=args.max_parallel, shard=args.shard)
    except (
        ConfigError,
        FolderError,
        RunError,
        OSError,
    ) as error:  # of a run's stored config; of the folder, the disk
        print(f"error: {error}", file=sys.stderr)
        return 1


def report_command(args: argparse.Namespace) -> int:
    from sapo_jax.analysis.report import report
    from sapo_jax.errors import ReportError, RunError

    try:
        report(args.paths, args.metric.split(",") if args.metric else None, args.out)
    except (ReportError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


WITHOUT_CONFIG = {
    "convert": convert_command, "analyze": analyze_command, "sweep": sweep_command, "report": report_command
}  # fmt: skip
COMMANDS = {
    "train": train_command,
    "sft": sft_command,
    "eval": eval_command,
    "sample": sample_command,
    "config": describe_command,
    "plan": plan_command,
    "export": export_command,
}

if __name__ == "__main__":
    sys.exit(main())
