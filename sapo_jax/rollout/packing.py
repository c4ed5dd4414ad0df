"""Packing: which completions share a row, and how long the rows are. Plain arithmetic on lengths.

A piece is a prompt with one or more of its completions, `p c1 c2 ...`; the prompt's tokens are computed once for all
of them (attention lets each completion see the prompt and itself, see `kernels.attention`). A row holds one or more
pieces. Sharing saves prompt tokens but makes rows longer, which costs where attention compares what nobody sees:
`plan_rows` takes the cheapest of several ways. The plan is a function of the lengths alone, so a resumed run packs, and
rounds, as the uninterrupted one.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

LONGER = 3  # up to which bucket row lengths are tried for each way of sharing
FEWEST_PICKED = 8  # smallest bucket of a row's completion tokens, M: answers of 2, 3 and 4 tokens are one program


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass over packed rows, in any unit."""

    body: float  # of a token
    key: float  # of a token and a key that it is compared with
    skips: bool  # only what a token sees is compared (blocked_attention); or all of its row (splash attention, on TPU)

    def __call__(self, plan: Plan, prompt_length_P: Sequence[int], length_B: Sequence[int]) -> float:
        rows = plan.rows * len(plan.minis)
        if not self.skips:
            return rows * plan.length * (self.body + self.key * plan.length)
        seen = 0.0
        for piece in (piece for mini in plan.minis for row in mini for piece in row):
            S = prompt_length_P[piece.prompt]
            seen += S * S / 2 + sum(length_B[b] * (S + length_B[b] / 2) for b in piece.sequences)
        return rows * plan.length * self.body + seen * self.key


@dataclasses.dataclass(frozen=True)
class Piece:
    prompt: int
    sequences: tuple[int, ...]
    size: int  # tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    length: int  # T
    rows: int  # R, rows of a mini-batch, those without a piece included
    micro_batch: int  # rows of a forward and backward pass; R is a multiple of it
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
    prompt_length_P: Sequence[int],
    length_B: Sequence[int],
    mini_batches: int,
    cost: Cost,
    *,
    new_tokens: int,
    shards: int = 1,
    micro_batch: int = 0,
    row_tokens: int = 0,
) -> Plan:
    """Rows for `mini_batches` equal shares of the groups, in their order.

    new_tokens: C, the most that a completion may have. shards: R is a multiple of it, the devices that rows are split
    over. micro_batch: so many rows of T <= S + C tokens (S: the bucket of the longest prompt), or of row_tokens, make a
    micro-batch, a multiple of `shards`; of longer rows as many fewer, so that none has more tokens. 0: R rows.
    row_tokens: T, if it is not to be chosen. All mini-batches get the same T and R: they run one program.
    Raises ValueError where a sequence is longer than row_tokens.
    """
    P, B = len(prompt_length_P), len(length_B)
    per_mini, G = P // mini_batches, B // P
    groups = [(p, prompt_length_P[p], range(p * G, (p + 1) * G)) for p in range(P)]
    S, plans = bucket(max(prompt_length_P)), []
    full = row_tokens or S + new_tokens
    for share in sorted({-(-G // parts) for parts in (1, 2, 4, 8, G)}, reverse=True):  # at a tie, share
        pieces = [[piece for group in groups[i : i + per_mini] for piece in _pieces(*group, length_B, share)]
                  for i in range(0, P, per_mini)]  # fmt: skip
        longest = max(piece.size for mini in pieces for piece in mini)
        for T in [row_tokens] if row_tokens else _lengths(longest, S + share * new_tokens, cost.skips):
            micro = micro_batch if T <= full else micro_batch * full // (shards * T) * shards
            if T >= longest and (micro or not micro_batch):
                minis = tuple(_fill(mini, T) for mini in pieces)
                multiple = micro or shards
                R = multiple * bucket(-(-max(map(len, minis)) // multiple), 1)
                plans.append(Plan(T, R, micro, minis))
    if not plans:
        raise ValueError(f"train.row_tokens = {row_tokens}: a sequence has {longest} tokens; raise it, or set 0")
    return min(plans, key=lambda plan: cost(plan, prompt_length_P, length_B))


def _lengths(longest: int, full: int, fine: bool) -> list[int]:
    """Row lengths to try for pieces of at most `longest` tokens: the next buckets. `fine`: also those between them
    (2^i times 1.25 and 1.75), and that of a piece whose completions are as long as they may be."""
    lengths = [bucket(longest)]
    while len(lengths) < LONGER:
        lengths.append(bucket(lengths[-1] + 1))
    if not fine:
        return lengths
    between = [T * 5 // 6 if T & (T - 1) else T * 7 // 8 for T in lengths if T > 16]
    return [T for T in sorted({*lengths, *between, -(-full // 8) * 8}) if T >= longest]


def _pieces(p: int, n_prompt: int, sequences: range, length_B: Sequence[int], share: int) -> list[Piece]:
    """The group dealt into pieces of at most `share` completions: the longest first, each to the shortest piece."""
    parts: list[list[int]] = [[] for _ in range(-(-len(sequences) // share))]
    sizes = [n_prompt] * len(parts)
    for b in sorted(sequences, key=lambda b: -length_B[b]):
        i = min((i for i, part in enumerate(parts) if len(part) < share), key=lambda i: sizes[i])
        parts[i].append(b)
        sizes[i] += int(length_B[b])
    return [Piece(p, tuple(sorted(part)), size) for part, size in zip(parts, sizes, strict=True)]


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
class Rows:
    """Token rows and where each token comes from: completion token t of row b is number offset_BT of sequence_BT."""

    arrays: dict[str, np.ndarray]  # fields of types.Batch: tokens, positions, segments, prefixes, mask, picked, source
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
        return np.where(self.mask_BT, value_NC[self.sequence_BT, self.offset_BT], np.zeros((), value_NC.dtype))

    def place_slots(self, value_NT: np.ndarray, S: int, prompt_length_N: np.ndarray, fill) -> np.ndarray:
        """A value (of any further dims) per slot of the sampler, S left-padded prompt slots and then the completion's,
        -> BT...; a prompt that completions share has its own once. `fill` on padding."""
        slot_BT = S - prompt_length_N[self.sequence_BT] + self.arrays["positions_BT"]
        real_BT = self.sequence_BT >= 0
        placed = value_NT[self.sequence_BT, np.where(real_BT, slot_BT, 0)]
        placed[~real_BT] = fill
        return placed
