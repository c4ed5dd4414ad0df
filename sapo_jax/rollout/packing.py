"""Packing: which completions share a row, and how long the rows are. Plain arithmetic on lengths.

A piece is a prompt with one or more of its completions, `p c1 c2 ...`. The prompt's tokens are
computed once for all of them: attention lets each completion see the prompt and itself (see
`ops.attention.attention`). A row holds one or more pieces.

Completions that share a prompt save prompt tokens, but they make rows longer, which costs where
attention compares tokens with keys that they do not see. So `plan_rows` tries several ways and
takes the cheapest.

Every new shape of the rows costs a compilation, which may take as long as a hundred steps. So a
plan keeps to the shapes that the run has had before (`RowShapes`), as long as that costs little.
The plan is a function of the lengths, of the run's `Packing` and of those shapes, which its
checkpoints hold: a resumed run packs, and rounds, as the uninterrupted one does.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

BUCKETS_TO_TRY = 3  # the next larger buckets that are tried as row lengths
# The smallest bucket of a row's completion tokens, M: answers of 2, 3 and 4 tokens share a program.
FEWEST_PICKED = 8
# A shape that the run has had before is taken if it costs at most so many times the cheapest plan:
# the step between two buckets.
MOST_WASTE = 1.5


class RowShape(NamedTuple):
    """What decides which program scores and updates: the sizes of a mini-batch."""

    length: int  # T
    rows: int  # R
    picked: int  # M, completion tokens that a row has room for


class RowShapes:
    """The shapes that a run has had, in the order in which they came."""

    def __init__(self) -> None:
        self.known: list[RowShape] = []

    def add(self, shape: RowShape) -> None:
        if shape not in self.known:
            self.known.append(shape)

    def get_state(self) -> list[list[int]]:
        """As JSON values, for a checkpoint."""
        return [list(shape) for shape in self.known]

    def set_state(self, state: list[list[Any]]) -> None:
        self.known = [RowShape(*shape) for shape in state]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a run packs. Costs are FLOPs of a forward pass, in any unit; sizes are tokens."""

    body: float  # cost of a token, attention's comparisons aside
    key: float  # cost of comparing a token with one key
    skips: bool  # attention skips blocks of keys that no row of a micro-batch sees (not on TPU)
    max_prompt: int  # S, tokens of the longest prompt that may come
    max_new: int  # C, most tokens of a completion
    shards: int = 1  # devices that rows are split over
    # Rows of S + C tokens (or of row_tokens) in a forward and backward pass; a multiple of shards.
    # 0: a mini-batch is one micro-batch.
    micro_batch: int = 0
    row_tokens: int = 0  # T; 0: the cheapest

    def cost(self, rows: int, T: int, different_rows: int, seen_pairs: float) -> float:
        """The cost of so many rows of T tokens.

        seen_pairs: pairs of a token and a key that it sees, in all rows.
        different_rows: rows of a micro-batch that differ in who sees what.

        Where blocks are skipped, a token is compared with the keys that any row of its micro-batch
        sees at its place. At worst these are the sum of what the different rows see, but never
        later tokens. Where nothing is skipped, it is compared with all T keys.
        """
        tokens = rows * T
        compared_keys: float = T
        if self.skips:
            compared_keys = min(T / 2, different_rows * seen_pairs / tokens)
        return tokens * (self.body + compared_keys * self.key)

    def micro_batch_rows(self, T: int) -> int:
        """Rows of T tokens in a micro-batch, a multiple of `shards`.

        There are fewer of longer rows, so that a micro-batch never has more tokens; 0 if not even
        one row for each device is left.
        """
        full_length = self.row_tokens or bucket(self.max_prompt + self.max_new)
        if T <= full_length:
            return self.micro_batch
        rows_per_shard = self.micro_batch * full_length // (self.shards * T)
        return rows_per_shard * self.shards

    def candidate_lengths(self, longest: int, completions_per_piece: int) -> list[int]:
        """Row lengths to try, ascending, for pieces of at most `longest` tokens.

        These are the next buckets. Where attention skips what nobody sees, a longer row costs
        little more, so there are more candidates: the lengths between those buckets (2^i times
        1.25 and 1.75), and the length of a piece whose completions are all as long as they may be.
        """
        if self.row_tokens:
            return [self.row_tokens] if longest <= self.row_tokens else []

        buckets = [bucket(longest)]
        while len(buckets) < BUCKETS_TO_TRY:
            buckets.append(bucket(buckets[-1] + 1))
        candidates = set(buckets)
        if self.skips:
            full_piece = self.max_prompt + completions_per_piece * self.max_new
            candidates.add(math.ceil(full_piece / 8) * 8)
            candidates.update(_length_below(T) for T in buckets if T > 32)

        long_enough = [T for T in sorted(candidates) if T >= longest]
        if not self.micro_batch:
            return long_enough
        return [T for T in long_enough if self.micro_batch_rows(T) > 0]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A prompt and some of its completions, which stand behind it in a row."""

    prompt: int  # index of the prompt
    sequences: tuple[int, ...]  # indices of the completions, ascending
    prompt_length: int
    completion_lengths: tuple[int, ...]  # of each of the sequences

    @functools.cached_property
    def size(self) -> int:
        """Tokens of the prompt and of all completions."""
        return self.prompt_length + sum(self.completion_lengths)

    @property
    def seen_pairs(self) -> float:
        """Pairs of a token and a key that it sees.

        A token sees those before it; a token of a completion sees the prompt, too.
        """
        S = self.prompt_length
        return S * S / 2 + sum(n * (S + n / 2) for n in self.completion_lengths)

    @property
    def layout(self) -> tuple[int, ...]:
        """All lengths, which decide who sees what."""
        return (self.prompt_length, *self.completion_lengths)


Row = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces stand in which row."""

    length: int  # T
    rows: int  # R, rows of a mini-batch, those without a piece included
    micro_batch: int  # rows of a forward and backward pass; R is a multiple of it; 0: all R
    mini_batches: tuple[tuple[Row, ...], ...]  # the filled rows of each mini-batch
    picked: int  # M, at least the completion tokens of every row

    @property
    def shape(self) -> RowShape:
        return RowShape(self.length, self.rows, self.picked)

    def in_shape(self, shape: RowShape) -> Plan | None:
        """The plan with further empty rows, in that shape; None where it does not fit."""
        fits = self.rows <= shape.rows and self.picked <= shape.picked
        if self.length != shape.length or not fits:
            return None
        return dataclasses.replace(self, rows=shape.rows, picked=shape.picked)

    def filled_rows(self) -> Iterator[Row]:
        """The filled rows of all mini-batches, in turn."""
        for rows in self.mini_batches:
            yield from rows


def bucket(n: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... (2^i and 1.5 * 2^i) that is >= n.

    Shapes are padded to buckets, so that a run compiles a handful of programs; at most a third of
    a row is padding.

    smallest: where the list of buckets begins, a power of 2.
    """
    size = smallest
    while size < n:
        if size == 1:
            size = 2
        elif _is_power_of_2(size):
            size = size * 3 // 2
        else:
            size = size * 4 // 3
    return size


def _is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def _length_below(size: int) -> int:
    """The length midway between a bucket and the bucket below it: 2^i times 1.25 or 1.75."""
    if _is_power_of_2(size):
        return size * 7 // 8
    return size * 5 // 6


def plan_rows(
    prompt_length_P: Sequence[int],
    length_B: Sequence[int],
    mini_batches: int,
    packing: Packing,
    known: Sequence[RowShape] = (),
) -> Plan:
    """Rows for the groups of completions, the cheapest of several ways.

    The groups, in their order, are divided into `mini_batches` equal parts. All mini-batches get
    the same T, R and M, so that they run one program.

    known: shapes that the run has had. The cheapest of them is taken, unless a new one costs less
        by more than MOST_WASTE.

    Raises ValueError where a sequence is longer than packing.row_tokens.
    """
    plans = _possible_plans(prompt_length_P, length_B, mini_batches, packing, known)
    best = min(plans, key=lambda priced: priced.cost)
    plans_in_known_shapes = []
    for priced in plans:
        for shape in known:
            plan = priced.plan.in_shape(shape)
            if plan is not None:
                plans_in_known_shapes.append(_priced(plan, priced.seen_pairs, packing))
    if plans_in_known_shapes:
        best_known = min(plans_in_known_shapes, key=lambda priced: priced.cost)
        if best_known.cost <= MOST_WASTE * best.cost:
            return best_known.plan
    return _grown(best, packing, known)


class _PricedPlan(NamedTuple):
    """A plan, what it costs, and the pairs of a token and a key that it sees in all its rows."""

    plan: Plan
    cost: float
    seen_pairs: float


def _priced(plan: Plan, seen_pairs: float, packing: Packing) -> _PricedPlan:
    cost = packing.cost(
        rows=plan.rows * len(plan.mini_batches),
        T=plan.length,
        different_rows=_different_rows(plan, packing.shards),
        seen_pairs=seen_pairs,
    )
    return _PricedPlan(plan, cost, seen_pairs)


def _grown(best: _PricedPlan, packing: Packing, known: Sequence[RowShape]) -> Plan:
    """The plan in a new shape that holds those of its length, too, where that costs little.

    So the shapes of a length grow, and a few of them serve all rollouts.
    """
    plan = best.plan
    shape = plan.shape
    for other in known:
        if other.length == shape.length:
            shape = RowShape(
                shape.length, max(shape.rows, other.rows), max(shape.picked, other.picked)
            )
    grown = dataclasses.replace(plan, rows=shape.rows, picked=shape.picked)
    if _priced(grown, best.seen_pairs, packing).cost <= MOST_WASTE * best.cost:
        return grown
    return plan


def _possible_plans(
    prompt_length_P: Sequence[int],
    length_B: Sequence[int],
    mini_batches: int,
    packing: Packing,
    known: Sequence[RowShape],
) -> list[_PricedPlan]:
    """Plans for all ways to share prompts and all lengths of rows that are worth a try."""
    group_size = len(length_B) // len(prompt_length_P)
    plans = []
    longest = 0
    for completions_per_piece in _ways_to_share(group_size):
        pieces_of_minis = _split_into_pieces(
            prompt_length_P, length_B, mini_batches, completions_per_piece
        )
        pieces = [piece for pieces_of_mini in pieces_of_minis for piece in pieces_of_mini]
        longest = max(piece.size for piece in pieces)
        seen_pairs = sum(piece.seen_pairs for piece in pieces)
        lengths = packing.candidate_lengths(longest, completions_per_piece)
        known_lengths = {shape.length for shape in known if shape.length >= longest}
        lengths += sorted(known_lengths.difference(lengths))
        for T in lengths:
            plan = _plan_of_length(pieces_of_minis, T, packing)
            plans.append(_priced(plan, seen_pairs, packing))
    if not plans:
        raise ValueError(
            f"train.row_tokens = {packing.row_tokens}: a sequence has {longest} tokens; "
            "raise it, or set 0"
        )
    return plans


def _ways_to_share(group_size: int) -> list[int]:
    """Completions per piece to try: a group, a half, a quarter, an eighth of it, and one.

    They descend, so that of plans of equal cost the one that shares most comes first.
    """
    parts_of_group = (1, 2, 4, 8, group_size)
    return sorted({math.ceil(group_size / parts) for parts in parts_of_group}, reverse=True)


def _split_into_pieces(
    prompt_length_P: Sequence[int],
    length_B: Sequence[int],
    mini_batches: int,
    completions_per_piece: int,
) -> list[list[Piece]]:
    """The pieces of each mini-batch, whose groups are an equal part of all."""
    P = len(prompt_length_P)
    group_size = len(length_B) // P
    groups_per_mini = P // mini_batches
    pieces_of_minis = []
    for first_prompt in range(0, P, groups_per_mini):
        pieces = []
        for prompt in range(first_prompt, first_prompt + groups_per_mini):
            first_sequence = prompt * group_size
            group_lengths = length_B[first_sequence : first_sequence + group_size]
            pieces += _split_group(
                prompt,
                prompt_length_P[prompt],
                first_sequence,
                group_lengths,
                completions_per_piece,
            )
        pieces_of_minis.append(pieces)
    return pieces_of_minis


def _split_group(
    prompt: int,
    prompt_length: int,
    first_sequence: int,
    length_G: Sequence[int],
    completions_per_piece: int,
) -> list[Piece]:
    """The pieces of a group, each with at most `completions_per_piece` completions.

    The completions are dealt out, the longest first, each to the shortest piece that is not full.
    """
    G = len(length_G)
    num_pieces = math.ceil(G / completions_per_piece)
    members: list[list[int]] = [[] for _ in range(num_pieces)]
    sizes = [prompt_length] * num_pieces
    longest_first = sorted(range(G), key=lambda g: -length_G[g])
    for g in longest_first:
        not_full = [i for i in range(num_pieces) if len(members[i]) < completions_per_piece]
        shortest = min(not_full, key=lambda i: sizes[i])
        members[shortest].append(g)
        sizes[shortest] += length_G[g]
    pieces = []
    for group_members in members:
        ascending = sorted(group_members)
        piece = Piece(
            prompt,
            sequences=tuple(first_sequence + g for g in ascending),
            prompt_length=prompt_length,
            completion_lengths=tuple(length_G[g] for g in ascending),
        )
        pieces.append(piece)
    return pieces


def _plan_of_length(pieces_of_minis: Sequence[Sequence[Piece]], T: int, packing: Packing) -> Plan:
    """The plan with rows of T tokens, which every mini-batch has equally many of."""
    mini_batches = tuple(_fill_rows(pieces, T) for pieces in pieces_of_minis)
    micro_batch = packing.micro_batch_rows(T)
    rows_at_once = micro_batch or packing.shards
    most_rows = max(len(rows) for rows in mini_batches)
    rows = rows_at_once * bucket(math.ceil(most_rows / rows_at_once), smallest=1)
    most_completion_tokens = 0
    for rows_of_mini in mini_batches:
        for row in rows_of_mini:
            completion_tokens = sum(sum(piece.completion_lengths) for piece in row)
            most_completion_tokens = max(most_completion_tokens, completion_tokens)
    picked = min(bucket(most_completion_tokens, FEWEST_PICKED), T)
    return Plan(T, rows, micro_batch, mini_batches, picked)


def _fill_rows(pieces: Sequence[Piece], T: int) -> tuple[Row, ...]:
    """Rows of at most T tokens, by best fit: each piece, the longest first, goes where it leaves
    the least room."""
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        i = bisect.bisect_left(room, (piece.size, -1))
        if i < len(room):
            tokens_left, row = room.pop(i)
        else:
            tokens_left = T
            row = len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(room, (tokens_left - piece.size, row))
    return tuple(tuple(row) for row in rows)


def _different_rows(plan: Plan, shards: int) -> int:
    """At most so many rows of a micro-batch on one device differ in who sees what."""
    rows_on_device = (plan.micro_batch or plan.rows) // shards
    layouts = {tuple(piece.layout for piece in row) for row in plan.filled_rows()}
    return min(rows_on_device, len(layouts))


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows of tokens, and where each token comes from.

    Completion token t of row b is number offset_BT[b, t] of sequence sequence_BT[b, t].
    """

    # The fields of `batch.Batch` that follow from the packing: tokens, positions, segment and
    # prefix ids, mask, picked and source columns.
    arrays: dict[str, np.ndarray]
    micro_batch: int  # rows of a forward and backward pass; 0: all of a mini-batch
    sequence_BT: np.ndarray  # int32; of a prompt one of the sequences it begins; -1 on padding
    offset_BT: np.ndarray  # int32, 0 at the first completion token

    @property
    def mask_BT(self) -> np.ndarray:
        return self.arrays["mask_BT"]

    def row_shape(self, mini_batches: int) -> RowShape:
        """The shape of each of so many mini-batches."""
        num_rows, T = self.mask_BT.shape
        return RowShape(T, num_rows // mini_batches, self.arrays["picked_BM"].shape[1])

    def spread(self, value_N: np.ndarray) -> np.ndarray:
        """A value per sequence -> BT, on each of its completion tokens; 0 elsewhere."""
        zero = np.zeros((), value_N.dtype)
        return np.where(self.mask_BT, value_N[self.sequence_BT], zero)

    def place(self, value_NC: np.ndarray) -> np.ndarray:
        """A value per completion token -> BT; 0 elsewhere."""
        zero = np.zeros((), value_NC.dtype)
        return np.where(self.mask_BT, value_NC[self.sequence_BT, self.offset_BT], zero)

    def place_slots(
        self, value_NT: np.ndarray, S: int, prompt_length_N: np.ndarray, fill: int
    ) -> np.ndarray:
        """A value per slot of the sampler -> BT..., `fill` on padding.

        value_NT: for each sequence S left-padded prompt slots, and then those of the completion;
            it may have further dims. A prompt that several completions share takes the values of
            one of them.
        """
        slot_BT = S - prompt_length_N[self.sequence_BT] + self.arrays["positions_BT"]
        is_token_BT = self.sequence_BT >= 0
        slot_BT = np.where(is_token_BT, slot_BT, 0)
        placed = value_NT[self.sequence_BT, slot_BT]
        placed[~is_token_BT] = fill
        return placed
