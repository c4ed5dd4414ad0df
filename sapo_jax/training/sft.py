"""The cold start: supervised fine-tuning on the tasks' own answers, so that RL has something to reinforce."""

from __future__ import annotations

import time

import jax
import numpy as np

from sapo_jax.batch import Batch, Params
from sapo_jax.config import Config
from sapo_jax.data import PromptBatches, load_demonstrations, sft_example
from sapo_jax.distributed.processes import is_first
from sapo_jax.distributed.sharding import put_batch
from sapo_jax.errors import RunError, Stopped
from sapo_jax.io.display import Display, open_display
from sapo_jax.io.run_log import RunLog, open_log
from sapo_jax.learner.update import (
    last_rate,
    make_optimizer,
    make_schedule,
    make_update,
    sft_loss,
    state_shardings,
)
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import pad_sequences
from sapo_jax.training.evaluate import describe, evaluate
from sapo_jax.training.run import COLD_START, EVALUATE, Run, open_run
from sapo_jax.types import Prompt

STAGE = "cold_start"


def sft_batches(run: Run) -> PromptBatches:
    """Endless batches of what is imitated: the demonstrations, or the tasks' own problems and answers."""
    cfg = run.cfg.cold_start
    if cfg.demonstrations is None:
        return run.batches(COLD_START, cfg.batch_size)
    found = load_demonstrations(
        cfg.demonstrations, run.cfg.data, run.tokenizer, run.problems.held_out
    )
    return PromptBatches(
        {"demonstrations": found},
        {"demonstrations": 1.0},
        cfg.batch_size,
        run.data_seed(COLD_START),
    )


def sft_batch(prompts: list[Prompt], run: Run) -> Batch:
    """Rows of prompt + response; every response token weighs the same."""
    examples = [
        sft_example(prompt, run.tokenizer, run.cfg.cold_start.response) for prompt in prompts
    ]
    rows = pad_sequences(examples, run.tokenizer.pad_id)
    weight_BT = token_weights(
        rows["mask_BT"], rows["segment_ids_BT"], "token_mean", run.cfg.rollout.max_new_tokens
    )
    return Batch(**rows, adv_BT=np.zeros_like(weight_BT), weight_BT=weight_BT)


def cold_start(run: Run, log: RunLog, display: Display) -> Params:
    """Run or resume the stage; returns its parameters. With cold_start.steps = 0 they are the fresh ones."""
    cfg = run.cfg.cold_start
    if cfg.steps == 0:
        return run.fresh_params()
    tx = make_optimizer(cfg.optimizer, cfg.steps)
    schedule = make_schedule(cfg.optimizer, cfg.steps)
    update = make_update(
        run.policy, tx, sft_loss, cfg.batch_size, state_shardings(run.policy, tx, run.mesh)
    )
    batches = sft_batches(run)

    with run.checkpoints(STAGE) as checkpoints:
        found = checkpoints.restore(run.abstract_state(tx))
        if found is None:
            step, state = 0, run.fresh_state(tx, run.fresh_params())
        else:
            step, state, extras = found
            batches.set_state(extras["data"])
        log.rewind(STAGE, step)
        while step < cfg.steps:
            start = time.perf_counter()
            batch = sft_batch(next(batches), run)
            own = run.share.local_indices(len(batch.tokens_BT))
            state, aux = update(
                state, put_batch(jax.tree.map(lambda x, own=own: x[own], batch), run.mesh)
            )
            aux = jax.device_get(aux)
            step += 1
            if aux["nonfinite_in_row"] >= run.cfg.train.max_nonfinite:
                raise RunError(nonfinite_message("cold_start", step, run.cfg.train.max_nonfinite))
            hits, tokens = (float(x.sum()) for x in aux["stats"])
            metrics = {
                "loss": aux["loss"], "accuracy/token": hits / tokens, "grad_norm": aux["grad_norm"],
                "learning_rate": last_rate(schedule, state, aux), "nonfinite/total": aux["nonfinite_total"],
                "time/step": time.perf_counter() - start,
            }  # fmt: skip
            log.write(STAGE, step, metrics)
            display.step(STAGE, step, cfg.steps, metrics)
            stop = run.told_to_stop()
            if step % run.cfg.checkpoint.every == 0 or step == cfg.steps or stop:
                run.folder.publish()
                checkpoints.save(step, state, run.extras(batches))
            if stop:
                raise Stopped
    return state.params


def reference_params(run: Run) -> Params:
    """The parameters that the RL stage started from, for its KL penalty: a copy, the stage's own are donated."""
    if run.cfg.cold_start.steps == 0:
        return run.fresh_params()
    with run.checkpoints(STAGE, read_only=True) as checkpoints:
        if (
            found := checkpoints.restore_params(run.abstract_params, run.cfg.cold_start.steps)
        ) is None:
            raise RunError(
                f"{run.dir} lost its cold-start checkpoint, the KL reference; train it in another folder"
            )
        return found[1]


def nonfinite_message(stage: str, step: int, limit: int) -> str:
    key = "cold_start.optimizer" if stage == "cold_start" else "optimizer"
    return (
        f"{stage} step {step}: {limit} updates in a row had gradients that are not finite; they were skipped and the "
        f"parameters are unharmed. Lower {key}.learning_rate or {key}.max_grad_norm, or use model.compute_dtype=float32"
    )


def sft(cfg: Config) -> None:
    """The cold start alone: `sapo-jax sft`. `sapo-jax train` of the same config goes on from it."""
    if cfg.cold_start.steps == 0:
        raise RunError("cold_start.steps is 0: there is nothing to do; set cold_start.steps")
    with open_run(cfg) as run, open_log(run.folder) as log, open_display() as display:
        params = cold_start(run, log, display)
        metrics, _ = evaluate(run, params, run.key(EVALUATE))
        if is_first():
            print(
                f"after {cfg.cold_start.steps} cold-start steps: {describe(metrics, cfg.evaluate.samples)}"
            )
            print(f"run folder: {run.dir}")
