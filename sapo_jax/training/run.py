"""A run: its folder, and everything that is built once from its configuration.

runs/NAME/  config.yaml  metrics.jsonl  samples.jsonl  diagnostics.jsonl  summary.json
            progress.png  tb/  checkpoints/{cold_start,rl}/
            changes.jsonl (where the run went on with other settings; see `config.resume`)
            evaluations.jsonl (of `sapo-jax eval`)  trace/ (of `sapo-jax train --profile`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from etils import epath

from sapo_jax.batch import Params
from sapo_jax.config import Config, ConfigError, dump, verify, with_vocabulary
from sapo_jax.config.load import load_dumped, value_at
from sapo_jax.config.resume import (
    MAY_CHANGE,
    Change,
    changes_that_forbid_resuming,
    forbidden_changes,
    how_to_go_on,
    is_allowed,
)
from sapo_jax.data import (
    GoldCheck,
    Problems,
    PromptBatches,
    Tokenizer,
    load_problems,
    load_tokenizer,
)
from sapo_jax.distributed import sharding
from sapo_jax.distributed.processes import (
    ProcessShard,
    all_gather,
    any_true,
    is_first,
    process_shard,
)
from sapo_jax.distributed.signals import StopFlag, stop_on_signals
from sapo_jax.errors import FolderError, ModelDirError, ProcessError, RunError, from_os_error
from sapo_jax.hub.weights import check_weights, load_params
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.io.files import CONFIG, write_atomically
from sapo_jax.io.progress import VerificationNotice
from sapo_jax.io.run_folder import Folder, as_path, open_folder
from sapo_jax.io.step_folders import newest_extras
from sapo_jax.learner.state import abstract_params, random_params
from sapo_jax.models import Policy, make_policy
from sapo_jax.rewards import VerifierPool
from sapo_jax.rewards.registry import Gold
from sapo_jax.training.compilation_cache import use_compilation_cache
from sapo_jax.training.malloc_trim import trim_after_compiling
from sapo_jax.training.memory import check_memory
from sapo_jax.training.random_streams import Stream, data_seed, random_key
from sapo_jax.training.shared_start import SharedStart, find_shared_start

T = TypeVar("T")

FEWEST_OPEN_FILES = 128  # the limit that a run asks for: verifiers' pipes, checkpoints, logs


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run. `open_run` builds them."""

    cfg: Config
    folder: Folder
    tokenizer: Tokenizer
    problems: Problems
    policy: Policy
    mesh: jax.sharding.Mesh
    verifiers: VerifierPool
    shard: ProcessShard  # the part of every batch that is this process's
    stop: StopFlag  # set once a signal has come to this process
    shared_start: SharedStart | None = None  # the cold start of another run that it starts from
    allow_changes: tuple[str, ...] = ()  # keys that may differ from those of the checkpoint
    # Rows of changes.jsonl: what has changed on purpose since the run was begun.
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def dir(self) -> Path | epath.Path:
        """Where the run lives: a folder on a disk, or in a bucket."""
        return self.folder.path

    def batches(self, stream: Stream, batch_size: int) -> PromptBatches:
        """Endless batches of training problems, each with the tasks' shares."""
        tasks = zip(self.problems.train, self.cfg.data.tasks, strict=True)
        weights = {name: task.weight for name, task in tasks}
        seed = data_seed(self.cfg.train.seed, stream)
        return PromptBatches(
            self.problems.train, weights, batch_size, seed, held_out=self.problems.held_out
        )

    def told_to_stop(self) -> bool:
        """Whether a signal has come to any process. A collective."""
        return any_true(self.stop.requested)

    def checkpoints(self, stage: str) -> Checkpoints:
        """The checkpoints of a stage, open for writing."""
        return Checkpoints(checkpoint_folder(self.dir, stage), self.cfg.checkpoint)

    def checkpoint_extras(self, batches: PromptBatches) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays."""
        extras = {
            "data": batches.get_state(),
            "seed": self.cfg.train.seed,
            "config": dump(self.cfg),
            "changes": self.changes,
        }
        if self.shared_start is not None:
            extras["cold_start"] = self.shared_start.as_extras()
        return extras

    def initial_params(self) -> Params:
        """What training starts from: the weights in model.path, or random ones."""
        return initial_params(self.cfg, self.policy, self.mesh)

    def trained_params(self, step: int | None = None) -> TrainedParams:
        """The newest parameters, or those of RL step `step`; see `trained_params`."""
        return trained_params(self.cfg, self.dir, self.policy, self.mesh, step)


# ---------------------------------------------------------------- parameters


@dataclasses.dataclass(frozen=True)
class TrainedParams:
    """Parameters and where they come from."""

    stage: str  # `rl`, `cold_start`, or `pretrained`
    step: int  # of the stage
    params: Params
    data: Mapping[str, Any] | None = None  # the checkpoint's position in the data, if it is of one


def run_dir(cfg: Config) -> Path | epath.Path:
    """The folder of the configuration's run."""
    return as_path(cfg.run_dir.format(name=cfg.name, seed=cfg.train.seed))


def cold_start_folder(cfg: Config, run_folder: Path | epath.Path) -> Path | epath.Path:
    """The folder of the run that has trained the cold start: this one, or another."""
    if cfg.cold_start.taken_from is None:
        return run_folder
    return as_path(cfg.cold_start.taken_from)


def checkpoint_folder(run_folder: Path | epath.Path, stage: str) -> Path | epath.Path:
    """Where the checkpoints of a stage, `cold_start` or `rl`, lie."""
    return run_folder / "checkpoints" / stage


def initial_params(cfg: Config, policy: Policy, mesh: jax.sharding.Mesh) -> Params:
    """The weights in model.path, or random ones. Raises RunError where the weights are damaged."""
    if cfg.model.path is None:
        return random_params(policy, mesh, random_key(cfg.train.seed, Stream.INIT))
    try:
        return load_params(cfg.model.path, policy, mesh)
    except ModelDirError as error:
        raise RunError(f"model.path: {error}") from error


def trained_params(
    cfg: Config,
    run_folder: Path | epath.Path,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> TrainedParams:
    """The parameters of the newest checkpoint, RL before cold start; or those of RL step `step`.

    Where there is no checkpoint yet, the pretrained weights of model.path. Raises RunError where
    there is nothing at all, CheckpointError for a step that is not there or damaged.
    """
    folder_of_stage = {"rl": run_folder, "cold_start": cold_start_folder(cfg, run_folder)}
    if step is not None:
        folder_of_stage = {"rl": run_folder}
    shapes = abstract_params(policy, mesh)
    for stage, folder in folder_of_stage.items():
        with Checkpoints(checkpoint_folder(folder, stage)) as checkpoints:
            restored = checkpoints.restore_params(shapes, step)
        if restored is not None:
            return TrainedParams(stage, restored.step, restored.tree, restored.extras["data"])
    if step is None and cfg.model.path is not None:
        return TrainedParams("pretrained", 0, initial_params(cfg, policy, mesh))
    raise RunError(f"{run_folder} has no checkpoint yet: train it first")


# ---------------------------------------------------------------- opening a run


@contextlib.contextmanager
def open_run(
    cfg: Config, *, write: bool = True, allow_changes: Sequence[str] = ()
) -> Iterator[Run]:
    """Build the run; with `write`, also claim its folder, write config.yaml and catch signals.

    allow_changes: keys or sections that may differ from those that a run which is there already
    was made with; see `config.resume`.

    The order matters. Plug-ins register their verifiers when the pool is made, and loading the
    problems checks that every verifier is registered. All mistakes in the configuration, the data
    and the model directory are found before the folder is touched.

    Raises FolderError if another process works in the folder, or if it cannot be written; RunError
    if it holds a run with another configuration.
    """
    _check_open_files()
    trim_after_compiling()
    notice = use_compilation_cache(cfg.compilation_cache)
    if notice:
        say([notice])
    with contextlib.ExitStack() as stack:
        try:
            tokenizer = load_tokenizer(cfg.data.tokenizer)
            verify(cfg, devices=len(jax.devices()), vocab_size=tokenizer.vocab_size)
            cfg = with_vocabulary(cfg, tokenizer.vocab_size)
            mesh = sharding.make_mesh(cfg.mesh)
            say(check_memory(cfg, mesh, training=write))
            shard = process_shard(mesh)
            _check_prompts_divide(cfg, shard)
            verifiers = stack.enter_context(VerifierPool(**cfg.rewards.of_pool()))
            problems = load_problems(cfg.data, tokenizer, check=gold_check(verifiers))
            say(problems.notices)
            if cfg.model.path is not None:
                notes = check_weights(cfg.model.path, cfg.model)
                say(f"model.path: {note}" for note in notes)
            shared_start = None
            if write:
                shared_start = find_shared_start(cfg)
        except (ValueError, ProcessError) as error:  # all of them are written for people
            raise RunError(str(error)) from error

        def claim_folder() -> Folder:
            return stack.enter_context(open_folder(run_dir(cfg), write=write))

        folder = _in_all_processes(claim_folder)
        run = Run(
            cfg=cfg,
            folder=folder,
            tokenizer=tokenizer,
            problems=problems,
            policy=make_policy(cfg.model),
            mesh=mesh,
            verifiers=verifiers,
            shard=shard,
            stop=StopFlag(),
            shared_start=shared_start,
            allow_changes=tuple(allow_changes),
        )
        if write:

            def write_config() -> None:
                if is_first():
                    _write_same_config(run)

            _in_all_processes(write_config)
            run = dataclasses.replace(run, stop=stack.enter_context(stop_on_signals()))
        stack.enter_context(jax.set_mesh(mesh))
        yield run


def gold_check(verifiers: VerifierPool) -> GoldCheck:
    """Checks the gold answers of a file in the workers, and says so where it takes long."""

    def check(golds: Sequence[Gold]) -> Sequence[str | None]:
        return verifiers.check_golds(golds, VerificationNotice("checking gold answers"))

    return check


def say(notices: Iterable[str]) -> None:
    """Tell people on stderr what they may want to know, once for all processes."""
    if is_first():
        for notice in notices:
            print(f"notice: {notice}", file=sys.stderr, flush=True)


def _check_open_files() -> None:
    """Raises RunError where this process may open too few files for verifiers and checkpoints."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < FEWEST_OPEN_FILES:
        raise RunError(
            f"this process may open {limit} files only, and a run needs {FEWEST_OPEN_FILES}; raise "
            "the limit, as in `ulimit -n 1024`, then run the same command again"
        )


def _check_prompts_divide(cfg: Config, shard: ProcessShard) -> None:
    """Raises ProcessError where whole groups cannot be divided equally among the teams."""
    num_prompts = cfg.rollout.prompts_per_step
    num_mini_batches = cfg.train.mini_batches
    multiple = num_mini_batches * shard.teams
    if num_prompts % multiple:
        raise ProcessError(
            f"rollout.prompts_per_step, train.mini_batches: {num_prompts} prompts cannot be split "
            f"into {num_mini_batches} mini-batches for {shard.teams} teams of processes; make "
            f"prompts_per_step a multiple of {multiple}"
        )


def _in_all_processes(action: Callable[[], T]) -> T:
    """What `action` returns; where it fails in any process, all raise RunError. A collective.

    The process whose folder is to blame raises that FolderError itself.

    Only failures whose message is written for people are passed on in this way.
    """
    results = []
    failure: Exception | None = None
    message = None
    try:
        results.append(action())
    except (RunError, FolderError, ConfigError) as error:
        failure = error
        message = str(error)
    except OSError as error:
        failure = from_os_error(error)
        message = str(failure)
    messages = [text for text in all_gather(message) if text]
    if isinstance(failure, FolderError):
        raise failure  # its exit code says whether the disk is full
    if messages:
        raise RunError(messages[0]) from failure
    return results[0]


def _write_same_config(run: Run) -> None:
    """Write the resolved configuration.

    Raises RunError where the folder holds a run whose numbers came from another one. What the
    newest checkpoint holds decides that; the file only where there is no checkpoint yet.
    """
    path = run.folder.logs / CONFIG
    in_file = None
    if path.exists():
        in_file = path.read_text(encoding="utf-8")
    made_with = in_file
    source = CONFIG
    for stage in ("cold_start", "rl"):  # the later stage decides
        saved = newest_extras(epath.Path(checkpoint_folder(run.dir, stage)))
        if saved is not None:
            step, extras = saved
            made_with = extras["config"]
            source = f"checkpoint of {stage} step {step}"
    if made_with is not None:
        changes_since(made_with, run, source)
        _say_what_is_younger(made_with, run.cfg)
    if in_file is not None and in_file != made_with:
        _say_what_was_edited(in_file, made_with or "", path)
    write_atomically(path, dump(run.cfg))


def changes_since(text: str, run: Run, source: str) -> list[Change]:
    """What differs from the configuration that a run was made with, as far as it is allowed to.

    text: that configuration, as `dump` wrote it. source: where it is from, for messages. Raises
    RunError where a change that is not allowed has a say in the numbers of steps already done.
    """
    stored, _ = load_dumped(text, f"the configuration in the {source}")
    changes = forbidden_changes(stored, run.cfg)
    refused = [change for change in changes if not is_allowed(change.key, run.allow_changes)]
    if refused:
        lines = "".join(f"\n  {change}" for change in refused)
        raise RunError(
            f"{run.dir} holds a run with another config. Its {source} was made with{lines}\n"
            f"{how_to_go_on(refused)}"
        )
    return changes


def _say_what_is_younger(text: str, cfg: Config) -> None:
    """Name the keys with a say in the numbers that were not there when the run was begun."""
    _, younger = load_dumped(text, "the configuration of the run")
    telling = [key for key in younger if not key.startswith(MAY_CHANGE)]
    if telling:
        values = ", ".join(f"{key} = {value_at(cfg, key)}" for key in telling)
        say([f"the run was begun before these settings were there, and goes on with {values}"])


def _say_what_was_edited(in_file: str, made_with: str, path: Path) -> None:
    """Say which keys of config.yaml were edited: the checkpoint decides, not the file."""
    try:
        stored, _ = load_dumped(made_with, "the checkpoint")
        edited, _ = load_dumped(in_file, str(path))
        keys = changes_that_forbid_resuming(stored, edited)
    except ConfigError as error:
        keys = [f"it cannot be read: {error}"]
    if keys:
        say([f"{path} was edited ({', '.join(keys)}); what the checkpoint holds decides"])
