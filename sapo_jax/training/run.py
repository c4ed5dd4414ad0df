"""A run: its folder, and everything that is built once from its config.

runs/NAME/  config.yaml  metrics.jsonl  samples.jsonl  diagnostics.jsonl  summary.json  progress.png  tb/
            checkpoints/{cold_start,rl}/
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from etils import epath

from sapo_jax.batch import Params, TrainState
from sapo_jax.config import Config, ConfigError, dump, load, verify
from sapo_jax.config.resume import changed_keys
from sapo_jax.data import Problems, PromptBatches, Tokenizer, load_problems, load_tokenizer
from sapo_jax.distributed import sharding
from sapo_jax.distributed.processes import (
    ProcessShard,
    all_gather,
    any_true,
    is_first,
    process_shard,
)
from sapo_jax.distributed.signals import signals
from sapo_jax.errors import FolderError, ModelDirError, ProcessError, RunError
from sapo_jax.hub.weights import check_weights, load_params
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.io.files import write_atomically
from sapo_jax.io.run_folder import Folder, as_path, open_folder
from sapo_jax.learner.update import init_state, state_shardings
from sapo_jax.models import Policy, make_policy
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.training.malloc_trim import trim_after_compiling

T = TypeVar("T")
COLD_START, ROLLOUT, EVALUATE, INIT = range(4)  # streams of random numbers, all from train.seed


@dataclasses.dataclass(frozen=True)
class Run:
    cfg: Config
    folder: Folder
    tokenizer: Tokenizer
    problems: Problems
    policy: Policy
    mesh: jax.sharding.Mesh
    pool: VerifierPool
    share: ProcessShard  # this process's part of every batch
    stop: dict[str, bool]  # {"now": True} once a signal came to this process

    def key(self, stream: int, step: int = 0) -> jax.Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(self.cfg.train.seed), stream), step
        )

    def batches(self, stream: int, batch_size: int) -> PromptBatches:
        weights = {
            name: task.weight
            for name, task in zip(self.problems.train, self.cfg.data.tasks, strict=True)
        }
        return PromptBatches(self.problems.train, weights, batch_size, self.data_seed(stream))

    @property
    def batch_shards(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return sharding.num_shards("batch", self.mesh)

    @property
    def dir(self) -> Path | epath.Path:
        return self.folder.path

    @property
    def shown(self) -> int:
        """How many completions of a rollout may be looked at: logged, or printed."""
        return max(self.cfg.train.log_samples, 3)

    def told_to_stop(self) -> bool:
        """Whether a signal came to any process. A collective."""
        return any_true(self.stop["now"])

    def data_seed(self, stream: int) -> int:
        return 4 * self.cfg.train.seed + stream

    def extras(self, batches: PromptBatches) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays."""
        return {"data": batches.get_state(), "seed": self.cfg.train.seed, "config": dump(self.cfg)}

    def sampler(
        self, rule: SamplingParams, group_size: int, *, record_routing: bool = False
    ) -> Sampler:
        cfg, tok = self.cfg.rollout, self.tokenizer
        return Sampler(
            self.policy,
            rule,
            group_size,
            cfg.max_new_tokens,
            tok.stop_ids,
            tok.pad_id,
            record_routing,
            cfg.slots,
        )

    @functools.cached_property
    def eval_sampler(self) -> Sampler:
        return self.sampler(
            SamplingParams(self.cfg.evaluate.temperature), self.cfg.evaluate.samples
        )

    def checkpoints(self, stage: str, *, read_only: bool = False) -> Checkpoints:
        return Checkpoints(
            self.dir / "checkpoints" / stage, None if read_only else self.cfg.checkpoint
        )

    @functools.cached_property
    def abstract_params(self) -> Params:
        placed = sharding.shardings(self.mesh, self.policy.logical_axes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.policy.shapes,
            placed,
        )

    def fresh_params(self) -> Params:
        """What training starts from: the weights in model.path, or random ones."""
        if self.cfg.model.path is not None:
            try:
                return load_params(self.cfg.model.path, self.policy, self.mesh)
            except ModelDirError as error:
                raise RunError(f"model.path: {error}") from error
        placed = sharding.shardings(self.mesh, self.policy.logical_axes)
        return jax.jit(self.policy.init, out_shardings=placed)(self.key(INIT))

    def fresh_state(self, tx, params: Params) -> TrainState:
        """Takes over `params` (their buffers are donated)."""
        placed = state_shardings(self.policy, tx, self.mesh)
        return jax.jit(lambda p: init_state(p, tx), donate_argnums=0, out_shardings=placed)(params)

    def abstract_state(self, tx) -> TrainState:
        shapes = jax.eval_shape(lambda p: init_state(p, tx), self.policy.shapes)
        placed = state_shardings(self.policy, tx, self.mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
        )

    def trained_params(self, step: int | None = None) -> tuple[str, int, Params]:
        """(stage, step, parameters) of the newest checkpoint, RL before cold start; of RL step `step` if given.

        Where there is none yet, the pretrained weights of model.path.
        """
        for stage in ("rl", "cold_start") if step is None else ("rl",):
            with self.checkpoints(stage, read_only=True) as checkpoints:
                if (found := checkpoints.restore_params(self.abstract_params, step)) is not None:
                    return stage, found[0], found[1]
        if step is None and self.cfg.model.path is not None:
            return "pretrained", 0, self.fresh_params()
        raise RunError(f"{self.dir} has no checkpoint yet: train it first")


def run_dir(cfg: Config) -> Path | epath.Path:
    return as_path(cfg.run_dir.format(name=cfg.name, seed=cfg.train.seed))


@contextlib.contextmanager
def open_run(cfg: Config, *, write: bool = True) -> Iterator[Run]:
    """Build the run; with `write`, also claim its folder, write config.yaml and catch signals.

    Raises RunError if another process works in the folder, or if it holds a run with another config.
    """
    stop = {"now": False}
    trim_after_compiling()
    with contextlib.ExitStack() as stack:
        try:
            tokenizer = load_tokenizer(cfg.data.tokenizer)
            cfg = with_vocabulary(cfg, tokenizer.vocab_size)
            mesh = sharding.make_mesh(cfg.mesh)
            share = _check_share(process_shard(mesh), cfg)
            pool = stack.enter_context(
                VerifierPool(cfg.rewards)
            )  # first: its plug-ins register verifiers
            problems = load_problems(cfg.data, tokenizer)
            if cfg.model.path is not None:
                check_weights(cfg.model.path, cfg.model)
        except (
            ValueError,
            ProcessError,
        ) as error:  # of the tokenizer, mesh, plug-ins, data: all written for people
            raise RunError(str(error)) from error
        folder = _together(lambda: stack.enter_context(open_folder(run_dir(cfg), write=write)))
        if write:
            _together(
                lambda: (
                    _same_config(cfg, folder.logs / "config.yaml", folder.path)
                    if is_first()
                    else None
                )
            )
            stack.enter_context(signals(stop))
        stack.enter_context(jax.set_mesh(mesh))
        yield Run(cfg, folder, tokenizer, problems, make_policy(cfg.model), mesh, pool, share, stop)


def _check_share(share: ProcessShard, cfg: Config) -> ProcessShard:
    """The share itself, if whole groups can be shared out: teams must not wait for each other's."""
    P, N, teams = cfg.rollout.prompts_per_step, cfg.train.mini_batches, share.teams
    if P % (N * teams):
        raise ProcessError(
            f"rollout.prompts_per_step, train.mini_batches: {P} prompts cannot be split into {N} mini-batches for "
            f"{teams} teams of processes; make prompts_per_step a multiple of {N * teams}"
        )
    return share


def _together(step: Callable[[], T]) -> T:
    """What `step` returns; where it fails in any process, for a reason written for people, all raise RunError. A
    collective."""
    found = error = None
    try:
        found = step()
    except (RunError, FolderError, ConfigError) as failure:
        error = failure
    if texts := [text for text in all_gather(error and str(error)) if text]:
        raise RunError(texts[0]) from error
    return found


def with_vocabulary(cfg: Config, tokenizer_size: int) -> Config:
    """model.vocab_size filled in from the tokenizer; and what the machine and the tokenizer decide is checked now."""
    verify(cfg, devices=len(jax.devices()), vocab_size=tokenizer_size)
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or tokenizer_size)
    )


def _same_config(cfg: Config, path: Path, folder: Path | epath.Path) -> None:
    """Write the resolved config; refuse to go on with a run whose numbers came from another one."""
    if path.exists() and (changed := changed_keys(load(path), cfg)):
        raise RunError(
            f"{folder} holds a run with another config; different: {', '.join(changed)}. "
            "Undo that, remove the folder, or set another name or run_dir"
        )
    write_atomically(path, dump(cfg))
