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

from sapo_jax.batch import Array
from sapo_jax.distributed.sharding import constrain, single_device
from sapo_jax.models import KVCache, Qwen3
from sapo_jax.models.qwen3 import Decoder
from sapo_jax.rollout.cache_width import LEAST, growth, widths
from sapo_jax.rollout.sampling import SamplingParams, sample_token


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


def phases(
    S: int, C: int, N: int, R: int, narrow: bool = True, page: int = 1
) -> list[tuple[int, int]]:
    """(slots, columns) of each phase, for N completions of at most C tokens in R slots. page: see kernels.page.

    Phases of fewer slots come last, with all columns; few completions, few tokens, and a mesh have none. narrow: False
    leaves them out, for completions that end together.
    """
    columns = widths(S, C, N > R, page)
    fewer = [R // 2, R // 4] if narrow and single_device() and C > LEAST and R >= 8 else []
    return [(R, width) for width in columns] + [(n, columns[-1]) for n in fewer]


def first_slots(
    requests: Requests, R: int, C: int, pad_id: int, expert_ids_NCLk: Array | None = None
) -> Slots:
    """R slots with the first R requests; expert_ids_NCLk: what to fill in, if routing is to be recorded."""
    N, prompts = len(requests.limit_N), requests.cache
    cache_len = prompts.page - 1 + prompts.width - 1  # room for prompts that are put further ahead
    width = phases(prompts.width, C, N, R, page=prompts.page)[0][1]

    def empty(x: Array, dim: int) -> Array:
        shape = [width if d == dim else n for d, n in enumerate(x.shape)]
        return constrain(jnp.zeros((R, *shape[1:]), x.dtype), "batch", "kv_heads", None, None)

    none_R = jnp.zeros(R, jnp.int32)
    cache = KVCache(
        k=tuple(empty(k, 3) for k in prompts.k),
        v=tuple(empty(v, 2) for v in prompts.v),
        start_B=none_R,
        cache_len=jnp.int32(cache_len),
        page_offset_B=none_R if prompts.page > 1 else None,
    )
    slots = Slots(
        started=jnp.int32(0),
        live_R=jnp.zeros(R, bool),
        request_R=none_R,
        n_R=none_R,
        token_R=none_R,
        cache=cache,
        tokens_NC=_split(jnp.full((N, C), pad_id, jnp.int32)),
        logp_NC=_split(jnp.zeros((N, C), jnp.float32)),
        length_N=jnp.zeros(N, jnp.int32),
        expert_ids_NCLk=None if expert_ids_NCLk is None else _split(expert_ids_NCLk),
    )
    return _refilled(requests, slots)


def decode(
    model: Qwen3,
    requests: Requests,
    slots: Slots,
    rule: SamplingParams,
    stop_ids: Sequence[int],
    narrow: bool = True,
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


def _phase(
    requests: Requests, slots: Slots, step: Callable[[Slots], Slots], enough: int, waits: bool
) -> Slots:
    """Until no request waits and no more than `enough` slots are live, or most columns are needed.

    waits: requests have waited for a slot; only then are there columns to shift out.
    """
    (N, C), S, width = slots.tokens_NC.shape, requests.cache.width, slots.cache.width
    here = lambda slots: (slots.live_R.sum() > enough) | (slots.started < N)
    room = lambda slots: here(slots) & (slots.cache.cache_len < width)
    if not waits:
        return jax.lax.while_loop(room, step, slots)

    def turn(slots: Slots) -> Slots:
        """Free slots get the next requests; then steps, until a slot is free that one waits for."""
        full = lambda slots: slots.live_R.all() | (slots.started == N)
        return jax.lax.while_loop(
            lambda slots: room(slots) & full(slots), step, _refilled(requests, slots)
        )

    def fill(slots: Slots) -> Slots:
        """To the last column, from the first one that is needed."""
        slots = dataclasses.replace(slots, cache=_shifted(slots.cache, slots.live_R, S))
        return jax.lax.while_loop(room, turn, slots)

    spacious = lambda slots: (
        slots.cache.cache_len - _first(slots.cache, slots.live_R, S) <= width - max(1, growth(C) // 2)
    )
    return jax.lax.while_loop(lambda slots: here(slots) & spacious(slots), fill, slots)


def _step(
    model: Qwen3, decoder: Decoder, requests: Requests, slots: Slots, rule: SamplingParams, stop_ids
) -> Slots:
    """One token of every slot passes the model, and the next one is drawn."""
    position_R = requests.length_P[requests.prompt_N[slots.request_R]] - 1 + slots.n_R
    hidden_RD, cache, ids_RLk = model.decode(
        decoder, slots.token_R, position_R, slots.cache, slots.live_R
    )
    uniform_R = requests.uniform_NC[
        slots.request_R, jnp.minimum(slots.n_R, requests.uniform_NC.shape[1] - 1)
    ]
    token_R, logp_R = sample_token(uniform_R, decoder.logits(hidden_RD), rule)
    request_R = jnp.where(
        slots.live_R, slots.request_R, len(slots.length_N)
    )  # out of bounds: dropped
    write = lambda array_NC, value_R: _split(
        array_NC.at[request_R, slots.n_R].set(value_R, mode="drop")
    )
    n_R, ids_NCLk = (
        slots.n_R + slots.live_R,
        slots.expert_ids_NCLk,
    )  # a slot that is done stands still
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


def _split(written: Array) -> Array:
    """What is written for the N requests, over the devices: where a device holds all of it, each step moves all of it
    through its memory, which is more than the weights."""
    return constrain(written, "batch", *[None] * (written.ndim - 1))


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
    cache = dataclasses.replace(
        jax.tree.map(take, dataclasses.replace(slots.cache, cache_len=None)), cache_len=slots.cache.cache_len
    )
    return dataclasses.replace(
        slots, cache=cache, **{name: take(getattr(slots, name)) for name in names}
    )


def _widened(cache: KVCache, width: int) -> KVCache:
    def pad(x: Array, dim: int) -> Array:
        return jnp.pad(x, [(0, width - cache.width if d == dim else 0) for d in range(x.ndim)])

    return dataclasses.replace(
        cache, k=tuple(pad(k, 3) for k in cache.k), v=tuple(pad(v, 2) for v in cache.v)
    )


def _first(cache: KVCache, live_R: Array, S: int) -> Array:
    """The first column that is needed, or the page that it is in: by a live slot, or for a prompt that is put before
    the next column."""
    page = cache.page
    first = jnp.minimum(
        jnp.where(live_R, cache.start_B, cache.cache_len).min(), cache.cache_len - (S - 1) - (page - 1)
    )
    return first // page * page


def _shifted(cache: KVCache, live_R: Array, S: int) -> KVCache:
    """With the columns before the first one that is needed shifted out; what is in the last ones then is not used."""
    by, page = _first(cache, live_R, S), cache.page

    def move(i: Array, kv: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
        """A page, in place: a cache that is moved as a whole, as below, is there twice."""
        column = lambda x, dim: jax.lax.dynamic_slice_in_dim(x, i * page + by, page, dim)
        put = lambda x, dim: jax.lax.dynamic_update_slice_in_dim(x, column(x, dim), i * page, dim)
        return tuple(put(k, 3) for k in kv[0]), tuple(put(v, 2) for v in kv[1])

    if page > 1:
        k, v = jax.lax.fori_loop(0, cache.width // page, move, (cache.k, cache.v))
    else:
        k, v = (
            tuple(jnp.roll(k, -by, axis=3) for k in cache.k),
            tuple(jnp.roll(v, -by, axis=2) for v in cache.v),
        )
    return dataclasses.replace(
        cache, k=k, v=v, start_B=jnp.maximum(cache.start_B - by, 0), cache_len=cache.cache_len - by
    )


def _refilled(requests: Requests, slots: Slots) -> Slots:
    """With the next requests in the slots that are free, as far as there are some left; one at a time, so that over a
    mesh no more than its prompt passes between devices."""
    waits = lambda slots: ~slots.live_R.all() & (slots.started < len(requests.limit_N))
    return jax.lax.while_loop(waits, lambda slots: _placed(requests, slots), slots)


def _placed(requests: Requests, slots: Slots) -> Slots:
    """With the next request in the first free slot. Its prompt's last token stands in the column that the slot's next
    step writes to; it is overwritten."""
    cache, prompts, slot = slots.cache, requests.cache, jnp.argmin(slots.live_R)
    prompt = requests.prompt_N[slots.started]
    start = cache.cache_len - (prompts.width - 1)
    first = start + prompts.start_B[prompt]
    behind = first % cache.page  # columns; the slot's tokens stand so many before `used`

    def put(x: Array, rows: Array, dim: int) -> Array:
        row = rows[prompt[None]]  # a gather: of a dynamic slice each device would fetch all rows
        return jax.lax.dynamic_update_slice(
            x, row, (slot, *(start - behind if d == dim else 0 for d in (1, 2, 3)))
        )

    at_slot = lambda x, value: x.at[slot].set(value)
    cache = dataclasses.replace(
        cache,
        k=tuple(put(x, rows, 3) for x, rows in zip(cache.k, prompts.k, strict=True)),
        v=tuple(put(x, rows, 2) for x, rows in zip(cache.v, prompts.v, strict=True)),
        start_B=at_slot(cache.start_B, first - behind),
        page_offset_B=None if cache.page_offset_B is None else at_slot(cache.page_offset_B, behind),
    )
    return dataclasses.replace(
        slots,
        started=slots.started + 1,
        live_R=at_slot(slots.live_R, requests.limit_N[slots.started] > 0),
        request_R=at_slot(slots.request_R, slots.started),
        n_R=at_slot(slots.n_R, 0),
        token_R=at_slot(slots.token_R, requests.last_token_P[prompt]),
        cache=cache,
    )
