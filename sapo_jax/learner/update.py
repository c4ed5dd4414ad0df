"""The update: loss and gradients over micro-batches, one optax step, on donated and sharded state.

    loss = -sum(weight_BT * (correction_BT * kept_BT * surrogate_BT - kl_coef * kl_BT))
           + router_aux_loss_coef * aux

kept_BT is 0 on the sequences that `loss.sequence_mask` leaves out, else 1.

The weights are made for the whole optimiser batch, so micro-batches add up to exactly the same
gradient. (The auxiliary loss of the router is not linear in the batch: it is the mean of the
micro-batches' own, weighted by their real tokens.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from sapo_jax import diagnostics
from sapo_jax.batch import Array, Batch, Params, TrainState
from sapo_jax.config.schema import Config, Optimizer
from sapo_jax.distributed import sharding
from sapo_jax.learner.numbers import Numbers, is_off, numbers_of, with_numbers
from sapo_jax.learner.scoring import score, split_micro_batches
from sapo_jax.models import Policy, Qwen3
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.kl import KL_ESTIMATORS
from sapo_jax.objectives.sequence_mask import leave_out, masked_sequences

# (model, micro-batch) -> loss, (statistics, Routing). The loss is a sum over the rows of the
# micro-batch; the statistics of the policy loss go to `diagnostics.reduce_token_stats`.
LossFn = Callable[[Qwen3, Batch], tuple[Array, Any]]
UpdateFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]

NO_DECAY = ("scale", "bias")  # ends of names of parameters without weight decay: norms and biases
# optax.apply_if_finite applies an update that is not finite after so many in a row. The trainer
# stops long before.
NEVER_ACCEPT = 2**31 - 1


class Rates(NamedTuple):
    """The numbers of a learning rate's schedule: plain ones, or traced."""

    peak: ArrayLike
    warmup_slope: ArrayLike  # of a step of the warm-up
    # linear: from peak to linear_end, which is linear_fall less
    linear_fall: ArrayLike
    linear_end: ArrayLike
    # cosine: the parts of peak that go and stay
    cosine_fall: ArrayLike
    cosine_end: ArrayLike

    @classmethod
    def of(cls, cfg: Optimizer) -> Rates:
        """Differences are made here, with the digits of the configuration: float32 has fewer."""
        linear_end = cfg.learning_rate * cfg.final_fraction
        # In float32, as XLA joins the two constants of peak * (count + 1) / warmup_steps.
        warmup_share = np.float32(1) / np.float32(max(cfg.warmup_steps, 1))
        return cls(
            peak=cfg.learning_rate,
            warmup_slope=float(np.float32(cfg.learning_rate) * warmup_share),
            linear_fall=cfg.learning_rate - linear_end,
            linear_end=linear_end,
            cosine_fall=1 - cfg.final_fraction,
            cosine_end=cfg.final_fraction,
        )


def make_schedule(cfg: Optimizer, total_steps: int, rates: Rates | None = None) -> optax.Schedule:
    """Learning rate by optimiser step: linear warm-up from 0, then constant, linear or cosine.

    rates: in the place of those of `cfg`.
    """
    if rates is None:
        rates = Rates.of(cfg)
    decay_steps = total_steps - cfg.warmup_steps

    def after_warmup(count: ArrayLike) -> ArrayLike:
        """Counts from the end of the warm-up."""
        if cfg.schedule == "constant":
            return rates.peak
        if cfg.schedule == "linear":
            share_left = 1 - jnp.clip(count, 0, decay_steps) / decay_steps
            return rates.linear_fall * share_left + rates.linear_end
        count = jnp.minimum(count, float(decay_steps))
        share_left = 0.5 * (1 + jnp.cos(jnp.pi * count / decay_steps))
        return rates.peak * (rates.cosine_fall * share_left + rates.cosine_end)

    if cfg.warmup_steps == 0:
        return after_warmup

    def warmup(count: ArrayLike) -> ArrayLike:
        """Counts from 1, so that the first step already moves the parameters."""
        return rates.warmup_slope * (count + 1)

    return optax.join_schedules([warmup, after_warmup], [cfg.warmup_steps])


def last_learning_rate(
    schedule: optax.Schedule, state: TrainState, aux: dict[str, Any]
) -> ArrayLike:
    """The learning rate of the newest update that was applied.

    An update that was skipped, because it was not finite or had no signal, does not advance the
    schedule.

    state, aux: what the newest update returned.
    """
    applied = state.step - aux["nonfinite_total"]
    return schedule(jnp.maximum(applied - 1, 0))


def make_optimizer(cfg: Optimizer, total_steps: int) -> optax.GradientTransformation:
    """AdamW with the schedule of the configuration, see `clipped_adamw`."""
    return clipped_adamw(cfg, make_schedule(cfg, total_steps))


def clipped_adamw(cfg: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm.

    An update that is not finite is skipped and counted (optax.apply_if_finite).
    """

    def decay_mask(params: Params) -> Params:
        """True for each parameter that weight decay applies to."""

        def has_decay(path: tuple[jax.tree_util.DictKey, ...], _: Array) -> bool:
            return not path[-1].key.endswith(NO_DECAY)

        return jax.tree.map_with_path(has_decay, params)

    adamw = optax.adamw(
        schedule,
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask,
    )
    clipped = optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), adamw)
    return optax.apply_if_finite(clipped, max_consecutive_errors=NEVER_ACCEPT)


def state_shardings(
    policy: Policy, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where every array of the state lives: optimiser moments as their parameters, counters
    everywhere."""
    params = sharding.shardings(mesh, policy.logical_axes)
    everywhere: Any = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer.init,
        lambda _, param_sharding: param_sharding,
        jax.eval_shape(optimizer.init, policy.shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0. Jit it with `state_shardings` as out_shardings."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def has_signal(batch: Batch) -> jax.Array:
    """Whether there is something to learn from the batch; a bool scalar.

    There is not where all weights are 0, because every sample failed or was left out. In an RL
    batch there is not either where every advantage is 0 and no KL penalty is on: then the gradient
    of the policy loss is exactly 0. The router's auxiliary loss alone is no signal.
    """
    learns_BT = batch.weight_BT != 0  # NaN counts as a signal: such an update is not finite
    is_rl = batch.old_logp_BT is not None
    has_kl = batch.ref_logp_BT is not None
    if is_rl and not has_kl:
        learns_BT = learns_BT & (batch.adv_BT != 0)
    return jnp.any(learns_BT)


def policy_loss(cfg: Config) -> LossFn:
    """The RL loss of the configured objective:

        loss = -sum(weight_BT * (correction_BT * kept_BT * surrogate_BT - kl_coef * kl_BT))

    The sampler-trainer correction, the sequence mask and the KL penalty are optional. The numbers
    of `cfg` may be traced (`numbers.with_numbers`).

    Raises ValueError where a batch lacks the log-probs of the old policy, those of the sampler with
    a sequence mask, those of the reference with a KL penalty, or the experts to replay with
    train.routing_replay: without them the router would choose anew, in silence.
    """
    objective = OBJECTIVES[cfg.objective.name]
    kl_estimator = None
    if not is_off(cfg.loss.kl_coef):
        kl_estimator = KL_ESTIMATORS[cfg.loss.kl]
    sequence_mask = cfg.loss.sequence_mask

    def loss(model: Qwen3, batch: Batch) -> tuple[Array, Any]:
        if batch.old_logp_BT is None:
            raise ValueError("the policy loss needs old_logp_BT in its batch")
        if cfg.train.routing_replay != "none" and batch.expert_ids_BTLk is None:
            raise ValueError("train.routing_replay needs expert_ids_BTLk in the batch")
        scores = score(model, batch, cfg.rollout.temperature)
        log_ratio_BT = scores.logp_BT - batch.old_logp_BT
        surrogate_BT, token_diagnostics = objective(
            log_ratio_BT,
            batch.adv_BT,
            batch.mask_BT,
            cfg.objective,
            segment_ids_BT=batch.segment_ids_BT,
            old_logp_BT=batch.old_logp_BT,
        )
        mask_sums = None
        if sequence_mask is not None:
            if batch.sampler_logp_BT is None:
                raise ValueError("the sequence mask needs sampler_logp_BT in the batch")
            left_out_BT = masked_sequences(
                scores.logp_BT - batch.sampler_logp_BT,
                batch.adv_BT,
                batch.mask_BT,
                sequence_mask.below,
                batch.segment_ids_BT,
            )
            grad_weight_BT = token_diagnostics["grad_weight"]
            mask_sums = diagnostics.collect_sequence_mask(batch, left_out_BT, grad_weight_BT)
            surrogate_BT, token_diagnostics = leave_out(
                surrogate_BT, token_diagnostics, left_out_BT
            )
        if batch.correction_BT is not None:
            surrogate_BT = batch.correction_BT * surrogate_BT
        extra = {}
        if kl_estimator is not None:
            if batch.ref_logp_BT is None:
                raise ValueError("the KL penalty needs ref_logp_BT in the batch")
            kl_BT = kl_estimator(scores.logp_BT - batch.ref_logp_BT, batch.mask_BT)
            surrogate_BT = surrogate_BT - cfg.loss.kl_coef * kl_BT
            extra["kl/reference"] = kl_BT

        evidence = None
        if cfg.diagnostics.every:
            gates = diagnostics.Gates.of(cfg.objective)
            evidence = diagnostics.collect_evidence(
                log_ratio_BT,
                batch,
                gates,
                scores.logp_BT,
                token_diagnostics,
                scores.collision_BT,
            )
        stats = diagnostics.collect_token_stats(
            token_diagnostics,
            log_ratio_BT,
            scores.entropy_BT,
            batch.adv_BT,
            batch.mask_BT,
            extra,
            evidence,
            mask_sums,
        )
        return -jnp.sum(batch.weight_BT * surrogate_BT), (stats, scores.routing)

    return loss


def sft_loss(model: Qwen3, batch: Batch) -> tuple[Array, Any]:
    """Negative log-likelihood of the masked tokens at temperature 1:

        loss = -sum(weight_BT * logp_BT)

    The statistics are the numbers of tokens that are the most probable ones, and of all tokens.
    """
    scores = score(model, batch, temperature=1.0)
    num_tokens = batch.mask_BT.sum()
    num_hits = (batch.mask_BT & scores.greedy_BT).sum()
    logp_BT = jnp.where(batch.mask_BT, scores.logp_BT, 0.0)
    return -jnp.sum(batch.weight_BT * logp_BT), ((num_hits, num_tokens), scores.routing)


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    micro_batch: int,
    shardings: TrainState | None = None,
) -> UpdateFn:
    """A jitted function (state, batch) -> (state, aux): one optimiser step on a batch of B rows.

    The state is donated. The B rows are n * micro_batch (if micro_batch is 0, n is 1).

    A batch without a signal (`has_signal`) leaves parameters, optimiser state and step as they are:
    Adam's momentum would move them and weight decay would shrink them, though nothing was learned.

    `aux` holds
        loss             of the whole batch
        grad_norm        of its gradient, before clipping
        skipped          whether the update was skipped because the batch has no signal
        nonfinite_in_row, nonfinite_total
                         updates that were skipped because they were not finite
        stats            what loss_fn returned, with a leading dim of n micro-batches
        routing          moe.Routing of the sparse layers, likewise, without the ids

    shardings: those of the state (`state_shardings`); None off a mesh.
    """
    step = update_step(policy, optimizer, loss_fn, micro_batch)
    return jax.jit(step, donate_argnums=0, out_shardings=_out_shardings(shardings))


def make_rl_update(
    policy: Policy,
    cfg: Config,
    total_steps: int,
    micro_batch: int,
    shardings: TrainState | None = None,
) -> UpdateFn:
    """The update of the RL stage: `make_update` with the loss and the optimizer of `cfg`.

    The numbers of the configuration (`numbers.INPUTS`, and those of the learning rate) are inputs
    of the compiled program. So the arms of a sweep that differ in them alone share it. Results are
    those of `make_update`.

    total_steps: optimiser steps of the stage, over which the learning rate's schedule goes.
    """
    numbers = numbers_of(cfg)
    rates = jax.tree.map(np.float32, Rates.of(cfg.optimizer))

    def update(
        state: TrainState, batch: Batch, numbers: Numbers, rates: Rates
    ) -> tuple[TrainState, dict[str, Any]]:
        traced_cfg = with_numbers(cfg, numbers)
        schedule = make_schedule(cfg.optimizer, total_steps, rates)
        optimizer = clipped_adamw(traced_cfg.optimizer, schedule)
        step = update_step(policy, optimizer, policy_loss(traced_cfg), micro_batch)
        return step(state, batch)

    jitted = jax.jit(update, donate_argnums=0, out_shardings=_out_shardings(shardings))

    return functools.partial(jitted, numbers=numbers, rates=rates)


def _out_shardings(shardings: TrainState | None) -> tuple[TrainState, Any] | None:
    """Where the results of an update go."""
    if shardings is None:
        return None
    # aux is read on the host by every process: like the step counter, it goes everywhere.
    return shardings, shardings.step


def update_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    micro_batch: int,
) -> UpdateFn:
    """What `make_update` compiles."""

    def micro_loss(params: Params, micro: Batch, batch_tokens: Array) -> tuple[Array, Any]:
        """The loss of a micro-batch and its part of the router's; batch_tokens: of all rows."""
        loss, (stats, routing) = loss_fn(policy.bind(params), micro)
        if routing is not None:
            share_of_tokens = routing.tokens / batch_tokens
            aux_loss = (share_of_tokens * routing.aux_loss).mean()  # over the sparse layers
            loss += policy.cfg.router_aux_loss_coef * aux_loss
            routing = dataclasses.replace(routing, expert_ids_BTk=None)  # too large to keep
        return loss, (stats, routing)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        micro_batches = split_micro_batches(batch, micro_batch)
        batch_tokens = jnp.maximum((batch.segment_ids_BT > 0).sum(), 1)
        loss_and_grads = jax.value_and_grad(micro_loss, has_aux=True)

        def accumulate(grads: Params, micro: Batch) -> tuple[Params, Any]:
            """Add the gradients of a micro-batch."""
            with jax.named_scope("loss"):
                (loss, (stats, routing)), micro_grads = loss_and_grads(
                    state.params, micro, batch_tokens
                )
            return jax.tree.map(jnp.add, grads, micro_grads), (loss, stats, routing)

        no_grads = jax.tree.map(jnp.zeros_like, state.params)
        grads, (loss, stats, routing) = jax.lax.scan(accumulate, no_grads, micro_batches)
        with jax.named_scope("optimizer"):
            updates, new_opt_state = optimizer.update(grads, state.opt_state, state.params)
            new_params = optax.apply_updates(state.params, updates)
            learns = has_signal(batch)

            def new_if_it_learns(new: Array, old: Array) -> Array:
                return jnp.where(learns, new, old)

            params: Any = jax.tree.map(new_if_it_learns, new_params, state.params)
            opt_state = jax.tree.map(new_if_it_learns, new_opt_state, state.opt_state)
        aux = {
            "loss": loss.sum(),
            "grad_norm": optax.tree.norm(grads),
            "skipped": ~learns,
            "nonfinite_in_row": optax.tree.get(opt_state, "notfinite_count"),
            "nonfinite_total": optax.tree.get(opt_state, "total_notfinite"),
            "stats": stats,
            "routing": routing,
        }
        return TrainState(state.step + learns.astype(jnp.int32), params, opt_state), aux

    return update
