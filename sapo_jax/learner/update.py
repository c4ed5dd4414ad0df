"""The update: loss and gradients over micro-batches, one optax step, on donated and sharded state.

loss = -sum(weight_BT * (correction_BT * surrogate_BT - kl_coef * kl_BT)) + router_aux_loss_coef * aux.
The weights are made for the whole optimiser batch, so micro-batches add up to exactly the same gradient. (The aux
loss is not linear in the batch: it is the mean of the micro-batches' own, weighted by their real tokens.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapo_jax import diagnostics
from sapo_jax.batch import Array, Batch, Params, TrainState
from sapo_jax.config.schema import Config, Optimizer
from sapo_jax.distributed import sharding
from sapo_jax.learner.scoring import score, split_micro_batches
from sapo_jax.models import Policy, Qwen3
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.kl import KL_ESTIMATORS

# (model, micro-batch) -> loss (a sum over its rows), statistics for `diagnostics.reduce`
LossFn = Callable[[Qwen3, Batch], tuple[Array, Any]]

NO_DECAY = ("scale", "bias")  # names of parameters without weight decay: norms and biases
NEVER_ACCEPT = (
    2**31 - 1
)  # optax.apply_if_finite gives in after so many; the trainer stops long before


def make_schedule(cfg: Optimizer, total_steps: int) -> optax.Schedule:
    """Learning rate per optimiser step: linear warm-up from 0, then constant, linear or cosine decay."""
    peak, end, decay = (
        cfg.learning_rate,
        cfg.learning_rate * cfg.final_fraction,
        total_steps - cfg.warmup_steps,
    )
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, cfg.final_fraction),
    }[cfg.schedule]()
    if cfg.warmup_steps == 0:
        return after
    # counts from 1, so that the first step already moves
    warmup = lambda count: peak * (count + 1) / cfg.warmup_steps
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def last_learning_rate(schedule: optax.Schedule, state: TrainState, aux: dict) -> Array:
    """The learning rate of the newest update that was applied: one that was skipped does not advance the schedule."""
    return schedule(jnp.maximum(state.step - aux["nonfinite_total"] - 1, 0))


def make_optimizer(cfg: Optimizer, total_steps: int) -> optax.GradientTransformation:
    """AdamW after global-norm clipping; an update that is not finite is skipped and counted (optax.apply_if_finite)."""
    is_matrix = lambda params: jax.tree.map_with_path(
        lambda path, _: not path[-1].key.endswith(NO_DECAY), params
    )
    adamw = optax.adamw(
        make_schedule(cfg, total_steps),
        cfg.b1,
        cfg.b2,
        cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=is_matrix,
    )
    return optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), adamw), NEVER_ACCEPT
    )


def state_shardings(
    policy: Policy, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where every array of the state lives: optimiser moments as their parameters, counters everywhere."""
    params = sharding.shardings(mesh, policy.logical_axes)
    everywhere = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        tx,
        lambda _, p: p,
        jax.eval_shape(tx.init, policy.shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state)


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0. Jit it with `state_shardings` as out_shardings."""
    return TrainState(jnp.int32(0), params, tx.init(params))


def policy_loss(cfg: Config) -> LossFn:
    """The RL loss of the configured objective, with optional KL penalty and sampler-trainer correction."""
    objective = OBJECTIVES[cfg.objective.name]
    kl = KL_ESTIMATORS[cfg.loss.kl] if cfg.loss.kl_coef > 0 else None

    def loss(model: Qwen3, batch: Batch) -> tuple[Array, Any]:
        scores, extra = score(model, batch, cfg.rollout.temperature), {}
        log_ratio_BT = scores.logp_BT - batch.old_logp_BT
        surrogate_BT, per_token = objective(
            log_ratio_BT,
            batch.adv_BT,
            batch.mask_BT,
            cfg.objective,
            segment_ids_BT=batch.segment_ids_BT,
        )
        if batch.correction_BT is not None:
            surrogate_BT = batch.correction_BT * surrogate_BT
        if kl is not None:
            extra["kl/reference"] = kl(scores.logp_BT - batch.ref_logp_BT, batch.mask_BT)
            surrogate_BT -= cfg.loss.kl_coef * extra["kl/reference"]
        evidence = None
        if cfg.diagnostics.every:
            gates = diagnostics.Gates.of(cfg.objective)
            evidence = diagnostics.collect_evidence(
                log_ratio_BT, batch, gates, scores.logp_BT, scores.collision_BT
            )
        stats = diagnostics.collect(
            per_token, log_ratio_BT, scores.entropy_BT, batch.adv_BT, batch.mask_BT, extra, evidence
        )
        return -jnp.sum(batch.weight_BT * surrogate_BT), (stats, scores.routing)

    return loss


def sft_loss(model: Qwen3, batch: Batch) -> tuple[Array, Any]:
    """Negative log-likelihood of the masked tokens, weighted by weight_BT; temperature 1."""
    scores = score(model, batch, temperature=1.0)
    tokens = batch.mask_BT.sum()
    hits = (batch.mask_BT & scores.greedy_BT).sum()
    return -jnp.sum(batch.weight_BT * jnp.where(batch.mask_BT, scores.logp_BT, 0.0)), (
        (hits, tokens),
        scores.routing,
    )


def make_update(
    policy: Policy, tx, loss_fn: LossFn, micro_batch: int, shardings: TrainState | None = None
):
    """Jitted (state, batch) -> (state, aux): one optimiser step on a batch of B = n * micro_batch rows (0: n = 1).

    The state is donated. `aux` holds loss, grad_norm (before clipping), nonfinite_in_row, and with a leading dim of n
    micro-batches `stats`: what loss_fn returned, and `routing`: moe.Routing of the sparse layers, without the ids.
    """

    def micro_loss(params: Params, micro: Batch, n_tokens: Array):
        loss, (stats, routing) = loss_fn(policy.bind(params), micro)
        if routing is not None:
            loss += (
                policy.cfg.router_aux_loss_coef
                * (routing.tokens / n_tokens * routing.aux_loss).mean()
            )
            routing = dataclasses.replace(routing, expert_ids_BTk=None)  # too large to keep
        return loss, (stats, routing)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        micros = split_micro_batches(batch, micro_batch)
        n_tokens = jnp.maximum((batch.segment_ids_BT > 0).sum(), 1)

        def accumulate(grads, micro: Batch):
            (loss, (stats, routing)), g = jax.value_and_grad(micro_loss, has_aux=True)(
                state.params, micro, n_tokens
            )
            return jax.tree.map(jnp.add, grads, g), (loss, stats, routing)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, (loss, stats, routing) = jax.lax.scan(accumulate, zeros, micros)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        aux = {
            "loss": loss.sum(),
            "grad_norm": optax.tree.norm(grads),
            "nonfinite_in_row": opt_state.notfinite_count,
            "nonfinite_total": opt_state.total_notfinite,
            "stats": stats,
            "routing": routing,
        }
        return TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), opt_state
        ), aux

    # aux is read on the host, by every process: it goes where the step counter is, everywhere
    placed = None if shardings is None else (shardings, shardings.step)
    return jax.jit(update, donate_argnums=0, out_shardings=placed)
