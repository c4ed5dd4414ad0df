"""Between lists of different lengths and arrays of static shape: buckets, left-padded prompts, training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo_jax.types import Prompt, Rollout


def bucket(n: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... (2^i and 1.5 * 2^i) that is >= n.

    Shapes are padded to buckets, so that a run compiles a handful of programs; at most a third of a row is padding.
    """
    size = smallest
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def left_padded(prompts: Sequence[Prompt], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt tokens PS (int32, right-aligned) and their lengths P. S is a bucket."""
    S = bucket(max(len(p.ids) for p in prompts))
    tokens_PS = np.full((len(prompts), S), pad_id, np.int32)
    for row, prompt in zip(tokens_PS, prompts, strict=True):
        row[S - len(prompt.ids) :] = prompt.ids
    return tokens_PS, np.array([len(p.ids) for p in prompts], np.int32)


def token_rows(sequences: Sequence[tuple[Sequence[int], int]], pad_id: int) -> dict[str, np.ndarray]:
    """Sequences (ids, number of prompt tokens) -> right-padded rows: tokens, positions, segment ids, completion mask.

    One sequence per row; T is a bucket. Keys are the field names of types.Batch.
    """
    T = bucket(max(len(ids) for ids, _ in sequences))
    B = len(sequences)
    tokens_BT = np.full((B, T), pad_id, np.int32)
    length_B1 = np.array([[len(ids)] for ids, _ in sequences])
    prompt_B1 = np.array([[n_prompt] for _, n_prompt in sequences])
    for row, (ids, _) in zip(tokens_BT, sequences, strict=True):
        row[: len(ids)] = ids
    t = np.arange(T)[None]
    real_BT = t < length_B1
    return {
        "tokens_BT": tokens_BT,
        "positions_BT": np.where(real_BT, t, 0).astype(np.int32),
        "segment_ids_BT": real_BT.astype(np.int32),
        "mask_BT": real_BT & (t >= prompt_B1),
    }


def rollout_rows(prompts: Sequence[Prompt], rollout: Rollout, pad_id: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of a rollout (prompt + the completion ids exactly as sampled), and the sampler's log-probs on them, BT."""
    G = len(rollout.length_B) // len(prompts)
    sequences = []
    for b, (completion, length) in enumerate(zip(rollout.tokens_BC, rollout.length_B, strict=True)):
        ids = prompts[b // G].ids
        sequences.append(((*ids, *completion[:length].tolist()), len(ids)))
    rows = token_rows(sequences, pad_id)
    sampler_logp_BT = np.zeros(rows["tokens_BT"].shape, np.float32)
    n_C = np.arange(rollout.tokens_BC.shape[1])[None] < np.asarray(rollout.length_B)[:, None]
    sampler_logp_BT[rows["mask_BT"]] = np.asarray(rollout.logp_BC)[n_C]
    return rows, sampler_logp_BT
