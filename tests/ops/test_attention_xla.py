"""Blocked attention against attention with all scores at once: values and gradients, however blocks
fall."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.ops import attention_xla
from sapo_jax.ops.attention import attention
from tests.models.tiny import quick_jit
from tests.references.attention import whole_attention

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions, segments, prefixes


def packed_rows(T: int) -> Rows:
    """Three rows, all padded at their end: a prompt that three completions share; two such pieces,
    padded on the left, too; nothing but padding."""
    positions, segments, prefixes = np.zeros((3, 3, T), np.int32)

    def put(row: int, start: int, lengths: list[int], first_segment: int) -> int:
        """Puts a prompt and its completions into a row; returns where they end."""
        prompt_length = lengths[0]
        for n, length in enumerate(lengths):
            columns = slice(start, start + length)
            first_position = prompt_length if n else 0
            positions[row, columns] = np.arange(first_position, first_position + length)
            segments[row, columns] = first_segment + n
            prefixes[row, columns] = first_segment
            start += length
        return start

    u = T // 12
    put(0, 0, [2 * u, 3 * u, u, 4 * u], first_segment=1)
    end = put(1, u, [u, 3 * u], first_segment=1)
    put(1, end, [2 * u, u, 2 * u], first_segment=3)
    return positions, segments, prefixes


def example(T: int, H: int, K: int, h: int, scale: float = 1.0) -> list[np.ndarray]:
    """Queries, keys, values, and the cotangent of the output."""
    rng = np.random.default_rng(T + H)
    shapes = ((3, T, H, h), (3, T, K, h), (3, T, K, h), (3, T, H, h))
    return [scale * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def named(rows: Rows) -> dict[str, np.ndarray]:
    positions, segments, prefixes = rows
    return dict(positions_BT=positions, segment_ids_BT=segments, prefix_ids_BT=prefixes)


def value_and_gradients(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent)


@functools.cache
def expected(T: int, H: int, K: int, h: int, scale: float = 1.0) -> list[np.ndarray]:
    """Output and gradients of q, k, v in float64."""
    positions, segments, prefixes = packed_rows(T)

    def attend(q, k, v):
        return whole_attention(q, k, v, positions, positions, segments, segments, prefixes)

    with jax.enable_x64(True):
        arrays = [x.astype(np.float64) for x in example(T, H, K, h, scale)]
        results = quick_jit(functools.partial(value_and_gradients, attend))(*arrays)
        return [np.asarray(x) for x in results]


def computed(T: int, H: int, K: int, h: int, scale: float = 1.0) -> list[np.ndarray]:
    """The same by the function under test, in float32."""
    attend = functools.partial(attention, **named(packed_rows(T)))
    run = quick_jit(functools.partial(value_and_gradients, attend))
    return [np.asarray(x) for x in run(*example(T, H, K, h, scale))]


CASES = [  # T, H, K, block: T is a multiple of the block, or needs padding, or is one block
    (48, 4, 2, 16),
    (48, 4, 2, 8),
    (52, 4, 4, 16),
    (60, 6, 1, 16),
    (48, 4, 2, 64),
]


@pytest.mark.parametrize(("T", "H", "K", "block"), CASES)
def test_values_and_gradients(T, H, K, block, monkeypatch):
    """1e-6 of the float64 reference, padding included, where everything is 0."""
    monkeypatch.setattr(attention_xla, "BLOCK", block)
    padding = packed_rows(T)[1] == 0
    assert padding.any() and padding[2].all()
    for name, ours, theirs in zip("oqkv", computed(T, H, K, 5), expected(T, H, K, 5), strict=True):
        atol = 1e-6 * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=atol, err_msg=name)
        assert not np.any(ours[padding])
        assert np.any(ours[~padding])


def test_blocks_of_the_real_size():
    """T of several blocks of 64, with a shorter last one."""
    T = 156
    for name, ours, theirs in zip("oqkv", computed(T, 4, 2, 8), expected(T, 4, 2, 8), strict=True):
        atol = 1e-6 * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=atol, err_msg=name)


def test_large_scores(monkeypatch):
    """Scores of several hundred, whose maximum moves from block to block: finite, and as exact as
    they can be."""
    monkeypatch.setattr(attention_xla, "BLOCK", 8)
    all_ours = computed(48, 4, 2, 5, 12.0)
    all_theirs = expected(48, 4, 2, 5, 12.0)
    for name, ours, theirs in zip("oqkv", all_ours, all_theirs, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max(), err_msg=name)


def test_blocks_that_nobody_sees_are_left_out(monkeypatch):
    """The visible blocks are listed first, and exactly they are counted; NaN in another completion
    is never read."""
    monkeypatch.setattr(attention_xla, "BLOCK", 8)
    # A prompt of 2 blocks, completions of 3, 1 and 4.
    positions, segments, prefixes = (x[:1] for x in packed_rows(96))

    @quick_jit
    def visible_blocks(*rows):
        queries = attention_xla.QueryTokens(*map(attention_xla._split_into_blocks, rows))
        keys = attention_xla.KeyTokens(queries.positions, queries.segments)
        return attention_xla._visible_blocks(queries, keys)

    order_IJ, count_I = jax.device_get(visible_blocks(positions, segments, prefixes))
    seen = [sorted(order[:n].tolist()) for order, n in zip(order_IJ, count_I, strict=True)]
    assert seen[:6] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5]]
    assert seen[6:] == [[0, 1, 6], [0, 1, 6, 7], [0, 1, 6, 7, 8], [0, 1, 6, 7, 8, 9], [], []]

    q, k, v, _ = (x[:1] for x in example(96, 4, 2, 5))
    attend = quick_jit(functools.partial(attention, **named((positions, segments, prefixes))))
    poisoned = np.where(segments == 3, np.nan, 1.0)[..., None, None].astype(np.float32)
    others = np.isin(segments, (1, 2, 4))
    with_poison = np.asarray(attend(q, k * poisoned, v * poisoned))
    np.testing.assert_array_equal(with_poison[others], np.asarray(attend(q, k, v))[others])


def test_gradients_keep_the_dtype_of_bfloat16():
    attend = functools.partial(attention, **named(packed_rows(48)))
    arrays = [x.astype(jnp.bfloat16) for x in example(48, 4, 2, 8)]
    results = quick_jit(functools.partial(value_and_gradients, attend))(*arrays)
    for ours, theirs in zip(results, expected(48, 4, 2, 8), strict=True):
        assert ours.dtype == jnp.bfloat16
        atol = 0.03 * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours).astype(np.float32), theirs, atol=atol)


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    """Neither for the values nor for the gradients: four times the tokens, four times the memory."""

    def loss(q, k, v, positions, segments):
        return attention(q, k, v, **named((positions, segments, segments))).sum()

    def temporaries(T: int) -> int:
        q = jax.ShapeDtypeStruct((1, T, 4, 8), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        row = jax.ShapeDtypeStruct((1, T), jnp.int32)
        lowered = quick_jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, row, row)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 5 * temporaries(512)
    assert temporaries(2048) < 4 * 4 * 2048 * 2048 / 4  # a quarter of the scores of four heads
