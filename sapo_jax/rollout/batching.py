"""From token lists to arrays of static shape: left-padded prompts, rows of sequences, packed rows of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo_jax.batch import Rollout
from sapo_jax.distributed.processes import SINGLE_PROCESS, ProcessShard, all_gather
from sapo_jax.rollout.packing import FEWEST_PICKED, PackedBatch, Packing, Piece, bucket, plan_rows
from sapo_jax.types import Prompt


def left_padded(prompts: Sequence[Prompt], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt tokens PS (int32, right-aligned) and their lengths P. S is a bucket, the same in all processes."""
    S = max(all_gather(bucket(max(len(p.ids) for p in prompts))))
    tokens_PS = np.full((len(prompts), S), pad_id, np.int32)
    for row, prompt in zip(tokens_PS, prompts, strict=True):
        row[S - len(prompt.ids) :] = prompt.ids
    return tokens_PS, np.array([len(p.ids) for p in prompts], np.int32)


class _Sheet:
    """Rows being written. Segments of a row are numbered from 1."""

    def __init__(self, rows: int, length: int, pad_id: int):
        zeros = lambda: np.zeros((rows, length), np.int32)
        self.tokens, self.positions, self.segments, self.prefixes, self.offset = (
            zeros() for _ in range(5)
        )
        self.tokens[:] = pad_id
        self.sequence, self.source = (
            zeros() - 1,
            zeros() - 1,
        )  # source: where the token before this one stands
        self.used = [0] * rows
        self.last_segment = [0] * rows

    def write(
        self, row: int, ids: Sequence[int], *, first: int, prefix: int, before: int, sequence: int
    ) -> int:
        """Append a segment; returns its number.

        first: position of its first token; prefix: the prompt's segment, 0 for a prompt; before: the column of the
        token before a completion's first one; sequence: which one it is part of, of a prompt's any.
        """
        start, n = self.used[row], len(ids)
        here = slice(start, start + n)
        self.last_segment[row] += 1
        segment = self.last_segment[row]
        self.tokens[row, here] = ids
        self.positions[row, here] = np.arange(first, first + n)
        self.segments[row, here], self.prefixes[row, here] = segment, prefix or segment
        self.sequence[row, here] = sequence
        if prefix:
            self.offset[row, here] = np.arange(n)
            self.source[row, here] = [before, *range(start, start + n - 1)]
        self.used[row] += n
        return segment

    def rows(self, most: int = 0, micro_batch: int = 0) -> PackedBatch:
        """most: completion tokens of a row, if other rows than these may hold more."""
        mask_BT = self.source >= 0
        T, M = mask_BT.shape[1], bucket(max(most, int(mask_BT.sum(axis=1).max())), FEWEST_PICKED)
        picked_BM = np.full((len(mask_BT), min(M, T)), T, np.int32)
        source_BM = np.zeros_like(picked_BM)
        for b, mask_T in enumerate(mask_BT):
            found = np.flatnonzero(mask_T)
            picked_BM[b, : len(found)], source_BM[b, : len(found)] = found, self.source[b, found]
        arrays = {
            "tokens_BT": self.tokens, "positions_BT": self.positions, "segment_ids_BT": self.segments,
            "prefix_ids_BT": self.prefixes, "mask_BT": mask_BT, "picked_BM": picked_BM, "source_BM": source_BM,
        }  # fmt: skip
        return PackedBatch(arrays, micro_batch, self.sequence, self.offset)


def pad_sequences(
    sequences: Sequence[tuple[Sequence[int], int]], pad_id: int
) -> dict[str, np.ndarray]:
    """Sequences (ids, number of prompt tokens >= 1) -> right-padded rows, one sequence each; T is a bucket.

    Keys are the field names of types.Batch; mask_BT is True after the prompt.
    """
    sheet = _Sheet(len(sequences), bucket(max(len(ids) for ids, _ in sequences)), pad_id)
    for b, (ids, n_prompt) in enumerate(sequences):
        prompt = sheet.write(b, ids[:n_prompt], first=0, prefix=0, before=-1, sequence=b)
        if len(ids) > n_prompt:
            sheet.write(
                b, ids[n_prompt:], first=n_prompt, prefix=prompt, before=n_prompt - 1, sequence=b
            )
    return sheet.rows().arrays


def pack_rollout(
    prompts: Sequence[Prompt],
    rollout: Rollout,
    pad_id: int,
    mini_batches: int,
    packing: Packing,
    *,
    share: ProcessShard = SINGLE_PROCESS,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
) -> PackedBatch:
    """A rollout as packed rows (see `packing.plan_rows`), completion ids exactly as sampled.

    mini_batches * R rows, those of a mini-batch together. Of several teams of processes each has its own prompts and
    rollout, and `lengths` of the prompts and the completions of all of them: so all make the same plan, and take their
    own rows of it. R and the packing's shards and micro_batch are then those of a team.
    """
    prompt_length_P, length_B = lengths or (
        [len(prompt.ids) for prompt in prompts],
        rollout.length_B,
    )
    length_B, G = np.asarray(length_B).tolist(), len(length_B) // len(prompt_length_P)
    teams = share.teams
    plan = plan_rows(prompt_length_P, length_B, mini_batches * teams, packing)
    own = {
        position: p
        for p, position in enumerate(share.local_indices(len(prompt_length_P), mini_batches))
    }
    sheet = _Sheet(mini_batches * plan.rows, plan.length, pad_id)
    for row, pieces in _numbered(plan.minis[share.team :: teams], plan.rows):
        for piece in pieces:
            p = own[piece.prompt]
            sequences = [p * G + b % G for b in piece.sequences]
            ids = prompts[p].ids
            prompt = sheet.write(row, ids, first=0, prefix=0, before=-1, sequence=sequences[0])
            last = sheet.used[row] - 1
            for b in sequences:
                completion = rollout.tokens_BC[b, : rollout.length_B[b]]
                sheet.write(row, completion, first=len(ids), prefix=prompt, before=last, sequence=b)
    filled = (row for mini in plan.minis for row in mini)
    most = max(sum(length_B[b] for piece in row for b in piece.sequences) for row in filled)
    return sheet.rows(most, plan.micro_batch)


def _numbered(minis: Sequence[tuple[tuple[Piece, ...], ...]], rows: int):
    for i, mini in enumerate(minis):
        yield from enumerate(mini, start=i * rows)
