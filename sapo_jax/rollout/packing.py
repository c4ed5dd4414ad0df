"""Packing: which completions share a row, and how long the rows are. Plain arithmetic on lengths.

A piece is a prompt with one or more of its completions, `p c1 c2 ...`; the prompt's tokens are computed once for all
of them (attention lets each completion see the prompt and itself, see `kernels.attention`). A row holds one or more
pieces. Sharing saves prompt tokens but makes rows longer, which costs where attention compares what nobody sees:
`plan_rows` takes the cheapest of several ways. The plan is a function of the lengths and of the run's `Packing`, so a
resumed run packs, and rounds, as the uninterrupted one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

LONGER = 3  # up to which bucket row lengths are tried for each way of sharing
FEWEST_PICKED = 8  # smallest bucket of a row's completion tokens, M: answers of 2, 3 and 4 tokens are one program


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a run packs. Costs are FLOPs of a forward pass, in any unit; sizes are tokens."""

    body: float  # cost of a token
    key: float  # of a token and a key that it is compared with
    skips: bool  # blocks of keys that no row of a micro-batch sees are not compared (blocked_attention; not on TPU)
    max_prompt: int  # S, the longest that may come
    max_new: int  # C, of a completion
    shards: int = 1  # devices that rows are split over
    micro_batch: int = (
        0  # rows of S + C tokens, or of row_tokens; a multiple of shards; 0: a mini-batch is one
    )
    row_tokens: int = 0  # T; 0: the cheapest

    def cost(self, rows: int, T: int, together: int, seen: float) -> float:
        """Of so many rows of T; seen: pairs of a token and a key that it sees.

        Where blocks are skipped, a token is compared with what any row of its micro-batch sees there: at worst the sum
        of what each sees, of which `together` differ, but never with later tokens.
        """
        tokens = rows * T
        compared = min(T / 2, together * seen / tokens) if self.skips else T
        return tokens * (self.body + compared * self.key)

    def rows_at_a_time(self, T: int) -> int:
        """Rows of T tokens in a micro-batch: of longer rows fewer, so that it never has more tokens; 0 if not even one
        for each device."""
        full = self.row_tokens or bucket(self.max_prompt + self.max_new)
        return (
            self.micro_batch
            if T <= full
            else self.micro_batch * full // (self.shards * T) * self.shards
        )

    def lengths(self, longest: int, share: int) -> list[int]:
        """Row lengths to try for pieces of at most `longest` tokens: the next buckets. Where what nobody sees is
        skipped, so that a longer row costs little more, also those between them (2^i times 1.25 and 1.75), and that of
        a piece of `share` completions, all as long as they may be."""
        if self.row_tokens:
            return [self.row_tokens] * (longest <= self.row_tokens)
        lengths = [bucket(longest)]
        while len(lengths) < LONGER:
            lengths.append(bucket(lengths[-1] + 1))
        if self.skips:  # multiples of 8, too
            full = -(-(self.max_prompt + share * self.max_new) // 8) * 8
            lengths += [
                full,
                *(T * 5 // 6 if T & (T - 1) else T * 7 // 8 for T in lengths if T > 32),
            ]
        fit = [T for T in sorted(set(lengths)) if T >= longest]
        return [T for T in fit if self.rows_at_a_time(T) or not self.micro_batch]


@dataclasses.dataclass(frozen=True)
class Piece:
    prompt: int
    sequences: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of the prompt and of each completion

    @functools.cached_property
    def size(self) -> int:
        return sum(self.lengths)

    @property
    def seen(self) -> float:
        """Pairs of a token and a key that it sees: those before it, of a completion's the prompt's, too."""
        S, *completions = self.lengths
        return S * S / 2 + sum(n * (S + n / 2) for n in completions)


@dataclasses.dataclass(frozen=True)
class Plan:
    length: int  # T
    rows: int  # R, rows of a mini-batch, those without a piece included
    micro_batch: int  # rows of a forward and backward pass, R is a multiple of it; 0: all R
    minis: tuple[tuple[tuple[Piece, ...], ...], ...]  # of each mini-batch the filled rows


def bucket(n: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... (2^i and 1.5 * 2^i) that is >= n; `smallest` is a power of 2.

    Shapes are padded to buckets, so that a run compiles a handful of programs; at most a third of a row is padding.
    """
    size = smallest
    while size < n:
        size = size * 2 if size == 1 else size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def plan_rows(
    prompt_length_P: Sequence[int], length_B: Sequence[int], mini_batches: int, packing: Packing
) -> Plan:
    """Rows for `mini_batches` equal shares of the groups, in their order: the cheapest of several ways.

    All mini-batches get the same T and R: they run one program. Raises ValueError where a sequence is longer than
    packing.row_tokens.
    """
    P, B = len(prompt_length_P), len(length_B)
    per_mini, G = P // mini_batches, B // P
    groups = [(p, prompt_length_P[p], range(p * G, (p + 1) * G)) for p in range(P)]
    plans = []
    for share in sorted(
        {-(-G // parts) for parts in (1, 2, 4, 8, G)}, reverse=True
    ):  # at a tie, share
        pieces = [[piece for group in groups[i : i + per_mini] for piece in _pieces(*group, length_B, share)]
                  for i in range(0, P, per_mini)]  # fmt: skip
        longest = max(piece.size for mini in pieces for piece in mini)
        seen = sum(piece.seen for mini in pieces for piece in mini)
        for T in packing.lengths(longest, share):
            minis, micro = tuple(_fill(mini, T) for mini in pieces), packing.rows_at_a_time(T)
            multiple = micro or packing.shards
            R = multiple * bucket(-(-max(map(len, minis)) // multiple), 1)
            layouts = {tuple(piece.lengths for piece in row) for mini in minis for row in mini}
            together = min((micro or R) // packing.shards, len(layouts))
            plans.append(
                (packing.cost(R * mini_batches, T, together, seen), Plan(T, R, micro, minis))
            )
    if not plans:
        raise ValueError(
            f"train.row_tokens = {packing.row_tokens}: a sequence has {longest} tokens; raise it, or set 0"
        )
    return min(plans, key=lambda plan: plan[0])[1]


def _pieces(
    p: int, n_prompt: int, sequences: range, length_B: Sequence[int], share: int
) -> list[Piece]:
    """The group dealt into pieces of at most `share` completions: the longest first, each to the shortest piece."""
    parts: list[list[int]] = [[] for _ in range(-(-len(sequences) // share))]
    sizes = [n_prompt] * len(parts)
    for b in sorted(sequences, key=lambda b: -length_B[b]):
        i = min((i for i, part in enumerate(parts) if len(part) < share), key=lambda i: sizes[i])
        parts[i].append(b)
        sizes[i] += int(length_B[b])
    return [
        Piece(p, tuple(sorted(part)), (n_prompt, *(int(length_B[b]) for b in sorted(part))))
        for part in parts
    ]


def _fill(pieces: Sequence[Piece], T: int) -> tuple[tuple[Piece, ...], ...]:
    """Best fit, longest first: each piece goes where it leaves the least room."""
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        i = bisect.bisect_left(room, (piece.size, -1))
        if i < len(room):
            left, row = room.pop(i)
        else:
            left, row = T, len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(room, (left - piece.size, row))
    return tuple(tuple(row) for row in rows)


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Token rows and where each token comes from: completion token t of row b is number offset_BT of sequence_BT."""

    arrays: dict[
        str, np.ndarray
    ]  # fields of types.Batch: tokens, positions, segments, prefixes, mask, picked, source
    micro_batch: int  # rows of a forward and backward pass; 0: all of a mini-batch
    sequence_BT: np.ndarray  # int32; of a prompt one of the sequences that it begins; -1 on padding
    offset_BT: np.ndarray  # int32, from 0 at the first completion token

    @property
    def mask_BT(self) -> np.ndarray:
        return self.arrays["mask_BT"]

    def spread(self, value_N: np.ndarray) -> np.ndarray:
        """A value per sequence -> BT, on each of its completion tokens; 0 elsewhere."""
        return np.where(self.mask_BT, value_N[self.sequence_BT], np.zeros((), value_N.dtype))

    def place(self, value_NC: np.ndarray) -> np.ndarray:
        """A value per completion token -> BT; 0 elsewhere."""
        return np.where(
            self.mask_BT, value_NC[self.sequence_BT, self.offset_BT], np.zeros((), value_NC.dtype)
        )

    def place_slots(
        self, value_NT: np.ndarray, S: int, prompt_length_N: np.ndarray, fill
    ) -> np.ndarray:
        """A value (of any further dims) per slot of the sampler, S left-padded prompt slots and then the completion's,
        -> BT...; a prompt that completions share has its own once. `fill` on padding."""
        slot_BT = S - prompt_length_N[self.sequence_BT] + self.arrays["positions_BT"]
        real_BT = self.sequence_BT >= 0
        placed = value_NT[self.sequence_BT, np.where(real_BT, slot_BT, 0)]
        placed[~real_BT] = fill
        return placed
