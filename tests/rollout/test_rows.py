"""Buckets, left-padded prompts, and training rows."""

from __future__ import annotations

import numpy as np
import pytest

from sapo_jax.rollout import bucket, rollout_rows, token_rows
from sapo_jax.rollout.rows import left_padded
from sapo_jax.types import Prompt, Rollout


def prompt(*ids: int) -> Prompt:
    return Prompt(0, "", ids, "", "", "exact", "none")


def test_buckets_by_hand():
    sizes = {1: 16, 16: 16, 17: 24, 24: 24, 25: 32, 33: 48, 49: 64, 64: 64, 65: 96, 97: 128, 1000: 1024}
    assert {n: bucket(n) for n in sizes} == sizes


def test_every_bucket_fits_and_wastes_at_most_a_third():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all((size - n) / size <= 1 / 3 for n, size in enumerate(sizes, 1) if n >= 16)
    assert len(set(sizes)) == 18  # a handful of programs


def test_left_padding():
    tokens_PS, length_P = left_padded([prompt(5, 6, 7), prompt(8)], pad_id=9)
    assert tokens_PS.dtype == length_P.dtype == np.int32 and length_P.tolist() == [3, 1]
    assert tokens_PS.tolist() == [[9] * 13 + [5, 6, 7], [9] * 15 + [8]]


def test_token_rows_by_hand():
    rows = token_rows([((5, 6, 7, 8), 2), ((3,), 1)], pad_id=9)
    assert {name: x.dtype.name for name, x in rows.items()} == {
        "tokens_BT": "int32", "positions_BT": "int32", "segment_ids_BT": "int32", "mask_BT": "bool",
    }  # fmt: skip
    assert rows["tokens_BT"].tolist() == [[5, 6, 7, 8] + [9] * 12, [3] + [9] * 15]
    assert rows["positions_BT"].tolist() == [[0, 1, 2, 3] + [0] * 12, [0] * 16]
    assert rows["segment_ids_BT"].tolist() == [[1] * 4 + [0] * 12, [1] + [0] * 15]
    assert rows["mask_BT"].tolist() == [[False] * 2 + [True] * 2 + [False] * 12, [False] * 16]


def test_rollout_rows_by_hand():
    """Completions exactly as sampled; a pad id that was sampled is a token like any other."""
    rollout = Rollout(
        tokens_BC=np.array([[4, 9, 2], [1, 2, 9], [2, 9, 9], [7, 7, 7]], np.int32),
        logp_BC=-np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0], [0.6, 0, 0], [0.7, 0.8, 0.9]], np.float32),
        length_B=np.array([3, 2, 1, 3], np.int32),
        finish_B=np.array([0, 0, 0, 1], np.int32),
    )
    rows, logp_BT = rollout_rows([prompt(5, 6), prompt(8)], rollout, pad_id=9)
    sequences = [[5, 6, 4, 9, 2], [5, 6, 1, 2], [8, 2], [8, 7, 7, 7]]
    assert rows["tokens_BT"].tolist() == [ids + [9] * (16 - len(ids)) for ids in sequences]
    assert rows["segment_ids_BT"].sum(axis=1).tolist() == [5, 4, 2, 4]
    masked = [[0, 0, 1, 1, 1], [0, 0, 1, 1], [0, 1], [0, 1, 1, 1]]
    assert rows["mask_BT"].astype(int).tolist() == [row + [0] * (16 - len(row)) for row in masked]
    logps = [[0, 0, -0.1, -0.2, -0.3], [0, 0, -0.4, -0.5], [0, -0.6], [0, -0.7, -0.8, -0.9]]
    np.testing.assert_allclose(logp_BT, [row + [0] * (16 - len(row)) for row in logps], rtol=1e-6)
    assert logp_BT.dtype == np.float32


@pytest.mark.parametrize("lengths", [(16,), (17, 3)])
def test_rows_are_as_long_as_the_bucket_of_the_longest(lengths):
    rows = token_rows([(range(n), 1) for n in lengths], pad_id=0)
    assert rows["tokens_BT"].shape == (len(lengths), bucket(max(lengths)))
