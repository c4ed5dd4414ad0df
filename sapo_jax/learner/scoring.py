"""Log-probabilities and entropy of given tokens under a policy, chunked over the vocabulary.

    log p(y_t) = z_{y_t} - logsumexp(z),    z = logits / temperature

in float32. This is the sampler's distribution before truncation (top-k, top-p, min-p).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array, Batch, Params
from sapo_jax.distributed.sharding import constrain, sequence_axis
from sapo_jax.models import Policy, Qwen3
from sapo_jax.models.moe import Routing
from sapo_jax.ops.attention_xla import MASK_VALUE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What a pass over rows says of their completion tokens.

    Aligned with the tokens: position t speaks of token t given those before it, and holds 0 where
    no completion token stands.
    """

    logp_BT: Array  # float32
    entropy_BT: Array  # float32, nats, of the distribution of token t; no gradient
    greedy_BT: Array  # bool, whether token t is a most probable one
    routing: Routing | None  # None for a dense model
    collision_BT: Array | None = None  # float32, sum_v p_v^2 of that distribution; no gradient


class HeadScores(NamedTuple):
    """What the output head says of N targets."""

    logp_N: Array  # float32, log p(target)
    entropy_N: Array  # float32, nats; no gradient
    greedy_N: Array  # bool, whether the target is a most probable token
    collision_N: Array  # float32, sum_v p_v^2; no gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScorerOutput:
    """What a scorer returns (`make_scorer`)."""

    logp_BT: Array  # float32, 0 where no completion token stands
    entropy_BT: Array  # float32, nats, likewise
    expert_ids_BTLk: Array | None = None  # the router's experts, if the scorer records them


def score(model: Qwen3, batch: Batch, temperature: float) -> Scores:
    """Scores of the rows' completion tokens (`picked_BM`).

    The head sees no other positions than those that predict a completion token (`source_BM`).
    """
    expert_ids_BTLk = batch.expert_ids_BTLk
    if expert_ids_BTLk is not None:
        expert_ids_BTLk = jnp.asarray(expert_ids_BTLk)
    out = model.forward(
        jnp.asarray(batch.tokens_BT),
        jnp.asarray(batch.positions_BT),
        jnp.asarray(batch.segment_ids_BT),
        jnp.asarray(batch.prefix_ids_BT),
        expert_ids_BTLk=expert_ids_BTLk,
    )
    B, T, D = out.hidden_BTD.shape
    with jax.named_scope("head_logprobs"):
        hidden_BMD = jnp.take_along_axis(out.hidden_BTD, batch.source_BM[..., None], axis=1)
        M_axis = sequence_axis(hidden_BMD.shape[1])
        hidden_ND = constrain(hidden_BMD, "batch", M_axis, None).reshape(-1, D)
        hidden_ND = constrain(hidden_ND, "tokens" if M_axis else "batch", None)
        columns_BM = jnp.minimum(batch.picked_BM, T - 1)  # T stands for "no token"
        targets_N = jnp.take_along_axis(batch.tokens_BT, columns_BM, axis=1).reshape(-1)
        head = head_logprobs(
            hidden_ND, model.head_VD(), targets_N, temperature, model.cfg.vocab_chunk
        )
    row_B1 = jnp.arange(B)[:, None]

    def place(x_N: Array) -> Array:
        """The picked tokens' values at their columns, BT. Column T is out of bounds: dropped."""
        zeros_BT = jnp.zeros((B, T), x_N.dtype)
        return zeros_BT.at[row_B1, batch.picked_BM].set(x_N.reshape(B, -1), mode="drop")

    return Scores(
        logp_BT=place(head.logp_N),
        entropy_BT=place(head.entropy_N),
        greedy_BT=place(head.greedy_N),
        routing=out.routing,
        collision_BT=place(head.collision_N),
    )


class _RunningSums(NamedTuple):
    """What the pass over the vocabulary's slices carries: sums over the logits z seen so far."""

    max_N: Array  # m = max z
    exp_N: Array  # sum of exp(z - m)
    centered_N: Array  # sum of (z - m) exp(z - m)
    square_N: Array  # sum of exp(z - m)^2
    target_N: Array  # z of the target; 0 before its slice


def head_logprobs(
    hidden_ND: Array, head_VD: Array, targets_N: Array, temperature: float, chunk: int
) -> HeadScores:
    """log p = log softmax(hidden head^T / temperature) at the targets, and more of p.

    With m = max z, s = sum exp(z - m), c = sum (z - m) exp(z - m), q = sum exp(z - m)^2:

        log p(target) = z_target - m - log s
        entropy       = log s - c / s
        sum_v p_v^2   = q / s^2

    The vocabulary is cut into equal slices of at most `chunk` tokens, and one pass over them keeps
    the running m, s, c and q. The backward pass recomputes each slice, so that only N x chunk
    logits exist at a time. Only the log-probabilities have a gradient.
    """
    V, D = head_VD.shape
    num_slices = _num_slices(V, chunk)
    size = math.ceil(V / num_slices)
    padding = num_slices * size - V
    if padding:
        head_VD = jnp.pad(head_VD, [(0, padding), (0, 0)])

    @jax.checkpoint
    def add_slice(sums: _RunningSums, head_slice: tuple[Array, Array]) -> tuple[_RunningSums, None]:
        head_vD, start = head_slice
        z_Nv = jnp.einsum("nd,vd->nv", hidden_ND, head_vD, preferred_element_type=jnp.float32)
        z_Nv = z_Nv / temperature
        if padding:
            z_Nv = jnp.where(start + jnp.arange(size) < V, z_Nv, MASK_VALUE)

        # The old sums are about the old max. With d = old max - new max:
        #     sum exp(z - new)           = exp(d) sum exp(z - old)
        #     sum (z - new) exp(z - new) = exp(d) (sum (z - old) exp(z - old) + d sum exp(z - old))
        #     sum exp(z - new)^2         = exp(2 d) sum exp(z - old)^2
        max_N = jnp.maximum(sums.max_N, jax.lax.stop_gradient(z_Nv.max(axis=-1)))
        shift_N = sums.max_N - max_N
        below_Nv = z_Nv - max_N[:, None]
        exp_Nv = jnp.exp(below_Nv)

        target_N = targets_N - start  # counted from the start of the slice
        is_in_slice_N = (target_N >= 0) & (target_N < size)
        target_N1 = jnp.clip(target_N, 0, size - 1)[:, None]
        z_target_N = jnp.take_along_axis(z_Nv, target_N1, axis=-1)[:, 0]

        sum_exp_N = sums.exp_N * jnp.exp(shift_N) + exp_Nv.sum(axis=-1)
        old_centered_N = (sums.centered_N + shift_N * sums.exp_N) * jnp.exp(shift_N)
        centered_N = old_centered_N + (exp_Nv * below_Nv).sum(axis=-1)
        square_N = sums.square_N * jnp.exp(2 * shift_N) + (exp_Nv * exp_Nv).sum(axis=-1)
        new_sums = _RunningSums(
            max_N=max_N,
            exp_N=sum_exp_N,
            centered_N=jax.lax.stop_gradient(centered_N),
            square_N=jax.lax.stop_gradient(square_N),
            target_N=sums.target_N + jnp.where(is_in_slice_N, z_target_N, 0.0),
        )
        return new_sums, None

    zeros_N = jnp.zeros(len(hidden_ND), jnp.float32)
    no_sums = _RunningSums(
        max_N=jnp.full_like(zeros_N, MASK_VALUE),
        exp_N=zeros_N,
        centered_N=zeros_N,
        square_N=zeros_N,
        target_N=zeros_N,
    )
    slices = (head_VD.reshape(num_slices, size, D), jnp.arange(num_slices) * size)
    sums, _ = jax.lax.scan(add_slice, no_sums, slices)

    log_sum_N = jnp.log(sums.exp_N)
    # The max comes off first: to add it to log_sum would round the latter to the digits that a
    # large max leaves.
    logp_N = (sums.target_N - sums.max_N) - log_sum_N
    entropy_N = log_sum_N - sums.centered_N / sums.exp_N
    greedy_N = sums.target_N >= sums.max_N
    collision_N = sums.square_N / sums.exp_N**2
    return HeadScores(
        logp_N=logp_N,
        entropy_N=jax.lax.stop_gradient(entropy_N),
        greedy_N=greedy_N,
        collision_N=jax.lax.stop_gradient(collision_N),
    )


def _num_slices(V: int, chunk: int) -> int:
    """Into how many slices of at most `chunk` tokens the vocabulary is cut.

    This is the smallest number that cuts it evenly, if there is one below twice the number that is
    needed. Otherwise it is the number that is needed, and the last slice is padded.
    """
    fewest = math.ceil(V / chunk)
    for n in range(fewest, 2 * fewest):
        if V % n == 0:
            return n
    return fewest


def make_scorer(
    policy: Policy, temperature: float, micro_batch: int, *, record_routing: bool = False
) -> Callable[[Params, Batch], ScorerOutput]:
    """A jitted function (params, batch) -> ScorerOutput for the rows of the batch.

    It passes `micro_batch` rows at a time (see `split_micro_batches`).

    record_routing: whether to return the experts that the router chose. Where the batch brings
        experts of its own, those are replayed. Raises ValueError, when it is first called, for a
        dense model.
    """

    @jax.jit
    def scorer(params: Params, batch: Batch) -> ScorerOutput:
        model = policy.bind(params)

        def score_micro_batch(micro: Batch) -> ScorerOutput:
            scores = score(model, micro, temperature)
            expert_ids_BTLk = None
            if record_routing:
                if scores.routing is None:
                    raise ValueError("record_routing: the model is dense, no layer has experts")
                expert_ids_BTLk = scores.routing.expert_ids_BTLk
            return ScorerOutput(scores.logp_BT, scores.entropy_BT, expert_ids_BTLk)

        micro_batches = split_micro_batches(batch, micro_batch)
        return join_micro_batches(jax.lax.map(score_micro_batch, micro_batches))

    return scorer


def split_micro_batches(batch: Batch, micro_batch: int) -> Batch:
    """[B, ...] -> [B / micro_batch, micro_batch, ...] for every array of the batch.

    micro_batch: rows of each; 0 means all B rows. On a mesh, every micro-batch is split over all
        devices that the batch was split over.
    """

    def split(x: jax.Array) -> jax.Array:
        rows = micro_batch or len(x)
        x = x.reshape(-1, rows, *x.shape[1:])
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


def join_micro_batches(tree: Any) -> Any:
    """[n, micro_batch, ...] -> [n * micro_batch, ...] for every array of the tree."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
