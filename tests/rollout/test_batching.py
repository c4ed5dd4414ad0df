"""Buckets, left-padded prompts, and training rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.batch import Rollout
from sapo_jax.rollout import Packing, bucket, pack_rollout, pad_sequences, plan_rows
from sapo_jax.rollout.batching import left_padded
from sapo_jax.rollout.packing import Piece
from sapo_jax.types import Prompt

TOKENS = Packing(
    1, 0, skips=False, max_prompt=16, max_new=16
)  # a row costs as much as it has tokens
PAIRS = Packing(0, 1, skips=False, max_prompt=16, max_new=16)  # or the square of that


def prompt(*ids: int) -> Prompt:
    return Prompt(0, "", ids, "", "", "exact", "none")


def test_buckets_by_hand():
    sizes = {
        1: 16,
        16: 16,
        17: 24,
        24: 24,
        25: 32,
        33: 48,
        49: 64,
        64: 64,
        65: 96,
        97: 128,
        1000: 1024,
    }
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
    rows = pad_sequences([((5, 6, 7, 8), 2), ((3,), 1)], pad_id=9)
    assert {name: x.dtype.name for name, x in rows.items()} == {
        "tokens_BT": "int32", "positions_BT": "int32", "segment_ids_BT": "int32", "prefix_ids_BT": "int32",
        "mask_BT": "bool", "picked_BM": "int32", "source_BM": "int32",
    }  # fmt: skip
    assert rows["tokens_BT"].tolist() == [[5, 6, 7, 8] + [9] * 12, [3] + [9] * 15]
    assert rows["positions_BT"].tolist() == [[0, 1, 2, 3] + [0] * 12, [0] * 16]
    assert rows["segment_ids_BT"].tolist() == [[1, 1, 2, 2] + [0] * 12, [1] + [0] * 15]
    assert rows["prefix_ids_BT"].tolist() == [[1] * 4 + [0] * 12, [1] + [0] * 15]
    assert rows["mask_BT"].tolist() == [[False] * 2 + [True] * 2 + [False] * 12, [False] * 16]
    assert rows["picked_BM"].tolist() == [[2, 3] + [16] * 6, [16] * 8]  # 16: none
    assert rows["source_BM"].tolist() == [[1, 2] + [0] * 6, [0] * 8]


# Two groups of two: prompts 5 6 and 8, completions 4 9 2 | 1 2 and 2 | 7 7 7; a sampled pad id is a token like others.
ROLLOUT = Rollout(
    tokens_BC=np.array([[4, 9, 2], [1, 2, 9], [2, 9, 9], [7, 7, 7]], np.int32),
    logp_BC=-np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0], [0.6, 0, 0], [0.7, 0.8, 0.9]], np.float32),
    length_B=np.array([3, 2, 1, 3], np.int32),
    finish_B=np.array([0, 0, 0, 1], np.int32),
)
PAIR = [prompt(5, 6), prompt(8)]


def test_rollout_rows_by_hand():
    """Two mini-batches of one group each, their prompt shared; completions exactly as sampled."""
    rows = pack_rollout(PAIR, ROLLOUT, 9, 2, TOKENS)
    assert rows.arrays["tokens_BT"].tolist() == [
        [5, 6, 4, 9, 2, 1, 2] + [9] * 9,
        [8, 2, 7, 7, 7] + [9] * 11,
    ]
    assert rows.arrays["positions_BT"].tolist() == [
        [0, 1, 2, 3, 4, 2, 3] + [0] * 9,
        [0, 1, 1, 2, 3] + [0] * 11,
    ]
    assert rows.arrays["segment_ids_BT"].tolist() == [
        [1, 1, 2, 2, 2, 3, 3] + [0] * 9,
        [1, 2, 3, 3, 3] + [0] * 11,
    ]
    assert rows.arrays["prefix_ids_BT"].tolist() == [[1] * 7 + [0] * 9, [1] * 5 + [0] * 11]
    assert rows.mask_BT.astype(int).tolist() == [
        [0, 0, 1, 1, 1, 1, 1] + [0] * 9,
        [0, 1, 1, 1, 1] + [0] * 11,
    ]
    assert rows.arrays["picked_BM"].tolist() == [
        [2, 3, 4, 5, 6, 16, 16, 16],
        [1, 2, 3, 4, 16, 16, 16, 16],
    ]
    assert rows.arrays["source_BM"].tolist() == [[1, 2, 3, 1, 5, 0, 0, 0], [0, 0, 2, 3, 0, 0, 0, 0]]
    assert rows.sequence_BT[:, :7].tolist() == [[0, 0, 0, 0, 0, 1, 1], [2, 2, 3, 3, 3, -1, -1]]
    logps = [[0, 0, -0.1, -0.2, -0.3, -0.4, -0.5], [0, -0.6, -0.7, -0.8, -0.9, 0, 0]]
    placed = rows.place(ROLLOUT.logp_BC)
    np.testing.assert_allclose(placed, [row + [0] * 9 for row in logps], rtol=1e-6)
    assert placed.dtype == np.float32
    assert rows.spread(np.array([1.0, 2, 3, 4]))[:, :7].tolist() == [
        [0, 0, 1, 1, 1, 2, 2],
        [0, 3, 4, 4, 4, 0, 0],
    ]
    assert rows.spread(np.array([True, False, True, True]))[0].sum() == 3


def test_what_stands_in_the_slots_of_the_sampler_is_placed_by_hand():
    """S = 4 left-padded prompt slots, then 3 of the completion; the prompt's once for both completions."""
    slot_NT1 = (10 * np.arange(4)[:, None] + np.arange(7)).astype(np.uint8)[..., None]
    placed = pack_rollout(PAIR, ROLLOUT, 9, 2, TOKENS).place_slots(
        slot_NT1, 4, np.array([2, 2, 1, 1]), fill=99
    )
    assert placed.shape == (2, 16, 1) and placed.dtype == np.uint8
    assert placed[0, :, 0].tolist() == [2, 3, 4, 5, 6, 14, 15] + [99] * 9
    assert placed[1, :, 0].tolist() == [23, 24, 34, 35, 36] + [99] * 11


def test_several_prompts_in_a_row():
    rows = pack_rollout(PAIR, ROLLOUT, 9, 1, TOKENS)
    assert rows.arrays["tokens_BT"].tolist() == [[5, 6, 4, 9, 2, 1, 2, 8, 2, 7, 7, 7] + [9] * 4]
    assert rows.arrays["segment_ids_BT"][0, :12].tolist() == [1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 6, 6]
    assert rows.arrays["prefix_ids_BT"][0, :12].tolist() == [1] * 7 + [4] * 5


# ---------------------------------------------------------------- plans


def tokens(plan) -> int:
    return sum(piece.size for row in plan.filled_rows() for piece in row)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shards", "micro_batch", "row_tokens"), [(1, 0, 0), (3, 0, 0), (4, 8, 200), (2, 4, 0)]
)
def test_every_completion_is_in_one_row_that_holds_it(seed, shards, micro_batch, row_tokens):
    rng = np.random.default_rng(seed)
    P, G, minis, C = 12, 8, 3, 150
    prompts, lengths = (
        rng.integers(1, 40, P).tolist(),
        rng.geometric(0.05, P * G).clip(max=C).tolist(),
    )
    for way in (TOKENS, PAIRS, Packing(100, 1, False, 0, 0), Packing(100, 1, True, 0, 0)):
        packing = dataclasses.replace(
            way,
            max_prompt=40,
            max_new=C,
            shards=shards,
            micro_batch=micro_batch,
            row_tokens=row_tokens,
        )
        plan = plan_rows(prompts, lengths, minis, packing)
        assert plan == plan_rows(prompts, lengths, minis, packing)
        assert plan.rows % (plan.micro_batch or shards) == 0 and (
            row_tokens == 0 or plan.length == row_tokens
        )
        assert plan.micro_batch % shards == 0 and (plan.micro_batch > 0) == (micro_batch > 0)
        assert plan.micro_batch * plan.length <= micro_batch * (row_tokens or bucket(40 + C))
        for i, mini in enumerate(plan.mini_batches):
            assert len(mini) <= plan.rows
            pieces = [piece for row in mini for piece in row]
            assert all(sum(piece.size for piece in row) <= plan.length for row in mini)
            assert sorted(b for piece in pieces for b in piece.sequences) == list(
                range(i * 32, (i + 1) * 32)
            )
            for piece in pieces:
                assert all(b // G == piece.prompt for b in piece.sequences)
                assert piece.size == prompts[piece.prompt] + sum(
                    lengths[b] for b in piece.sequences
                )


@st.composite
def rollouts(draw) -> tuple[list[int], list[int], int]:
    """Lengths of prompts and of completions, and a number of mini-batches."""
    mini_batches = draw(st.integers(1, 3))
    P = mini_batches * draw(st.integers(1, 4))
    G = draw(st.integers(1, 6))
    prompt_lengths = draw(st.lists(st.integers(1, 40), min_size=P, max_size=P))
    lengths = draw(st.lists(st.integers(1, 100), min_size=P * G, max_size=P * G))
    return prompt_lengths, lengths, mini_batches


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rollout=rollouts(),
    skips=st.booleans(),
    token_cost=st.integers(0, 200),
    shards=st.integers(1, 3),
    rows_per_shard=st.integers(0, 3),
    row_tokens=st.sampled_from([0, 140, 400]),
)
def test_any_plan_holds_every_completion_behind_its_prompt(
    rollout, skips, token_cost, shards, rows_per_shard, row_tokens
):
    prompt_lengths, lengths, mini_batches = rollout
    micro_batch = shards * rows_per_shard
    packing = Packing(token_cost, 1, skips, 40, 100, shards, micro_batch, row_tokens)
    plan = plan_rows(prompt_lengths, lengths, mini_batches, packing)
    groups_per_mini = len(prompt_lengths) // mini_batches
    G = len(lengths) // len(prompt_lengths)
    assert len(plan.mini_batches) == mini_batches
    assert plan.rows % (plan.micro_batch or shards) == 0
    placed = []
    for i, rows in enumerate(plan.mini_batches):
        assert len(rows) <= plan.rows
        for row in rows:
            assert sum(piece.size for piece in row) <= plan.length
            for piece in row:
                assert piece.prompt // groups_per_mini == i
                assert piece.prompt_length == prompt_lengths[piece.prompt]
                assert {b // G for b in piece.sequences} == {piece.prompt}
                assert piece.completion_lengths == tuple(lengths[b] for b in piece.sequences)
                placed += piece.sequences
    assert sorted(placed) == list(range(len(lengths)))


def test_long_prompts_are_shared_and_long_rows_are_not_free():
    """A prompt of 100 and completions of 5: whole groups. A prompt of 2 and completions of 100: one each, if every token
    is compared with every key of its row; then the plan has more tokens, but cheaper ones."""
    whole = plan_rows([100] * 4, [5] * 32, 1, Packing(1000, 1, False, 100, 5))
    assert tokens(whole) == 4 * 140
    square = plan_rows(
        [2] * 4, [100] * 32, 1, dataclasses.replace(PAIRS, max_prompt=2, max_new=100)
    )
    assert tokens(square) == 32 * 102 and square.length == 128


EQUAL = [64] * 4, [192] * 16  # 4 groups of 4, all of full length


def test_what_nobody_sees_costs_nothing_where_it_is_skipped():
    """A group a row, without a token of padding; where all of a row is compared, a completion a row."""
    plan = plan_rows(*EQUAL, 1, Packing(100, 1, True, 64, 192))
    assert (plan.length, plan.rows, tokens(plan)) == (832, 4, 3328)
    whole = plan_rows(*EQUAL, 1, Packing(100, 1, False, 64, 192))
    assert (whole.length, whole.rows, tokens(whole)) == (256, 16, 4096)


def test_costs_by_hand():
    """Prompts of 2 and 3; completions of 4 and 2, 1 and 5. Seen, halves of squares: 2 + 4 * (2 + 2) + 2 * (2 + 1), and
    4.5 + (3 + 0.5) + 5 * (3 + 2.5)."""
    pieces = Piece(0, (0, 1), 2, (4, 2)), Piece(1, (2, 3), 3, (1, 5))
    assert [piece.seen_pairs for piece in pieces] == [24, 35.5]
    assert [piece.size for piece in pieces] == [8, 9]
    skips, whole = Packing(3, 5, True, 3, 5), Packing(3, 5, False, 3, 5)
    assert skips.cost(2, 16, 1, 59.5) == 32 * 3 + 59.5 * 5
    assert (
        skips.cost(2, 16, 2, 59.5) == 32 * 3 + 2 * 59.5 * 5
    )  # a token, and what the other row sees where it stands
    assert skips.cost(2, 16, 8, 59.5) == 32 * 3 + 32 * 8 * 5  # no later tokens
    assert whole.cost(2, 16, 1, 59.5) == 32 * 3 + 32 * 16 * 5


def test_many_rows_of_different_lengths_are_short_ones():
    """What one of 64 rows does not see another does: long rows would be compared as wholes."""
    lengths = np.random.default_rng(0).integers(1, 1000, 256).tolist()
    many = plan_rows([10] * 32, lengths, 1, Packing(1, 1, True, 10, 1000))
    few = plan_rows([10] * 32, lengths, 1, Packing(1, 1, True, 10, 1000, micro_batch=1))
    assert many.length <= 1024 and few.micro_batch == 1


def test_a_micro_batch_of_longer_rows_has_fewer_of_them():
    """8 sequences of 256 tokens are 2 rows of 832. Where even one would be more than a micro-batch, none is taken."""

    def plan(**sizes):
        found = plan_rows(*EQUAL, 1, Packing(1, 0, True, 64, 192, **sizes))
        return found.length, found.rows, found.micro_batch

    assert plan(micro_batch=8) == (832, 4, 2)
    assert plan(micro_batch=2) == (448, 8, 1)
    assert plan(micro_batch=2, shards=2) == (256, 16, 2)
    assert plan(micro_batch=8, row_tokens=832) == (832, 8, 8)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(
    ("S", "C", "shards"), [(15, 20, 1), (60, 1024, 16), (200, 1024, 1), (60, 900, 4)]
)
def test_a_micro_batch_of_one_sequence_a_device_is_always_possible(S, C, shards, skips):
    """Also where a row is longer than S + C, its bucket."""
    plan = plan_rows([S] * 16, [C] * 64, 1, Packing(1, 1, skips, S, C, shards, micro_batch=shards))
    assert plan.micro_batch == shards and plan.length >= S + C


def test_a_sequence_longer_than_the_row_is_refused():
    with pytest.raises(ValueError, match="train.row_tokens = 64: a sequence has 65 tokens"):
        plan_rows([5], [60, 3], 1, dataclasses.replace(TOKENS, row_tokens=64))


@pytest.mark.parametrize("lengths", [(16,), (17, 3)])
def test_rows_are_as_long_as_the_bucket_of_the_longest(lengths):
    rows = pad_sequences([(range(n), 1) for n in lengths], pad_id=0)
    assert rows["tokens_BT"].shape == (len(lengths), bucket(max(lengths)))


def test_short_answers_of_different_lengths_are_one_shape():
    """Otherwise a cold start on answers of 2 to 4 tokens compiles a program for each."""
    shapes = {
        pad_sequences([(range(20), 20 - n)], pad_id=0)["picked_BM"].shape for n in range(1, 9)
    }
    assert shapes == {(1, 8)}
