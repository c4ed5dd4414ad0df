"""The decode loop: R slots, in each of which one completion is being written.

    while a request waits or a slot is live:
        compact the cache, when it is full
        admit waiting requests, when a slot is free
        step: pass one token of every slot through the model and draw the next one

A completion that is done leaves its slot to the next request.

A slot starts with the last token of its prompt, whose keys and values have yet to be written to
the slot's cache. So each step passes one token of every slot and draws the next one, and the
first token of a completion is drawn in the same way as all others.

All slots write to the same column of the cache. A request's prompt is therefore copied to the
columns right before that one (on TPU up to a page further ahead, see `models.KVCache`).

Shapes follow the need in a few phases (`phases`). The cache is widened as it fills, so that
attention reads few empty columns; where attention reads pages, one width is enough. Columns that
no slot needs any more are shifted out. Once no request waits and most slots are done, the
remaining completions go on in fewer slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sapo_jax.distributed.sharding import constrain, single_device
from sapo_jax.models import KVCache, Qwen3
from sapo_jax.models.qwen3 import Decoder
from sapo_jax.rollout.cache_width import (
    MIN_COLUMNS_PER_WIDENING,
    cache_widths,
    columns_per_widening,
)
from sapo_jax.rollout.sampling import SamplingParams, sample_token

MIN_SLOTS_TO_NARROW = 8  # with fewer slots than this, phases of fewer slots would save little


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """N completions to write, in the order in which they get a slot, and their P prompts."""

    # one entry for each request
    uniform_NC: Array  # float32 in [0, 1): the random number that each token is drawn with
    prompt_N: Array  # int32, the request's prompt, 0 to P - 1
    limit_N: Array  # int32, most tokens of the completion; 0 if the completion is not wanted
    # one entry for each prompt
    last_token_P: Array  # int32
    length_P: Array  # int32, tokens of the prompt
    cache: KVCache  # P rows of keys and values, those of the last token included


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the decode loop carries: R slots, and what has been written for the N requests."""

    started: Array  # int32 scalar, number of requests that have got a slot
    # one entry for each slot
    live_R: Array  # bool, whether the slot's completion is not done yet
    request_R: Array  # int32, the request that the slot writes for
    n_R: Array  # int32, tokens drawn for that request
    token_R: Array  # int32, the newest token of prompt or completion; not in the cache yet
    cache: KVCache
    # one entry for each request
    tokens_NC: Array  # int32
    logp_NC: Array  # float32
    length_N: Array  # int32
    expert_ids_NCLk: Array | None  # at column n: the experts of the token that token n followed


class Phase(NamedTuple):
    """The static shapes of a part of the decode loop."""

    slots: int  # R
    columns: int  # width of the cache


def phases(S: int, C: int, N: int, R: int, narrow: bool = True, page: int = 1) -> list[Phase]:
    """The phases in which N completions of at most C tokens are written in R slots.

    First come the phases of all R slots, with more and more columns, and then, with all columns,
    phases of half and a quarter of the slots. The latter are left out for few slots, short
    completions and on a mesh.

    narrow: False leaves the phases of fewer slots out, for completions that all end together.
    page: rows of the cache start at multiples of it, see `ops.attention.cache_page_size`.
    """
    widths = cache_widths(S, C, N > R, page)
    in_turn = [Phase(R, columns) for columns in widths]
    worth_narrowing = R >= MIN_SLOTS_TO_NARROW and C > MIN_COLUMNS_PER_WIDENING
    if narrow and worth_narrowing and single_device():
        in_turn.append(Phase(R // 2, widths[-1]))
        in_turn.append(Phase(R // 4, widths[-1]))
    return in_turn


def first_slots(
    requests: Requests, R: int, C: int, pad_id: int, expert_ids_NCLk: Array | None = None
) -> Slots:
    """R slots that hold the first R requests, before the first step.

    C: most tokens of a completion.
    expert_ids_NCLk: the array to write expert ids to, filled with the id that means "not
        recorded"; None if routing is not to be recorded.
    """
    N = len(requests.limit_N)
    prompts = requests.cache
    first_phase = phases(prompts.width, C, N, R, page=prompts.page)[0]

    # The columns before this one take the prompts, up to a page - 1 columns further ahead.
    cache_len = prompts.page - 1 + prompts.width - 1

    def empty_like(prompt_cache: Array, columns_dim: int) -> Array:
        """Zeros for R slots in the layout of the prompts' keys or values."""
        shape = list(prompt_cache.shape)
        shape[0] = R
        shape[columns_dim] = first_phase.columns
        zeros = jnp.zeros(shape, prompt_cache.dtype)
        return constrain(zeros, "batch", "kv_heads", None, None)

    zeros_R = jnp.zeros(R, jnp.int32)
    cache = KVCache(
        k=tuple(empty_like(k, 3) for k in prompts.k),
        v=tuple(empty_like(v, 2) for v in prompts.v),
        start_B=zeros_R,
        cache_len=jnp.int32(cache_len),
        page_offset_B=zeros_R if prompts.page > 1 else None,
    )
    slots = Slots(
        started=jnp.int32(0),
        live_R=jnp.zeros(R, bool),
        request_R=zeros_R,
        n_R=zeros_R,
        token_R=zeros_R,
        cache=cache,
        tokens_NC=_shard_requests(jnp.full((N, C), pad_id, jnp.int32)),
        logp_NC=_shard_requests(jnp.zeros((N, C), jnp.float32)),
        length_N=jnp.zeros(N, jnp.int32),
        expert_ids_NCLk=None if expert_ids_NCLk is None else _shard_requests(expert_ids_NCLk),
    )
    return _admit_waiting(requests, slots)


def decode(
    model: Qwen3,
    requests: Requests,
    slots: Slots,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    narrow: bool = True,
) -> Slots:
    """Write all requests to their ends: each ends at a stop token or at its limit.

    narrow: whether phases of fewer slots come last, see `phases`.
    """
    N, C = slots.tokens_NC.shape
    R = len(slots.live_R)
    S = requests.cache.width
    decoder = model.decoder(positions=S + C)

    def step(slots: Slots) -> Slots:
        return _step(model, decoder, requests, slots, sampling, stop_ids)

    in_turn = phases(S, C, N, R, narrow, slots.cache.page)
    for phase in in_turn:
        fewer_slots = [later.slots for later in in_turn if later.slots < phase.slots]
        slots = dataclasses.replace(slots, cache=_widen(slots.cache, phase.columns))
        slots = _narrow(slots, phase.slots)
        slots = _run_phase(
            requests,
            slots,
            step,
            stop_at_live=max(fewer_slots, default=0),
            requests_wait=N > R,
        )
    return slots


def _run_phase(
    requests: Requests,
    slots: Slots,
    step: Callable[[Slots], Slots],
    stop_at_live: int,
    requests_wait: bool,
) -> Slots:
    """Decode until the phase has no more work, or until it needs most columns of the cache.

    The phase has no more work once no request waits and at most `stop_at_live` slots are live.

    requests_wait: whether there are more requests than slots. If not, there is nothing to admit,
        and as all slots started together, there are no columns to shift out: the phase is one
        loop of steps. Otherwise it is three nested loops, so that the innermost holds the step
        alone: compact and then fill the cache; meanwhile, admit requests and then step until a
        slot is free that a request waits for.
    """
    N, C = slots.tokens_NC.shape
    S = requests.cache.width
    width = slots.cache.width
    min_columns_to_free = max(1, columns_per_widening(C) // 2)

    def has_work(slots: Slots) -> Array:
        """More slots are live than the next phase has, or a request waits."""
        return (slots.live_R.sum() > stop_at_live) | (slots.started < N)

    def can_step(slots: Slots) -> Array:
        """There is work, and the cache has a column for the next step to write to."""
        return has_work(slots) & (slots.cache.cache_len < width)

    if not requests_wait:
        return jax.lax.while_loop(can_step, step, slots)

    def nothing_to_admit(slots: Slots) -> Array:
        """All slots are live, or all requests have got a slot."""
        return slots.live_R.all() | (slots.started == N)

    def can_step_without_admitting(slots: Slots) -> Array:
        return can_step(slots) & nothing_to_admit(slots)

    def admit_then_step(slots: Slots) -> Slots:
        """Fill the free slots, then step until a slot is free that a request waits for."""
        slots = _admit_waiting(requests, slots)
        return jax.lax.while_loop(can_step_without_admitting, step, slots)

    def is_worth_compacting(slots: Slots) -> Array:
        """There is work, and enough columns of the cache are free or no longer needed."""
        work = has_work(slots)
        first_needed = _first_needed_column(slots.cache, slots.live_R, S)
        needed = slots.cache.cache_len - first_needed
        return work & (needed <= width - min_columns_to_free)

    def compact_then_fill(slots: Slots) -> Slots:
        """Shift out the columns that no slot needs, then write columns until the last one."""
        slots = dataclasses.replace(slots, cache=_compact(slots.cache, slots.live_R, S))
        return jax.lax.while_loop(can_step, admit_then_step, slots)

    return jax.lax.while_loop(is_worth_compacting, compact_then_fill, slots)


def _step(
    model: Qwen3,
    decoder: Decoder,
    requests: Requests,
    slots: Slots,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
) -> Slots:
    """Pass one token of every slot through the model, and draw the next one.

    A slot that is done goes on being computed, but it stands still: nothing is written for it,
    and its number of tokens stays what it is.
    """
    prompt_R = requests.prompt_N[slots.request_R]
    position_R = requests.length_P[prompt_R] - 1 + slots.n_R
    hidden_RD, cache, expert_ids_RLk = model.decode(
        decoder, slots.token_R, position_R, slots.cache, slots.live_R
    )
    last_column = requests.uniform_NC.shape[1] - 1
    uniform_R = requests.uniform_NC[slots.request_R, jnp.minimum(slots.n_R, last_column)]
    token_R, logp_R = sample_token(uniform_R, decoder.logits(hidden_RD), sampling)

    # A slot that is done writes to request N, which is out of bounds: the write is dropped.
    written_request_R = jnp.where(slots.live_R, slots.request_R, len(slots.length_N))

    def write(array_NC: Array, value_R: Array) -> Array:
        """Set column n_R of the slots' requests; NC and R may have further dims behind."""
        array_NC = array_NC.at[written_request_R, slots.n_R].set(value_R, mode="drop")
        return _shard_requests(array_NC)

    n_R = slots.n_R + slots.live_R
    goes_on_R = ~is_stop(token_R, stop_ids) & (n_R < requests.limit_N[slots.request_R])
    live_R = slots.live_R & goes_on_R
    tokens_NC = write(slots.tokens_NC, token_R)
    logp_NC = write(slots.logp_NC, logp_R)
    length_N = slots.length_N.at[written_request_R].set(n_R, mode="drop")
    expert_ids_NCLk = slots.expert_ids_NCLk
    if expert_ids_NCLk is not None:
        assert expert_ids_RLk is not None, "routing is recorded for models with experts alone"
        expert_ids_NCLk = write(expert_ids_NCLk, expert_ids_RLk)
    return dataclasses.replace(
        slots,
        live_R=live_R,
        n_R=n_R,
        token_R=token_R,
        cache=cache,
        tokens_NC=tokens_NC,
        logp_NC=logp_NC,
        length_N=length_N,
        expert_ids_NCLk=expert_ids_NCLk,
    )


def _shard_requests(written: Array) -> Array:
    """Split what is written for the N requests over the devices of a mesh.

    If a device held all of it, each step would move all of it through the device's memory, which
    is more than the weights.
    """
    return constrain(written, "batch", *[None] * (written.ndim - 1))


def is_stop(tokens: Array, stop_ids: Sequence[int]) -> Array:
    """Whether each token ends a completion: bool, in the shape of `tokens`."""
    return jnp.isin(tokens, jnp.array(stop_ids, jnp.int32))


# ---------------------------------------------------------------- columns and slots


def _narrow(slots: Slots, n: int) -> Slots:
    """The same state in n slots, which is enough for all live ones."""
    if n == len(slots.live_R):
        return slots
    live_first_R = jnp.argsort(~slots.live_R, stable=True)
    kept_n = live_first_R[:n]

    def take(x: Array) -> Array:
        return x[kept_n]

    cache = slots.cache
    cache = dataclasses.replace(
        cache,
        k=tuple(take(k) for k in cache.k),
        v=tuple(take(v) for v in cache.v),
        start_B=take(cache.start_B),
        page_offset_B=None if cache.page_offset_B is None else take(cache.page_offset_B),
    )
    return dataclasses.replace(
        slots,
        cache=cache,
        live_R=take(slots.live_R),
        request_R=take(slots.request_R),
        n_R=take(slots.n_R),
        token_R=take(slots.token_R),
    )


def _widen(cache: KVCache, width: int) -> KVCache:
    """The cache with empty columns added behind, up to `width` columns."""

    def pad(x: Array, columns_dim: int) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[columns_dim] = (0, width - cache.width)
        return jnp.pad(x, padding)

    return dataclasses.replace(
        cache, k=tuple(pad(k, 3) for k in cache.k), v=tuple(pad(v, 2) for v in cache.v)
    )


def _first_needed_column(cache: KVCache, live_R: Array, S: int) -> Array:
    """The first column that is needed, rounded down to the start of its page; int32 scalar.

    Needed are the columns of the live slots, and those that a prompt may take which is put right
    before the next column to write.
    """
    page = cache.page
    first_live = jnp.where(live_R, cache.start_B, cache.cache_len).min()
    first_for_a_prompt = cache.cache_len - (S - 1) - (page - 1)
    first = jnp.minimum(first_live, first_for_a_prompt)
    return first // page * page


def _compact(cache: KVCache, live_R: Array, S: int) -> KVCache:
    """The cache with the columns before the first needed one shifted out.

    What then stands in the last columns is not used.
    """
    shift = _first_needed_column(cache, live_R, S)
    page = cache.page

    def shift_page(i: Array, kv: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
        """Move one page of keys and values in place.

        To move a cache as a whole, as `jnp.roll` does, takes the memory of a second one.
        """

        def move(x: Array, columns_dim: int) -> Array:
            moved = jax.lax.dynamic_slice_in_dim(x, i * page + shift, page, columns_dim)
            return jax.lax.dynamic_update_slice_in_dim(x, moved, i * page, columns_dim)

        keys, values = kv
        return tuple(move(k, 3) for k in keys), tuple(move(v, 2) for v in values)

    if page > 1:
        num_pages = cache.width // page
        keys, values = jax.lax.fori_loop(0, num_pages, shift_page, (cache.k, cache.v))
    else:
        keys = tuple(jnp.roll(k, -shift, axis=3) for k in cache.k)
        values = tuple(jnp.roll(v, -shift, axis=2) for v in cache.v)
    return dataclasses.replace(
        cache,
        k=keys,
        v=values,
        start_B=jnp.maximum(cache.start_B - shift, 0),
        cache_len=cache.cache_len - shift,
    )


def _admit_waiting(requests: Requests, slots: Slots) -> Slots:
    """Give the free slots to the next requests, as far as requests wait.

    Requests are admitted one at a time, so that on a mesh no more than one prompt's keys and
    values pass between devices at once.
    """
    N = len(requests.limit_N)

    def can_admit(slots: Slots) -> Array:
        """A slot is free, and a request waits for it."""
        return ~slots.live_R.all() & (slots.started < N)

    def admit(slots: Slots) -> Slots:
        return _admit_next(requests, slots)

    return jax.lax.while_loop(can_admit, admit, slots)


def _admit_next(requests: Requests, slots: Slots) -> Slots:
    """Give the first free slot to the next request.

    The keys and values of its prompt are copied so that those of the prompt's last token stand in
    the column that the slot's next step writes to, where they are overwritten.
    """
    cache = slots.cache
    prompts = requests.cache
    slot = jnp.argmin(slots.live_R)
    prompt = requests.prompt_N[slots.started]

    copied_to = cache.cache_len - (prompts.width - 1)  # column that takes the prompt's column 0
    start = copied_to + prompts.start_B[prompt]  # column of the prompt's first token
    page_offset = start % cache.page  # so many columns ahead, the row starts at a page

    def copy_prompt(x: Array, prompt_rows: Array, columns_dim: int) -> Array:
        # A gather: to take a dynamic slice, each device would fetch the rows of all prompts.
        prompt_row = prompt_rows[prompt[None]]
        position = [slot, 0, 0, 0]
        position[columns_dim] = copied_to - page_offset
        return jax.lax.dynamic_update_slice(x, prompt_row, position)

    def at_slot(x_R: Array, value: Array | int) -> Array:
        return x_R.at[slot].set(value)

    keys = tuple(copy_prompt(x, rows, 3) for x, rows in zip(cache.k, prompts.k, strict=True))
    values = tuple(copy_prompt(x, rows, 2) for x, rows in zip(cache.v, prompts.v, strict=True))
    start_R = at_slot(cache.start_B, start - page_offset)
    page_offset_R = cache.page_offset_B
    if page_offset_R is not None:
        page_offset_R = at_slot(page_offset_R, page_offset)
    cache = dataclasses.replace(
        cache, k=keys, v=values, start_B=start_R, page_offset_B=page_offset_R
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
