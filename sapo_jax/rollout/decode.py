"""The decode loop: R slots, each with a completion that is being written; one that is done leaves its slot to the next.

A slot starts with the last token of its prompt, whose keys and values are not yet among the prompt's in the cache: so
each step passes one token of every slot and draws the next one, the first tokens of completions as all others. All
slots write to the same column of the cache, so a request's prompt is put right before it (on TPU up to a page further
ahead: models.KVCache). Shapes follow the need in a few phases (`phases`): the cache is widened as it fills, so that
attention reads few empty columns (where it reads pages, one width will do), and columns that no slot needs any more are
shifted out; once no request waits and most slots are done, the others go on in fewer slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sapo_jax.columns import LEAST, growth, widths
from sapo_jax.models import KVCache, Qwen3
from sapo_jax.models.qwen3 import Decoder
from sapo_jax.rollout.choice import Rule, choose
from sapo_jax.sharding import alone, constrain
from sapo_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """N completions to write, in the order in which they get a slot."""

    uniform_NC: Array  # float32 in [0, 1), what each token is drawn with
    prompt_N: Array  # int32, row of the arrays of prompts
    limit_N: Array  # int32, most tokens; 0: not wanted
    # of the prompts
    last_token_P: Array
    length_P: Array
    cache: KVCache  # of P rows, with the last token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the decode loop carries: R slots, and what has been written for the N requests."""

    started: Array  # int32 scalar, requests that have got a slot
    live_R: Array  # bool, the slot's request is not done
    request_R: Array  # int32
    n_R: Array  # int32, tokens drawn for it
    token_R: Array  # int32, the newest, of prompt or completion; it is not in the cache yet
    cache: KVCache
    tokens_NC: Array
    logp_NC: Array
    length_N: Array
    expert_ids_NCLk: Array | None  # at n: of the token that token n was drawn from


def phases(S: int, C: int, N: int, R: int, narrow: bool = True, page: int = 1) -> list[tuple[int, int]]:
    """(slots, columns) of each phase, for N completions of at most C tokens in R slots. page: see kernels.page.

    Phases of fewer slots come last, with all columns; few completions, few tokens, and a mesh have none. narrow: False
    leaves them out, for completions that end together.
    """
    columns = widths(S, C, N > R, page)
    fewer = [R // 2, R // 4] if narrow and alone() and C > LEAST and R >= 8 else []
    return [(R, width) for width in columns] + [(n, columns[-1]) for n in fewer]


def refill_at(R: int) -> int:
    """So many slots wait for each other to be refilled together: over a mesh, all prompts pass between devices then."""
    return max(1, R // 16)


def first_slots(requests: Requests, R: int, C: int, pad_id: int, expert_ids_NCLk: Array | None = None) -> Slots:
    """R slots with the first R requests; expert_ids_NCLk: what to fill in, if routing is to be recorded."""
    N, prompt_R = len(requests.limit_N), requests.prompt_N[:R]
    start = requests.cache.page - 1  # room for prompts that are put further ahead
    cache = _before(requests.cache, prompt_R, jnp.int32(start + requests.cache.width - 1))
    return Slots(
        started=jnp.int32(R),
        live_R=requests.limit_N[:R] > 0,
        request_R=jnp.arange(R, dtype=jnp.int32),
        n_R=jnp.zeros(R, jnp.int32),
        token_R=requests.last_token_P[prompt_R],
        cache=cache,
        tokens_NC=jnp.full((N, C), pad_id, jnp.int32),
        logp_NC=jnp.zeros((N, C), jnp.float32),
        length_N=jnp.zeros(N, jnp.int32),
        expert_ids_NCLk=expert_ids_NCLk,
    )


def decode(
    model: Qwen3, requests: Requests, slots: Slots, rule: Rule, stop_ids: Sequence[int], narrow: bool = True
) -> Slots:
    """Until all requests are done, each by a stop token or at its limit."""
    (N, C), R, S = slots.tokens_NC.shape, len(slots.live_R), requests.cache.width
    decoder = model.decoder(positions=S + C)
    step = lambda slots: _step(model, decoder, requests, slots, rule, stop_ids)
    in_turn = phases(S, C, N, R, narrow, slots.cache.page)
    for n, width in in_turn:
        enough = max((fewer for fewer, _ in in_turn if fewer < n), default=0)
        slots = _narrowed(dataclasses.replace(slots, cache=_widened(slots.cache, width)), n)
        slots = _phase(requests, slots, step, enough, waits=N > R)
    return slots


def _phase(requests: Requests, slots: Slots, step: Callable[[Slots], Slots], enough: int, waits: bool) -> Slots:
    """Until no request waits and no more than `enough` slots are live, or most columns are needed.

    waits: requests have waited for a slot; only then are there columns to shift out.
    """
    (N, C), S, width = slots.tokens_NC.shape, requests.cache.width, slots.cache.width
    here = lambda slots: (slots.live_R.sum() > enough) | (slots.started < N)
    room = lambda slots: here(slots) & (slots.cache.used < width)
    refill = lambda slots: jnp.minimum(refill_at(len(slots.live_R)), N - slots.started)  # 0: none waits
    free = lambda slots: (refill(slots) > 0) & ((~slots.live_R).sum() >= refill(slots))
    if not waits:
        return jax.lax.while_loop(room, step, slots)

    def turn(slots: Slots) -> Slots:
        """Free slots get the next requests; then steps, until enough slots are free again."""
        return jax.lax.while_loop(lambda slots: room(slots) & ~free(slots), step, _refilled(requests, slots))

    def fill(slots: Slots) -> Slots:
        """To the last column, from the first one that is needed."""
        slots = dataclasses.replace(slots, cache=_shifted(slots.cache, slots.live_R, S))
        return jax.lax.while_loop(room, turn, slots)

    spacious = lambda slots: slots.cache.used - _first(slots.cache, slots.live_R, S) <= width - max(1, growth(C) // 2)
    return jax.lax.while_loop(lambda slots: here(slots) & spacious(slots), fill, slots)


def _step(model: Qwen3, decoder: Decoder, requests: Requests, slots: Slots, rule: Rule, stop_ids) -> Slots:
    """One token of every slot passes the model, and the next one is drawn."""
    position_R = requests.length_P[requests.prompt_N[slots.request_R]] - 1 + slots.n_R
    hidden_RD, cache, ids_RLk = model.decode(decoder, slots.token_R, position_R, slots.cache, slots.live_R)
    uniform_R = requests.uniform_NC[slots.request_R, jnp.minimum(slots.n_R, requests.uniform_NC.shape[1] - 1)]
    token_R, logp_R = choose(uniform_R, decoder.logits(hidden_RD), rule)
    request_R = jnp.where(slots.live_R, slots.request_R, len(slots.length_N))  # out of bounds: dropped
    write = lambda array_NC, value_R: array_NC.at[request_R, slots.n_R].set(value_R, mode="drop")
    n_R, ids_NCLk = slots.n_R + slots.live_R, slots.expert_ids_NCLk  # a slot that is done stands still
    more_R = ~is_stop(token_R, stop_ids) & (n_R < requests.limit_N[slots.request_R])
    return dataclasses.replace(
        slots,
        live_R=slots.live_R & more_R,
        n_R=n_R,
        token_R=token_R,
        cache=cache,
        tokens_NC=write(slots.tokens_NC, token_R),
        logp_NC=write(slots.logp_NC, logp_R),
        length_N=slots.length_N.at[request_R].set(n_R, mode="drop"),
        expert_ids_NCLk=None if ids_NCLk is None else write(ids_NCLk, ids_RLk),
    )


def is_stop(tokens: Array, stop_ids: Sequence[int]) -> Array:
    return jnp.isin(tokens, jnp.array(stop_ids, jnp.int32))


# ---------------------------------------------------------------- columns and slots


def _narrowed(slots: Slots, n: int) -> Slots:
    """n slots, the live ones among them."""
    if n == len(slots.live_R):
        return slots
    kept_n = jnp.argsort(~slots.live_R, stable=True)[:n]
    take = lambda x: x[kept_n]
    names = "live_R", "request_R", "n_R", "token_R"
    cache = dataclasses.replace(jax.tree.map(take, dataclasses.replace(slots.cache, used=None)), used=slots.cache.used)
    return dataclasses.replace(slots, cache=cache, **{name: take(getattr(slots, name)) for name in names})


def _widened(cache: KVCache, width: int) -> KVCache:
    def pad(x: Array, dim: int) -> Array:
        return jnp.pad(x, [(0, width - cache.width if d == dim else 0) for d in range(x.ndim)])

    return dataclasses.replace(cache, k=tuple(pad(k, 3) for k in cache.k), v=tuple(pad(v, 2) for v in cache.v))


def _before(prompts: KVCache, prompt_R: Array, used: Array) -> KVCache:
    """A cache of R rows: these prompts as they stand before the column `used`, which is the last one that it holds. The
    first step overwrites their last tokens."""
    S, page = prompts.width, prompts.page
    first_R = used - (S - 1) + prompts.first_B[prompt_R]
    behind_R = first_R % page if page > 1 else None
    shift = jax.vmap(lambda row, by, dim: jax.lax.dynamic_slice_in_dim(row, by, S + page - 1, dim), (0, 0, None))

    def place(x: Array, dim: int) -> Array:
        rows = x[prompt_R]
        if page > 1:  # by behind_R to the left, with room on both sides
            wide = jnp.pad(rows, [(0, 0) if d != dim else (page - 1, page - 1) for d in range(4)])
            rows = shift(wide, behind_R, dim - 1)
        return constrain(rows, "batch", "kv_heads", None, None)

    first_R = constrain(first_R if behind_R is None else first_R - behind_R, "batch")
    return KVCache(
        tuple(place(k, 3) for k in prompts.k), tuple(place(v, 2) for v in prompts.v), first_R, used, behind_R
    )


def _first(cache: KVCache, live_R: Array, S: int) -> Array:
    """The first column that is needed, or the page that it is in: by a live slot, or for a prompt that is put before
    the next column."""
    page = cache.page
    first = jnp.minimum(jnp.where(live_R, cache.first_B, cache.used).min(), cache.used - (S - 1) - (page - 1))
    return first // page * page


def _shifted(cache: KVCache, live_R: Array, S: int) -> KVCache:
    """With the columns before the first one that is needed shifted out."""
    by = _first(cache, live_R, S)
    return dataclasses.replace(
        cache,
        k=tuple(jnp.roll(k, -by, axis=3) for k in cache.k),
        v=tuple(jnp.roll(v, -by, axis=2) for v in cache.v),
        first_B=jnp.maximum(cache.first_B - by, 0),
        used=cache.used - by,
    )


def _refilled(requests: Requests, slots: Slots) -> Slots:
    """With the next requests in the slots that are free, as far as there are some left."""
    N, cache = len(requests.limit_N), slots.cache
    free_R = ~slots.live_R
    next_R = slots.started + jnp.cumsum(free_R) - 1
    taken_R = free_R & (next_R < N)
    request_R = jnp.where(taken_R, next_R, slots.request_R)
    prompts = _before(requests.cache, requests.prompt_N[request_R], cache.used)
    start = cache.used + 1 - prompts.width

    def put(old, new, dim: int) -> Array:
        there = jax.lax.dynamic_slice_in_dim(old, start, prompts.width, axis=dim)
        new = jnp.where(taken_R[:, None, None, None], new, there)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=dim)

    pick = lambda new, old: None if old is None else jnp.where(taken_R, new, old)
    cache = dataclasses.replace(
        cache,
        k=tuple(put(old, new, 3) for old, new in zip(cache.k, prompts.k, strict=True)),
        v=tuple(put(old, new, 2) for old, new in zip(cache.v, prompts.v, strict=True)),
        first_B=pick(prompts.first_B, cache.first_B),
        behind_B=pick(prompts.behind_B, cache.behind_B),
    )
    return dataclasses.replace(
        slots,
        started=jnp.minimum(slots.started + free_R.sum(dtype=jnp.int32), N),
        live_R=slots.live_R | (taken_R & (requests.limit_N[request_R] > 0)),
        request_R=request_R,
        n_R=pick(0, slots.n_R),
        token_R=pick(requests.last_token_P[requests.prompt_N[request_R]], slots.token_R),
        cache=cache,
    )
