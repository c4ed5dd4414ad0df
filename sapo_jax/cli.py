"""`sapo-jax <command> CONFIG key=value ...`: the only place that reads a command line.

Exit codes: 0 what was asked for is done; 1 it failed; 2 the command line or the config is wrong;
75 the run was told to stop (SIGTERM, Ctrl-C), has saved, and the same command resumes it.
"""

from __future__ import annotations

import argparse
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
  sapo-jax analyze runs/quickstart                             what the gate does, whether A1 and A2 hold; plots
"""

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sapo-jax", description="RL of language models with SAPO and its baselines, in JAX.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, what: str = "a YAML file", *further: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("config", metavar="CONFIG", type=Path, help=what)
        for word in further:
            sub.add_argument(word, metavar=word.upper(), type=Path)
        sub.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the config, e.g. train.steps=50")
        return sub

    run = "a YAML file, or the folder of a run"
    sub = command("train", "cold start (if cold_start.steps > 0), then RL; on an existing run folder, resume it", run)
    sub.add_argument(
        "--profile", type=_count, default=0, metavar="N", help="leave a trace of N RL steps in the run folder, trace/"
    )
    command("sft", "the cold start alone", run)
    command("config", "dry run: the resolved config, parameters, tokens, FLOPs, memory; compiles nothing", run)
    for name, summary in (
        ("eval", "avg@k and pass@k of a run's checkpoint on its held-out problems"),
        ("sample", "look at completions of a run's checkpoint"),
    ):
        sub = command(name, summary, run)
        sub.add_argument("--step", type=int, help="RL step of the checkpoint (default: the newest)")
        if name == "sample":
            sub.add_argument("--prompt", action="append", help="a question (repeatable; default: held-out problems)")
            sub.add_argument("-n", type=int, default=4, help="completions per prompt, and held-out problems shown (4)")
            sub.add_argument("--greedy", action="store_true", help="the most probable tokens instead of samples")
    sub = command("export", "write a run's policy as a Hugging Face model directory", run, "directory")
    sub.add_argument("--step", type=int, help="RL step of the checkpoint (default: the newest)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32: nothing is rounded)")

    summary = "a GGUF file (llama.cpp) into a Hugging Face model directory"
    sub = commands.add_parser("convert", help=summary, description=summary)
    sub.add_argument("source", metavar="FILE.gguf", type=Path, help="architecture llama, qwen3 or qwen3moe")
    sub.add_argument("target", metavar="DIR", type=Path, help="new or empty; appears when it is complete")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")

    summary = "A1/A2 statistics, gate and gradient shares of a run, from its diagnostics.jsonl: a table and plots"
    sub = commands.add_parser("analyze", help=summary, description=summary)
    sub.add_argument("run", metavar="RUN", type=Path, help="the folder of a run; nothing else of it is needed")
    sub.add_argument("--out", type=Path, help="folder of phases.csv and the plots (default: RUN/analysis)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of steps >= 1, got {text!r}")
    return int(text)


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
    return _guarded(COMMANDS[args.command], cfg, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value words may stand before or after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command in WITHOUT_CONFIG:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return args
    if wrong := [word for word in [*args.overrides, *rest] if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)} (overrides look like key.path=value)")
    args.overrides += rest
    return args


def _guarded(command, cfg: Config, args: argparse.Namespace) -> int:
    """Errors with a message for people become that message; anything else is a bug and keeps its traceback."""
    if command is describe_command:
        return describe_command(cfg, args)
    from sapo_jax.checkpoint import CheckpointError
    from sapo_jax.rewards import WorkerError
    from sapo_jax.run import STOPPED, RunError, Stopped

    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        command(cfg, args)
    except Stopped:
        print("stopped as told; the state is saved, and the same command goes on from here", file=sys.stderr)
        return STOPPED
    except (CheckpointError, ConfigError, RunError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- commands; each imports what it needs: quick `--help`


def train_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.train import train

    train(cfg, traced=args.profile)


def sft_command(cfg: Config, _args: argparse.Namespace) -> None:
    from sapo_jax.sft import sft

    sft(cfg)


def describe_command(cfg: Config, _args: argparse.Namespace) -> int:
    from sapo_jax.data import load_tokenizer
    from sapo_jax.describe import describe

    print(describe(cfg, load_tokenizer(cfg.data.tokenizer).vocab_size))
    return 0


def eval_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.evaluate import evaluate_run

    evaluate_run(cfg, args.step)


def sample_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.evaluate import show_samples

    show_samples(cfg, args.step, args.prompt, args.n, args.greedy)


def export_command(cfg: Config, args: argparse.Namespace) -> None:
    from sapo_jax.export import export_run

    export_run(cfg, args.directory, args.step, args.dtype)


def convert_command(args: argparse.Namespace) -> int:
    from sapo_jax.models.gguf import GGUFError, convert

    try:
        found = convert(args.source, args.target, args.dtype)
    except (GGUFError, OSError) as error:  # OSError: the disk is full, the place cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    millions, gigabytes = found.parameters / 1e6, found.bytes / 1e9
    print(f"{args.target}: {found.config['model_type']}, {millions:,.1f} M parameters, {gigabytes:.2f} GB {args.dtype}")
    return 0


def analyze_command(args: argparse.Namespace) -> int:
    from sapo_jax.analyze import AnalysisError, analyze

    try:
        analyze(args.run, args.out)
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


WITHOUT_CONFIG = {"convert": convert_command, "analyze": analyze_command}
COMMANDS = {
    "train": train_command,
    "sft": sft_command,
    "eval": eval_command,
    "sample": sample_command,
    "config": describe_command,
    "export": export_command,
}

if __name__ == "__main__":
    sys.exit(main())
