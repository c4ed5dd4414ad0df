"""Log-probabilities and entropy of given tokens under a policy, chunked over the vocabulary.

log p(y_t) = z_{y_t} - logsumexp(z), z = logits / temperature, float32: the sampler's distribution before truncation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array, Batch, Params
from sapo_jax.distributed.sharding import constrain, sequence
from sapo_jax.models import Policy, Qwen3
from sapo_jax.models.moe import Routing
from sapo_jax.ops.attention import MASK_VALUE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Aligned with tokens: position t speaks of token t given those before it. 0 where no completion token stands."""

    logp_BT: Array  # float32
    entropy_BT: Array  # float32, nats, of the distribution that token t was drawn from; no gradient
    greedy_BT: Array  # bool, token t is a most probable one
    routing: Routing | None
    collision_BT: Array | None = None  # float32, sum_v p_v^2 of that distribution; no gradient


def score(model: Qwen3, batch: Batch, temperature: float) -> Scores:
    """Scores of the completion tokens of the rows (`picked_BM`); the head never sees the other positions."""
    where = (batch.positions_BT, batch.segment_ids_BT, batch.prefix_ids_BT)
    out = model.forward(batch.tokens_BT, *where, expert_ids_BTLk=batch.expert_ids_BTLk)
    B, T, D = out.hidden_BTD.shape
    hidden_BMD = jnp.take_along_axis(out.hidden_BTD, batch.source_BM[..., None], axis=1)
    split_M = sequence(hidden_BMD.shape[1])
    hidden_ND = constrain(hidden_BMD, "batch", split_M, None).reshape(-1, D)
    hidden_ND = constrain(hidden_ND, "tokens" if split_M else "batch", None)
    targets_N = jnp.take_along_axis(
        batch.tokens_BT, jnp.minimum(batch.picked_BM, T - 1), axis=1
    ).reshape(-1)
    logp_N, entropy_N, greedy_N, collision_N = head_logprobs(
        hidden_ND, model.head_VD(), targets_N, temperature, model.cfg.vocab_chunk
    )
    row_B1 = jnp.arange(B)[:, None]

    def align(x_N):  # column T, where there is no token, is out of bounds: dropped
        return (
            jnp.zeros((B, T), x_N.dtype)
            .at[row_B1, batch.picked_BM]
            .set(x_N.reshape(B, -1), mode="drop")
        )

    return Scores(align(logp_N), align(entropy_N), align(greedy_N), out.routing, align(collision_N))


def head_logprobs(
    hidden_ND, head_VD, targets_N, temperature: float, chunk: int
) -> tuple[Array, Array, Array, Array]:
    """log p = log softmax(hidden head^T / temperature) at the targets, the entropy, whether the target is a mode, and
    sum p^2; all N.

    The vocabulary is cut into equal slices of at most `chunk` tokens. One pass over them keeps a running max m and the
    sums of exp(z - m), (z - m) exp(z - m) and exp(z - m)^2; the backward pass recomputes each slice, so that
    only N x chunk logits exist at a time. Only the log-probabilities have a gradient.
    """
    V, D = head_VD.shape
    least = -(-V // chunk)
    n = next(
        (n for n in range(least, 2 * least) if V % n == 0), least
    )  # even slices, or else the last one is padded
    size = -(-V // n)
    padding = n * size - V
    head_VD = jnp.pad(head_VD, [(0, padding), (0, 0)]) if padding else head_VD

    constant = jax.lax.stop_gradient  # the entropy and the max need no backward pass

    @jax.checkpoint
    def one_slice(carry, slice_):
        max_N, sum_N, centered_N, square_N, target_N = carry
        head, start = slice_
        z = (
            jnp.einsum("nd,vd->nv", hidden_ND, head, preferred_element_type=jnp.float32)
            / temperature
        )
        z = jnp.where(start + jnp.arange(size) < V, z, MASK_VALUE) if padding else z
        new_max = jnp.maximum(max_N, constant(z.max(axis=-1)))
        shift, below = max_N - new_max, z - new_max[:, None]
        exp = jnp.exp(below)
        local_N = targets_N - start
        here_N = (local_N >= 0) & (local_N < size)
        z_target = jnp.take_along_axis(z, jnp.clip(local_N, 0, size - 1)[:, None], axis=-1)[:, 0]
        return (
            new_max,
            sum_N * jnp.exp(shift) + exp.sum(axis=-1),
            constant((centered_N + shift * sum_N) * jnp.exp(shift) + (exp * below).sum(axis=-1)),
            constant(square_N * jnp.exp(2 * shift) + (exp * exp).sum(axis=-1)),
            target_N + jnp.where(here_N, z_target, 0.0),
        ), None

    zeros = jnp.zeros(len(hidden_ND), jnp.float32)
    start = (jnp.full_like(zeros, MASK_VALUE), zeros, zeros, zeros, zeros)
    slices = (head_VD.reshape(n, size, D), jnp.arange(n) * size)
    (max_N, sum_N, centered_N, square_N, target_N), _ = jax.lax.scan(one_slice, start, slices)
    log_sum_N = jnp.log(sum_N)
    # The max comes off first: adding it to log_sum would round the latter to the digits that a large max leaves.
    logp_N, entropy_N = (target_N - max_N) - log_sum_N, constant(log_sum_N - centered_N / sum_N)
    return logp_N, entropy_N, target_N >= max_N, constant(square_N / sum_N**2)


def make_scorer(
    policy: Policy, temperature: float, micro_batch: int, *, record_routing: bool = False
) -> Callable[[Params, Batch], tuple[Array, ...]]:
    """Jitted (params, batch) -> log-probs and entropies BT, `micro_batch` rows at a time (see `split_micro_batches`).

    record_routing: and the experts BTLk that the router chose. Where the batch brings its own, they are replayed.
    """

    @jax.jit
    def scorer(params: Params, batch: Batch) -> tuple[Array, ...]:
        model = policy.bind(params)

        def one(micro: Batch):
            scores = score(model, micro, temperature)
            recorded = (scores.routing.expert_ids_BTLk,) if record_routing else ()
            return scores.logp_BT, scores.entropy_BT, *recorded

        return jax.tree.map(join_micro_batches, jax.lax.map(one, split_micro_batches(batch, micro_batch)))

    return scorer


def split_micro_batches(batch: Batch, micro_batch: int) -> Batch:
    """[B, ...] -> [B / micro_batch, micro_batch, ...] for every array of the batch; micro_batch 0: all B rows. On a
    mesh every micro-batch is split over all devices that the batch was split over."""

    def one(x: Array) -> Array:
        x = x.reshape(-1, micro_batch or len(x), *x.shape[1:])
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(one, batch)


def join_micro_batches(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
