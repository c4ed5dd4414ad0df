"""The cold start: supervised fine-tuning, so that RL has something to reinforce.

It imitates the tasks' own answers, or a file of demonstrations (`cold_start.demonstrations`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax.batch import Batch, Params
from sapo_jax.config import Config
from sapo_jax.data import PromptBatches, load_demonstrations, sft_example
from sapo_jax.distributed.processes import is_first
from sapo_jax.distributed.sharding import put_batch
from sapo_jax.errors import RunError
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.io.display import Display, open_display
from sapo_jax.io.run_log import Log, open_log
from sapo_jax.learner.state import abstract_params, abstract_state, fresh_state
from sapo_jax.learner.update import (
    last_learning_rate,
    make_optimizer,
    make_schedule,
    make_update,
    sft_loss,
    state_shardings,
)
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import pad_sequences
from sapo_jax.training.clock import Clock
from sapo_jax.training.evaluate import Evaluator, print_and_keep
from sapo_jax.training.random_streams import Stream, data_seed
from sapo_jax.training.run import Run, checkpoint_folder, cold_start_folder, open_run
from sapo_jax.training.stage import Stage
from sapo_jax.types import Prompt

STAGE = "cold_start"


def sft(cfg: Config, *, allow_changes: Sequence[str] = ()) -> None:
    """The cold start alone: `sapo-jax sft`. `sapo-jax train` of the same config goes on from it.

    The evaluation after it is printed, and appended to evaluations.jsonl. allow_changes: as in
    `loop.train`.

    Raises RunError, also where cold_start.steps is 0 or cold_start.taken_from is set, and Stopped.
    """
    if cfg.cold_start.steps == 0:
        raise RunError("cold_start.steps is 0: there is nothing to do; set cold_start.steps")
    if cfg.cold_start.taken_from is not None:
        raise RunError(
            "cold_start.taken_from names a cold start that is there already: there is nothing to "
            "do; take the key out to train one"
        )
    with (
        open_run(cfg, allow_changes=allow_changes) as run,
        open_log(run.folder, cfg.metrics.sinks) as log,
        open_display() as display,
    ):
        params = cold_start(run, log, display)
        evaluation = Evaluator.of(run)(params, run.problems.held_out)
        if is_first():
            print_and_keep(run, STAGE, cfg.cold_start.steps, evaluation)
            print(f"run folder: {run.dir}")


def cold_start(run: Run, log: Log, display: Display) -> Params:
    """Run or resume the stage; returns its parameters.

    With cold_start.steps = 0 they are those that training starts from, with
    cold_start.taken_from those that another run's cold start has left. Raises RunError, Stopped.
    """
    cfg = run.cfg.cold_start
    if cfg.steps == 0:
        return run.initial_params()
    if cfg.taken_from is not None:
        return cold_start_params(run)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    schedule = make_schedule(cfg.optimizer, cfg.steps)
    placed = state_shardings(run.policy, optimizer, run.mesh)
    update = make_update(run.policy, optimizer, sft_loss, cfg.batch_size, placed)
    batches = sft_batches(run)

    with Stage(run, log, STAGE, cfg.steps, batches) as stage:
        state = stage.restore(abstract_state(run.policy, optimizer, run.mesh))
        if state is None:
            log.rewind(STAGE, 0)
            state = fresh_state(run.policy, optimizer, run.mesh, run.initial_params())
            state = stage.begin(state)
        while not stage.is_done:
            clock = Clock()
            batch = local_rows(sft_batch(next(batches), run), run)
            state, aux = update(state, put_batch(batch, run.mesh))
            aux = jax.device_get(aux)
            clock.lap("step")
            stage.count_step(state, aux["nonfinite_in_row"])
            hits, tokens = aux["stats"]
            metrics: dict[str, Any] = {
                "loss": aux["loss"],
                "accuracy/token": float(hits.sum()) / float(tokens.sum()),
                "grad_norm": aux["grad_norm"],
                "learning_rate": last_learning_rate(schedule, state, aux),
                "nonfinite/total": aux["nonfinite_total"],
                **clock.laps,
            }
            log.write(STAGE, stage.step, metrics)
            display.step(STAGE, stage.step, cfg.steps, metrics)
            stage.save_if_due(state)
            stage.stop_if_told(state)
    return state.params


def sft_batches(run: Run) -> PromptBatches:
    """Endless batches of what is imitated: demonstrations, or the tasks' problems and answers."""
    cfg = run.cfg.cold_start
    if cfg.demonstrations is None:
        return run.batches(Stream.COLD_START, cfg.batch_size)
    demonstrations = load_demonstrations(
        cfg.demonstrations, run.cfg.data, run.tokenizer, run.problems.held_out
    )
    return PromptBatches(
        {"demonstrations": demonstrations},
        {"demonstrations": 1.0},
        cfg.batch_size,
        data_seed(run.cfg.train.seed, Stream.COLD_START),
        held_out=run.problems.held_out,
    )


def sft_batch(prompts: list[Prompt], run: Run) -> Batch:
    """Rows of prompt + response; every response token weighs the same."""
    response = run.cfg.cold_start.response
    examples = [sft_example(prompt, run.tokenizer, response) for prompt in prompts]
    rows = pad_sequences(examples, run.tokenizer.pad_id)
    weight_BT = token_weights(
        rows["mask_BT"], rows["segment_ids_BT"], "token_mean", run.cfg.rollout.max_new_tokens
    )
    return Batch(**rows, adv_BT=np.zeros_like(weight_BT), weight_BT=weight_BT)


def local_rows(batch: Batch, run: Run) -> Batch:
    """The rows that this process's team puts on its devices."""
    indices = run.shard.local_indices(len(batch.tokens_BT))

    def take(array: np.ndarray) -> np.ndarray:
        return array[indices]

    return jax.tree.map(take, batch)


def reference_params(run: Run) -> Params:
    """The parameters that the RL stage started from, for its KL penalty.

    They are a copy: the stage's own are donated to its updates. Raises as `cold_start_params`.
    """
    if run.cfg.cold_start.steps == 0:
        return run.initial_params()
    return cold_start_params(run)


def cold_start_params(run: Run) -> Params:
    """The parameters at the end of the cold start, from its checkpoint.

    Raises RunError where the checkpoint is gone.
    """
    folder = cold_start_folder(run.cfg, run.dir)
    with Checkpoints(checkpoint_folder(folder, STAGE)) as checkpoints:
        restored = checkpoints.restore_params(
            abstract_params(run.policy, run.mesh), run.cfg.cold_start.steps
        )
    if restored is None:
        raise RunError(
            f"{folder} lost its cold-start checkpoint, which the run starts from and the KL "
            "penalty compares with; train it in another folder"
        )
    return restored.tree
