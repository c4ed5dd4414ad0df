"""`sapo-jax <command> CONFIG key=value ...`: the only place that reads a command line.

Exit codes: 0 what was asked for is done; 1 it failed; 2 the command line or the config is wrong;
74 the disk is full, or a file has reached the limit on its size; 75 the run was told to stop
(SIGTERM, SIGHUP, Ctrl-C), has saved, and the same command resumes it; 130 a second Ctrl-C.

A command imports what it needs when it is run, so that `--help` answers at once, and commands that
only read files start without JAX.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sapo_jax.config import ConfigError, load_file_or_run, warnings, with_vocabulary
from sapo_jax.errors import NO_SPACE, STOPPED, Stopped, UserError, from_os_error
from sapo_jax.io.streams import lenient_streams

OK = 0
FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # as shells have it: 128 + SIGINT

# What these commands make is in files; for all others, it is what they print.
COMMANDS_THAT_WRITE_FILES = ("train", "sft", "sweep", "export", "convert")

EXAMPLES = """examples:
  sapo-jax config configs/quickstart.yaml              what would run; compiles nothing
  sapo-jax train configs/quickstart.yaml objective.name=grpo name=grpo
  sapo-jax train configs/quickstart.yaml --profile 3   a trace of three RL steps
  sapo-jax eval runs/quickstart evaluate.samples=32
  sapo-jax sample runs/quickstart --prompt "Calculate 3 + 4."
  sapo-jax export runs/quickstart exported --dtype bfloat16
  sapo-jax convert model.gguf models/model
  sapo-jax plan configs/pod/qwen3_30b_a3b_v5p_64.yaml --topology v5p:4x4x4
  sapo-jax analyze runs/quickstart                     what the gate does, whether A1 and A2 hold
  sapo-jax metrics gate/neg_mean                       what a metric means, what is healthy
  sapo-jax sweep configs/sweeps/temperature.yaml       arms x seeds -> run folders, results.csv
  sapo-jax report runs/temperature                     their curves, differences and collapses
"""

SWEEP_NOTES = """A run takes all cores, or all accelerators, that it sees: one at a time on each
machine is the rule, and --shard uses several machines. With --max-parallel N on a CPU, each run
gets its share of the cores (PJRT_NPROC, unless it is set). Rounding depends on that number: the
sweep keeps to it when it is resumed. Each run also has rewards.workers processes."""

REPORT_NOTES = """examples:
  sapo-jax report runs/temperature
  sapo-jax report runs/temperature --reference tau_1_1 --outcome late
  sapo-jax report runs/grid --grid objective.tau_pos,objective.tau_neg
  sapo-jax report runs/quickstart                      one run: its curves, and whether it collapsed

Rules of collapse: held_out, reward (below half of the best from there to the end), nonfinite
(gradients); grad_norm, entropy, kl are signs that are told beside, and count only where they are
named. Every file and its columns: sapo_jax/analysis/README.md."""

# argparse has no public name for what `add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float32", "bfloat16", "float16")
YAML_FILE = "a YAML file"
YAML_FILE_OR_RUN = "a YAML file, or the folder of a run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    An error whose message is written for people becomes that message, and so does an error of the
    operating system; anything else is a bug and keeps its traceback. A stdout that cannot be
    written ends no command; it fails one that has nothing but its output to show.
    """
    args = parse_arguments(argv)
    with lenient_streams() as stdout:
        code = run_command(args)
        stdout.flush()
        if stdout.has_lost_output and args.command not in COMMANDS_THAT_WRITE_FILES:
            return code or NO_SPACE
        return code


def run_command(args: argparse.Namespace) -> int:
    """Load the config, if the command has one, and run the command. Returns the exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not hasattr(args, "config"):
        return report_errors(args.run, args)
    try:
        args.config = load_file_or_run(args.config, args.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG_USAGE
    except OSError as error:
        print(f"error: {from_os_error(error)}", file=sys.stderr)
        return WRONG_USAGE
    for warning in warnings(args.config):
        print(f"warning: {warning}", file=sys.stderr)
    if getattr(args, "processes", None) is None:
        return report_errors(args.run, args)
    return run_as_one_of_several(args)


def report_errors(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; errors for people become messages and exit codes."""
    try:
        return run(args)
    except Stopped:
        print(
            "stopped as told; the state is saved, and the same command goes on from here",
            file=sys.stderr,
        )
        return STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        message = from_os_error(error)
        print(f"error: {message}", file=sys.stderr)
        return message.exit_code
    except MemoryError as error:
        print(
            f"error: this machine has not the memory that was asked for ({error}); lower"
            " rollout.prompts_per_step, rollout.group_size or rollout.max_new_tokens, or take a"
            " smaller model",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print(
            "interrupted; a run goes on from its newest checkpoint by the same command",
            file=sys.stderr,
        )
        return INTERRUPTED


def run_as_one_of_several(args: argparse.Namespace) -> int:
    """Run a command in a job of several processes.

    A process that has failed leaves at once: the others would wait for it.
    """
    from sapo_jax.distributed import processes

    try:
        processes.start(args.processes)
    except processes.ProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    try:
        code = report_errors(args.run, args)
    except BaseException as error:
        processes.explain(error)
        code = FAILED
    if code in (OK, STOPPED):
        return code
    processes.leave(code)


# ---------------------------------------------------------------- the command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; key=value words may stand before or after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return args
    args.overrides += rest
    no_overrides = [word for word in args.overrides if word.startswith("-") or "=" not in word]
    if no_overrides:
        parser.error(
            f"unrecognized arguments: {' '.join(no_overrides)} (overrides look like key.path=value)"
        )
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sapo-jax",
        description="RL of language models with SAPO and its baselines, in JAX.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_sft(commands)
    add_config(commands)
    add_eval(commands)
    add_sample(commands)
    add_plan(commands)
    add_export(commands)
    add_convert(commands)
    add_analyze(commands)
    add_metrics(commands)
    add_sweep(commands)
    add_report(commands)
    return parser


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    **options: Any,
) -> argparse.ArgumentParser:
    """A command that the function `run` carries out; it returns the exit code."""
    parser = commands.add_parser(name, help=summary, description=summary, **options)
    parser.set_defaults(run=run)
    return parser


def add_config_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """CONFIG, a path. `main` puts the loaded configuration in its place, in args.config."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help=what)


def add_overrides(parser: argparse.ArgumentParser, of: str = "the config") -> None:
    """key=value words. They take all that is left, so they come last."""
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help=f"changes to {of}, e.g. train.steps=50",
    )


def add_step_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, help="RL step of the checkpoint (default: the newest)")


def add_allow_change_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="go on although this key, or what lies behind it, is not what the run was begun with; "
        "a section stands for all its keys; it is recorded in changes.jsonl (repeatable)",
    )


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        metavar="HOW",
        help="one of several processes that are one job, each started with the same command: "
        "`auto` (TPU pods, GKE, Slurm: found out), or HOST:PORT,N,I (process I of N; 0 listens "
        "there)",
    )


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1")
    return int(text)


def shard_of_runs(text: str) -> tuple[int, int]:
    """`i/n` as (i, n)."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not i/n with i from 1 to n, such as 1/3, 2/3, 3/3"
        )
    return int(i), int(n)


# ---------------------------------------------------------------- commands of one run


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        run_train,
        "cold start (if cold_start.steps > 0), then RL; on an existing run folder, resume it",
    )
    add_config_argument(parser, YAML_FILE_OR_RUN)
    add_overrides(parser)
    parser.add_argument(
        "--profile",
        type=positive_integer,
        default=0,
        metavar="N",
        help="leave a trace of N RL steps in the run folder, trace/",
    )
    add_allow_change_option(parser)
    add_processes_option(parser)


def run_train(args: argparse.Namespace) -> int:
    from sapo_jax.training.loop import train

    train(args.config, traced=args.profile, allow_changes=args.allow_change)
    return OK


def add_sft(commands: Commands) -> None:
    parser = add_command(commands, "sft", run_sft, "the cold start alone")
    add_config_argument(parser, YAML_FILE_OR_RUN)
    add_overrides(parser)
    add_allow_change_option(parser)
    add_processes_option(parser)


def run_sft(args: argparse.Namespace) -> int:
    from sapo_jax.training.sft import sft

    sft(args.config, allow_changes=args.allow_change)
    return OK


def add_config(commands: Commands) -> None:
    parser = add_command(
        commands,
        "config",
        run_config,
        "dry run: the resolved config, parameters, tokens, FLOPs, memory; compiles nothing",
    )
    add_config_argument(parser, YAML_FILE_OR_RUN)
    add_overrides(parser)


def run_config(args: argparse.Namespace) -> int:
    from sapo_jax.data import load_tokenizer
    from sapo_jax.plan.dry_run import describe

    tokenizer = load_tokenizer(args.config.data.tokenizer)
    print(describe(args.config, tokenizer.vocab_size))
    return OK


def add_eval(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        run_eval,
        "avg@k and pass@k of a run's checkpoint on its held-out problems",
    )
    add_config_argument(parser, YAML_FILE_OR_RUN)
    add_overrides(parser)
    add_step_option(parser)
    add_processes_option(parser)


def run_eval(args: argparse.Namespace) -> int:
    from sapo_jax.training.evaluate import evaluate_run

    evaluate_run(args.config, args.step)
    return OK


def add_sample(commands: Commands) -> None:
    parser = add_command(
        commands, "sample", run_sample, "look at completions of a run's checkpoint"
    )
    add_config_argument(parser, YAML_FILE_OR_RUN)
    add_overrides(parser)
    add_step_option(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        help="a question (repeatable; default: held-out problems)",
    )
    parser.add_argument(
        "-n",
        type=int,
        default=4,
        help="completions per prompt, and held-out problems shown (4)",
    )
    parser.add_argument(
        "--greedy", action="store_true", help="the most probable tokens instead of samples"
    )


def run_sample(args: argparse.Namespace) -> int:
    from sapo_jax.training.evaluate import show_samples

    show_samples(args.config, args.step, args.prompt, args.n, args.greedy)
    return OK


def add_plan(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        run_plan,
        "compile the run's programs for a TPU topology that need not be here: what fits, what "
        "bounds it",
    )
    add_config_argument(parser, YAML_FILE)
    add_overrides(parser)
    parser.add_argument(
        "--topology",
        required=True,
        help="e.g. v5p:4x4x4, v5e:4x4, v6e:16x16; cpu: check the model here",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    parser.add_argument(
        "--functions", default="update,score,prefill,decode", help="some of them, with commas (all)"
    )
    parser.add_argument(
        "--mean-tokens",
        type=float,
        help="mean length of completions (default: rollout.max_new_tokens)",
    )
    parser.add_argument(
        "--sweep-mesh", action="store_true", help="try every mesh that divides, rank them"
    )


def run_plan(args: argparse.Namespace) -> int:
    from sapo_jax.data import load_tokenizer
    from sapo_jax.plan import command

    cfg = args.config
    if not cfg.model.vocab_size:
        # Only then: a tokenizer that the pod has need not be here.
        tokenizer = load_tokenizer(cfg.data.tokenizer)
        cfg = with_vocabulary(cfg, tokenizer.vocab_size)
    functions = args.functions.split(",")
    return command.run_plan(
        cfg, args.topology, functions, args.json, args.mean_tokens, args.sweep_mesh
    )


def add_export(commands: Commands) -> None:
    parser = add_command(
        commands, "export", run_export, "write a run's policy as a Hugging Face model directory"
    )
    add_config_argument(parser, YAML_FILE_OR_RUN)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="new or empty")
    add_overrides(parser)
    add_step_option(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights (float32: nothing is rounded)",
    )


def run_export(args: argparse.Namespace) -> int:
    from sapo_jax.training.export import export_run

    export_run(args.config, args.directory, args.step, args.dtype)
    return OK


# ---------------------------------------------------------------- commands on files


def add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        run_convert,
        "a GGUF file (llama.cpp) into a Hugging Face model directory",
    )
    parser.add_argument(
        "source", metavar="FILE.gguf", type=Path, help="architecture llama, qwen3 or qwen3moe"
    )
    parser.add_argument(
        "target", metavar="DIR", type=Path, help="new or empty; appears when it is complete"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")


def run_convert(args: argparse.Namespace) -> int:
    from sapo_jax.hub.gguf import convert

    try:
        converted = convert(args.source, args.target, args.dtype)
    except OSError as error:  # the disk is full, or the place cannot be written
        raise UserError(str(error)) from error
    print(
        f"{args.target}: {converted.config['model_type']}, "
        f"{converted.parameters / 1e6:,.1f} M parameters, "
        f"{converted.bytes / 1e9:.2f} GB {args.dtype}"
    )
    return OK


def add_analyze(commands: Commands) -> None:
    parser = add_command(
        commands,
        "analyze",
        run_analyze,
        "A1/A2 statistics, gate and gradient shares of a run, from its diagnostics.jsonl: a table "
        "and plots",
    )
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=Path,
        help="the folder of a run; nothing else of it is needed",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of phases.csv and the plots (default: RUN/analysis)"
    )


def run_analyze(args: argparse.Namespace) -> int:
    from sapo_jax.analysis.phases import analyze

    analyze(args.run_folder, args.out)
    return OK


def add_metrics(commands: Commands) -> None:
    parser = add_command(
        commands, "metrics", run_metrics, "what a metric means, what is healthy, and what to do"
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="of a metric, e.g. gate/neg_mean (default: all)"
    )


def run_metrics(args: argparse.Namespace) -> int:
    from sapo_jax.diagnostics.glossary import describe_metric

    print(describe_metric(args.name))
    return OK


# ---------------------------------------------------------------- commands of several runs


def add_sweep(commands: Commands) -> None:
    parser = add_command(
        commands,
        "sweep",
        run_sweep,
        "train the runs of a sweep file (arms x seeds) that are not finished; writes results.csv",
        epilog=SWEEP_NOTES,
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="a sweep file, e.g. configs/sweeps/temperature.yaml"
    )
    add_overrides(parser, "the config of all its runs")
    parser.add_argument(
        "--folder",
        type=Path,
        help="of the runs and results.csv (default: the file's, or runs/NAME)",
    )
    parser.add_argument(
        "--max-parallel",
        type=positive_integer,
        default=1,
        metavar="N",
        help="runs at a time (1)",
    )
    parser.add_argument(
        "--shard",
        type=shard_of_runs,
        default=(1, 1),
        metavar="i/n",
        help="only the i-th of n parts, i from 1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs and how far they are; start nothing"
    )


def run_sweep(args: argparse.Namespace) -> int:
    from sapo_jax.sweeps.launch import status_lines, train_sweep
    from sapo_jax.sweeps.load import load_sweep

    try:
        plan = load_sweep(args.file, args.overrides, args.folder, say=notice)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG_USAGE
    for warning in plan.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    try:
        if args.dry_run:
            print("\n".join(status_lines(plan, args.shard)))
            return OK
        return train_sweep(plan, max_parallel=args.max_parallel, shard=args.shard)
    except OSError as error:
        raise UserError(str(error)) from error


def notice(text: str) -> None:
    """Tell people what takes its time."""
    print(f"notice: {text}", file=sys.stderr, flush=True)


def add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        "what the arms of a sweep, or runs, came to over their seeds: curves, paired differences "
        "to a reference arm, collapse; tables, pictures and CSV files",
        epilog=REPORT_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", metavar="FOLDER", type=Path, nargs="+", help="folders of sweeps or runs"
    )
    parser.add_argument(
        "--metric",
        metavar="NAME,...",
        help="metrics to show (held_out/avg,reward/mean,entropy/mean); the first one is compared",
    )
    parser.add_argument(
        "--arms", metavar="ARM,...", help="these arms only, in this order; * is any text (all)"
    )
    parser.add_argument(
        "--reference", metavar="ARM", help="what the other arms are compared with (the first arm)"
    )
    parser.add_argument(
        "--outcome",
        choices=("last", "late", "best"),
        default="last",
        help="what is compared of each run: the last value; the mean over the last 20 %% of the "
        "steps; the best one (last)",
    )
    parser.add_argument(
        "--grid", metavar="KEY,KEY", help="also heat maps over two config keys, x and y"
    )
    parser.add_argument(
        "--collapse",
        metavar="RULE,...",
        help="rules that make a run count as collapsed, and their parameters, e.g. "
        "held_out,grad_norm,fall=0.4 (held_out,reward,nonfinite)",
    )
    parser.add_argument(
        "--count",
        choices=("rl", "optimizer"),
        default="rl",
        help="what steps to collapse are counted in: RL steps; or optimiser steps, for arms with "
        "different numbers of mini-batches (rl)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: report/ in FOLDER, or where all lie)"
    )


def run_report(args: argparse.Namespace) -> int:
    from sapo_jax.analysis.collapse import DEFAULT_RULES, parse_rules
    from sapo_jax.analysis.grid import parse_grid
    from sapo_jax.analysis.report import ReportOptions, report

    rules = DEFAULT_RULES
    if args.collapse is not None:
        rules = parse_rules(args.collapse)
    grid = None
    if args.grid is not None:
        grid = parse_grid(args.grid)
    options = ReportOptions(
        metrics=comma_separated(args.metric),
        arms=comma_separated(args.arms),
        reference=args.reference,
        outcome=args.outcome,
        grid=grid,
        rules=rules,
        count=args.count,
    )
    try:
        report(args.paths, args.out, options)
    except OSError as error:
        raise UserError(str(error)) from error
    return OK


def comma_separated(text: str | None) -> list[str] | None:
    """The words of an option, None where it was not given."""
    if not text:
        return None
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
