"""Packing: which completions share a row, and how long the rows are. Plain arithmetic on lengths.

A piece is a prompt with one or more of its completions, `p c1 c2 ...`; the prompt's tokens are computed once for all
of them (attention lets each completion see the prompt and itself, see `kernels.attention`). A row holds one or more
pieces. Sharing saves prompt tokens but makes rows longer, hence attention dearer: `plan_rows` takes the cheapest of
several ways. The plan is a function of the lengths alone, so a resumed run packs, and rounds, as the uninterrupted one.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

LONGER = 3  # how many row lengths are tried for each way of sharing
FEWEST_PICKED = 8  # smallest bucket of a row's completion tokens, M: answers of 2, 3 and 4 tokens are one program


@dataclasses.dataclass(frozen=True)
class Piece:
    prompt: int
    sequences: tuple[int, ...]
    size: int  # tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    length: int  # T
    rows: int  # R, rows of a mini-batch, those without a piece included
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
    row_cost: Callable[[int], float],
    *,
    multiple: int = 1,
    row_tokens: int = 0,
) -> Plan:
    """Rows for `mini_batches` equal shares of the groups, in their order.

    row_cost: the cost of a row of T tokens, in any unit. multiple: R is a multiple of it (a micro-batch's rows, or
    devices). row_tokens: T, if it is not to be chosen. All mini-batches get the same T and R: they run one program.
    Raises ValueError where a sequence is longer than row_tokens.
    """
    P, B = len(prompt_length_P), len(length_B)
    per_mini, G = P // mini_batches, B // P
    groups = [(p, prompt_length_P[p], range(p * G, (p + 1) * G)) for p in range(P)]
    plans = []
    for share in sorted({-(-G // parts) for parts in (1, 2, 4, 8, G)}, reverse=True):  # at a tie, share
        pieces = [[piece for group in groups[i : i + per_mini] for piece in _pieces(*group, length_B, share)]
                  for i in range(0, P, per_mini)]  # fmt: skip
        longest = max(piece.size for mini in pieces for piece in mini)
        for T in [row_tokens] if row_tokens else _lengths(longest):
            if longest <= T:
                minis = tuple(_fill(mini, T) for mini in pieces)
                R = multiple * bucket(-(-max(map(len, minis)) // multiple), 1)
                plans.append(Plan(T, R, minis))
    if not plans:
        raise ValueError(f"train.row_tokens = {row_tokens}: a sequence has {longest} tokens; raise it, or set 0")
    return min(plans, key=lambda plan: plan.rows * row_cost(plan.length))


def _lengths(longest: int) -> list[int]:
    lengths = [bucket(longest)]
    while len(lengths) < LONGER:
        lengths.append(bucket(lengths[-1] + 1))
    return lengths


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
