"""From lists of tokens to arrays of static shape.

`left_padded` makes the sampler's prompts, `pad_sequences` rows of one sequence each, and
`pack_rollout` packed rows of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sapo_jax.batch import Rollout
from sapo_jax.distributed.processes import SINGLE_PROCESS, ProcessShard, all_gather
from sapo_jax.rollout.packing import (
    FEWEST_PICKED,
    PackedBatch,
    Packing,
    RowShape,
    bucket,
    plan_rows,
)
from sapo_jax.types import Prompt

TokenIds = Sequence[int] | np.ndarray


def left_padded(prompts: Sequence[Prompt], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt tokens PS (right-aligned) and their lengths P, both int32.

    S is a bucket, the same in all processes. To agree on it is a collective: every process must
    call this function.
    """
    length_P = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    S = max(all_gather(bucket(int(length_P.max()))))
    tokens_PS = np.full((len(prompts), S), pad_id, np.int32)
    for tokens_S, prompt in zip(tokens_PS, prompts, strict=True):
        tokens_S[S - len(prompt.ids) :] = prompt.ids
    return tokens_PS, length_P


class _WrittenPrompt(NamedTuple):
    """A prompt in its row, which completions can follow."""

    row: int
    segment: int  # its number in the row
    length: int
    last_column: int


class _RowWriter:
    """Writes prompts and completions behind each other into rows of T tokens.

    Each prompt and each completion is a segment; the segments of a row are numbered from 1.
    """

    def __init__(self, num_rows: int, T: int, pad_id: int):
        shape = (num_rows, T)
        self.tokens_BT = np.full(shape, pad_id, np.int32)
        self.positions_BT = np.zeros(shape, np.int32)
        self.segment_ids_BT = np.zeros(shape, np.int32)
        self.prefix_ids_BT = np.zeros(shape, np.int32)
        self.offset_BT = np.zeros(shape, np.int32)
        self.sequence_BT = np.full(shape, -1, np.int32)
        # On completion tokens the column of the token before; -1 elsewhere.
        self.source_BT = np.full(shape, -1, np.int32)
        self.tokens_in_row = [0] * num_rows
        self.segments_in_row = [0] * num_rows

    def write_prompt(self, row: int, ids: TokenIds, sequence: int) -> _WrittenPrompt:
        """Append a prompt; `sequence` is any of those that it begins."""
        segment, columns = self._append(row, ids, first_position=0, sequence=sequence)
        self.prefix_ids_BT[row, columns] = segment
        return _WrittenPrompt(row, segment, len(ids), columns.stop - 1)

    def write_completion(self, prompt: _WrittenPrompt, ids: TokenIds, sequence: int) -> None:
        """Append a completion of a prompt in the same row."""
        row = prompt.row
        _, columns = self._append(row, ids, first_position=prompt.length, sequence=sequence)
        self.prefix_ids_BT[row, columns] = prompt.segment
        self.offset_BT[row, columns] = np.arange(len(ids))
        columns_before = [prompt.last_column, *range(columns.start, columns.stop - 1)]
        self.source_BT[row, columns] = columns_before

    def _append(
        self, row: int, ids: TokenIds, first_position: int, sequence: int
    ) -> tuple[int, slice]:
        """Append a segment. Returns its number and its columns."""
        start = self.tokens_in_row[row]
        columns = slice(start, start + len(ids))
        self.tokens_in_row[row] += len(ids)
        self.segments_in_row[row] += 1
        segment = self.segments_in_row[row]
        self.tokens_BT[row, columns] = ids
        self.positions_BT[row, columns] = np.arange(first_position, first_position + len(ids))
        self.segment_ids_BT[row, columns] = segment
        self.sequence_BT[row, columns] = sequence
        return segment, columns

    def packed_batch(self, picked: int = 0, micro_batch: int = 0) -> PackedBatch:
        """What has been written.

        picked: M; 0: what these rows need.
        """
        mask_BT = self.source_BT >= 0
        B, T = mask_BT.shape
        M = picked
        if M == 0:
            M = min(bucket(int(mask_BT.sum(axis=1).max()), FEWEST_PICKED), T)
        picked_BM = np.full((B, M), T, np.int32)
        source_BM = np.zeros((B, M), np.int32)
        for b in range(B):
            columns = np.flatnonzero(mask_BT[b])
            picked_BM[b, : len(columns)] = columns
            source_BM[b, : len(columns)] = self.source_BT[b, columns]
        arrays = {
            "tokens_BT": self.tokens_BT,
            "positions_BT": self.positions_BT,
            "segment_ids_BT": self.segment_ids_BT,
            "prefix_ids_BT": self.prefix_ids_BT,
            "mask_BT": mask_BT,
            "picked_BM": picked_BM,
            "source_BM": source_BM,
        }
        return PackedBatch(arrays, micro_batch, self.sequence_BT, self.offset_BT)


def pad_sequences(sequences: Sequence[tuple[TokenIds, int]], pad_id: int) -> dict[str, np.ndarray]:
    """Sequences (ids, number of prompt tokens >= 1) -> right-padded rows, one sequence each.

    T is a bucket. The keys are field names of `batch.Batch`; mask_BT is True after the prompt.
    """
    T = bucket(max(len(ids) for ids, _ in sequences))
    writer = _RowWriter(len(sequences), T, pad_id)
    for b, (ids, prompt_length) in enumerate(sequences):
        prompt = writer.write_prompt(b, ids[:prompt_length], sequence=b)
        completion = ids[prompt_length:]
        if len(completion) > 0:
            writer.write_completion(prompt, completion, sequence=b)
    return writer.packed_batch().arrays


def pack_rollout(
    prompts: Sequence[Prompt],
    rollout: Rollout,
    pad_id: int,
    mini_batches: int,
    packing: Packing,
    *,
    shard: ProcessShard = SINGLE_PROCESS,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    known: Sequence[RowShape] = (),
) -> PackedBatch:
    """A rollout as packed rows (see `packing.plan_rows`), completion ids exactly as sampled.

    There are mini_batches * R rows, those of a mini-batch together.

    shard, lengths: where there are several teams of processes, each has its own prompts and
        rollout, and gives the `lengths` of the prompts P and the completions B of all teams. So
        all make the same plan, and each takes its own rows of it. R and the packing's shards and
        micro_batch are then those of a team.
    known: shapes of rows that the run has had (see `packing.plan_rows`).
    """
    if lengths is None:
        prompt_length_P = [len(prompt.ids) for prompt in prompts]
        length_B = np.asarray(rollout.length_B).tolist()
    else:
        prompt_length_P = lengths[0]
        length_B = np.asarray(lengths[1]).tolist()
    P = len(prompt_length_P)
    G = len(length_B) // P

    # A mini-batch of the run is one mini-batch of the plan for each team.
    plan = plan_rows(prompt_length_P, length_B, mini_batches * shard.teams, packing, known)
    planned_for_team = plan.mini_batches[shard.team :: shard.teams]
    local_indices = shard.local_indices(P, mini_batches)
    local_prompt = {prompt: p for p, prompt in enumerate(local_indices)}

    writer = _RowWriter(mini_batches * plan.rows, plan.length, pad_id)
    for i, rows_of_mini in enumerate(planned_for_team):
        for row, pieces in enumerate(rows_of_mini, start=i * plan.rows):
            for piece in pieces:
                p = local_prompt[piece.prompt]
                local_sequences = [p * G + sequence % G for sequence in piece.sequences]
                prompt = writer.write_prompt(row, prompts[p].ids, local_sequences[0])
                for b in local_sequences:
                    completion = np.asarray(rollout.tokens_BC[b, : rollout.length_B[b]])
                    writer.write_completion(prompt, completion, b)

    return writer.packed_batch(plan.picked, plan.micro_batch)
