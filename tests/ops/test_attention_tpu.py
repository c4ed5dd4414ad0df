"""The TPU kernels of attention, interpreted on CPU, against plain XLA: values and gradients."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from sapo_jax.config import Mesh
from sapo_jax.distributed.sharding import make_mesh, on_tpu
from sapo_jax.ops import attention as attention_ops
from sapo_jax.ops import attention_tpu
from sapo_jax.ops.tiles import PAGE

# Rows in the layout of batch.Batch, as runs of (tokens, segment, prefix)
SHARED_PROMPTS = [
    [(20, 1, 1), (30, 2, 1), (25, 3, 1), (10, 4, 4), (40, 5, 4)],
    [(60, 1, 1), (50, 2, 1), (15, 3, 1)],
]
OWN_PROMPTS = [  # each completion follows a prompt of its own
    [(20, 1, 1), (30, 2, 1), (10, 3, 3), (50, 4, 3)],
    [(128, 1, 1)],
]


def rows(layout, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """positions, segments, prefixes, all BT."""
    segments, prefixes, positions = np.zeros((3, len(layout), T), np.int32)
    for b, runs in enumerate(layout):
        start = 0
        length_of_segment = {}
        for n, segment, prefix in runs:
            columns = slice(start, start + n)
            length_of_segment[segment] = n
            first_position = length_of_segment[prefix] if prefix != segment else 0
            segments[b, columns] = segment
            prefixes[b, columns] = prefix
            positions[b, columns] = first_position + np.arange(n)
            start += n
    return positions, segments, prefixes


def value_and_gradients(f, args, cotangent):
    out, backward = jax.vjp(f, *args)
    return out, backward(cotangent)


# ---------------------------------------------------------------- attention of whole rows


@pytest.mark.parametrize(
    ("layout", "T", "h"),
    [(SHARED_PROMPTS, 130, 16), (OWN_PROMPTS, 128, 128), (SHARED_PROMPTS, 256, 128)],
    ids=["shared", "own", "two-blocks"],
)
def test_attention(layout, T, h, monkeypatch):
    """Values and gradients of rows that share prompts and of rows that do not; with padding of
    columns and of the head width."""
    monkeypatch.setattr(attention_tpu, "BLOCKS", (128,))
    positions, segments, prefixes = rows(layout, T)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((2, T, n, h)).astype(np.float32) for n in (4, 2, 2, 4))
    real = (segments > 0)[..., None, None]

    def by_kernel(q, k, v):
        return attention_tpu.device_attention(
            q, k, v, segment_ids_BT=segments, prefix_ids_BT=prefixes, interpret=True
        )

    def by_xla(q, k, v):
        return attention_ops.attention(q, k, v, positions, segments, prefixes)

    shares_prompts = jax.jit(attention_tpu._completions_share_prompts)(segments, prefixes)
    assert bool(shares_prompts) == (layout is SHARED_PROMPTS)
    out, gradients = jax.jit(lambda *x: value_and_gradients(by_kernel, x, d_out * real))(q, k, v)
    expected_out, expected = jax.jit(lambda *x: value_and_gradients(by_xla, x, d_out * real))(
        q, k, v
    )
    # Scores are sums of 128 float32 terms: +-1e-6 each.
    np.testing.assert_allclose(np.asarray(out) * real, np.asarray(expected_out) * real, atol=5e-6)
    for name, ours, theirs in zip("qkv", gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)


def test_without_prefixes_segments_are_attended_to_alone():
    positions, segments, _ = rows(SHARED_PROMPTS, 128)
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 128, 2, 128)).astype(np.float32)

    @jax.jit
    def both(q, k, v):
        by_kernel = attention_tpu.device_attention(q, k, v, segment_ids_BT=segments, interpret=True)
        return by_kernel, attention_ops.attention(q, k, v, positions, segments)

    out, expected = jax.device_get(both(q, k, v))
    np.testing.assert_allclose(out[segments > 0], expected[segments > 0], atol=5e-6)


def test_the_private_backward_of_splash_attention():
    """`_splash_gradients` is the only place that calls a private function of jax.

    If this test fails after an upgrade of jax, compare `_splash_attention_bwd` and the residuals
    that `_splash_attention_fwd` saves for it (in jax.experimental.pallas.ops.tpu.splash_attention.
    splash_attention_kernel) with what `_splash_gradients` passes, and change that function. Then
    change the lists here. `test_attention` says whether the gradients are right. If the function is
    gone, write the backward pass from `_splash_attention_bwd_dkv`, or pin jax until it is back.
    """
    assert list(inspect.signature(splash._splash_attention_bwd).parameters) == [
        "save_residuals",
        "mask_value",
        "is_mqa",
        "block_sizes",
        "residual_checkpoint_name",
        "mask_function",
        "attn_logits_soft_cap",
        "interpret",
        "res",
        "do",
    ]
    kernel = attention_tpu._splash_kernel(H=2, T=128, interpret=True)
    assert hasattr(kernel, "dq_mask_info")
    assert kernel.dkv_mask_info is not None
    assert {"mask_value", "block_sizes", "mask_function"} <= kernel.kwargs.keys()
    H, T, h = 2, 128, 128
    array = jnp.ones((H, T, h))
    segment_ids = splash.SegmentIds(jnp.ones(T, jnp.int32), jnp.ones(T, jnp.int32))
    gradients = jax.eval_shape(
        lambda: attention_tpu._splash_gradients(
            kernel, array, array, array, segment_ids, array, array[..., 0], array, interpret=True
        )
    )
    assert [gradient.shape for gradient in gradients] == [array.shape] * 3


def test_on_tpu_attention_is_the_kernel(monkeypatch):
    """Traced for TPU, the program holds a pallas_call."""
    positions, segments, prefixes = rows(SHARED_PROMPTS, 128)
    q = jnp.zeros((2, 128, 4, 128))

    def program() -> str:
        def attend(q):
            return attention_ops.attention(q, q, q, positions, segments, prefixes)

        return str(jax.make_jaxpr(attend)(q))

    assert "pallas_call" not in program()
    monkeypatch.setattr(attention_ops, "on_tpu", lambda: True)
    assert "pallas_call" in program()


def test_the_platform_is_that_of_the_mesh_in_scope():
    """On this machine without a TPU: no mesh, or one of its own devices."""
    assert not on_tpu()
    with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
        assert not on_tpu()
        assert not jax.jit(on_tpu)()


# ---------------------------------------------------------------- decoding


def cached(K: int, G: int, T: int, B: int = 5, h: int = 128):
    """Queries, keys and values of a cache whose rows start at pages and end anywhere; then their
    first and last columns, and which rows are live: all but one."""
    rng = np.random.default_rng(4)
    shapes = (B, K, G, h), (B, K, h, T), (B, K, T, h)
    q, k, v = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes)
    start_B = rng.integers(0, T // PAGE, B).astype(np.int32) * PAGE
    last_B = (start_B + rng.integers(0, T - start_B)).astype(np.int32)
    live_B = np.arange(B) != B // 2
    last_B = np.where(live_B, last_B, start_B - 1).astype(np.int32)
    return q, k, v, start_B, last_B, live_B


decode_by_kernel = jax.jit(attention_tpu.sharded_decode_attention)


def decoded_by_kernel(*args) -> np.ndarray:
    with pltpu.force_tpu_interpret_mode():
        return np.asarray(decode_by_kernel(*args)).astype(np.float32)


@pytest.mark.parametrize(
    ("K", "G", "T"), [(2, 2, 320), (1, 8, 1024)], ids=["few-queries", "whole-tiles"]
)
def test_decode_attention(K, G, T):
    """Of random numbers; and of a query that sees all keys alike, where each value tells its column:
    just the columns of the row are seen."""
    q, k, v, start_B, last_B, live_B = cached(K, G, T)
    q_f32, k_f32, v_f32 = (x.astype(np.float32) for x in (q, k, v))
    exact = jax.jit(attention_ops.decode_attention)
    expected = np.asarray(exact(q_f32, k_f32, v_f32, start_B, last_B, live_B))
    out = decoded_by_kernel(q, k, v, start_B, last_B)
    np.testing.assert_allclose(out[live_B], expected[live_B], rtol=2**-8, atol=1e-6)

    column_T = np.arange(T)
    seen_BT = (column_T >= start_B[:, None]) & (column_T <= last_B[:, None])
    num_seen_B = np.maximum(seen_BT.sum(axis=1), 1)
    for block in range(0, T, 128):
        tells_Th = (column_T[:, None] == block + np.arange(128)).astype(jnp.bfloat16)
        values = np.broadcast_to(tells_Th, v.shape)
        weight_BKGh = decoded_by_kernel(q * 0, k, values, start_B, last_B)
        times_seen = weight_BKGh * num_seen_B[:, None, None, None]
        block_seen_BT = np.pad(seen_BT, [(0, 0), (0, 128)])[:, block : block + 128]
        expected = np.broadcast_to(block_seen_BT[:, None, None], times_seen.shape)
        np.testing.assert_allclose(times_seen, expected, atol=0.01)


def test_decode_attention_reads_live_pages_alone():
    """Not-a-number in all pages that hold no key of a live row: nobody sees it."""
    q, k, v, start_B, last_B, live_B = cached(2, 2, 512)
    page_T = np.arange(512) // PAGE
    before_BT = page_T < start_B[:, None] // PAGE
    after_BT = page_T > last_B[:, None] // PAGE
    dead_BT = before_BT | after_BT | ~live_B[:, None]
    assert dead_BT.mean() > 0.3
    not_a_number = np.array(np.nan, k.dtype)
    spoilt_k = np.where(dead_BT[:, None, None], not_a_number, k)
    spoilt_v = np.where(dead_BT[:, None, :, None], not_a_number, v)
    np.testing.assert_array_equal(
        decoded_by_kernel(q, spoilt_k, spoilt_v, start_B, last_B),
        decoded_by_kernel(q, k, v, start_B, last_B),
    )


# ---------------------------------------------------------------- on a mesh


@pytest.mark.slow
def test_attention_on_a_mesh_of_eight():
    """Rows over data, heads over tensor: values and gradients as on one device, and decoding. In a
    process with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_attention_tpu"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-5


def largest_difference_on_mesh() -> float:
    """Largest difference, of values and gradients, between a mesh of 4 x 2 and one device."""
    _, segments, prefixes = rows(SHARED_PROMPTS * 2, 128)
    rng = np.random.default_rng(3)
    q, k, v, d_out = (
        rng.standard_normal((4, 128, n, 128)).astype(np.float32) for n in (4, 2, 2, 4)
    )
    real = (segments > 0)[..., None, None]

    def attend(q, k, v):
        out = attention_tpu.sharded_attention(q, k, v, segments, prefixes, interpret=True)
        return out * real

    def run(q, k, v):
        return value_and_gradients(attend, (q, k, v), d_out)

    decoding = cached(2, 2, 128, B=8)[:5]
    on_one_device = jax.jit(run)(q, k, v), decoded_by_kernel(*decoding)
    with jax.set_mesh(make_mesh(Mesh(data=4, tensor=2))):
        on_mesh = jax.jit(run)(q, k, v), decoded_by_kernel(*decoding)
    pairs = zip(jax.tree.leaves(on_one_device), jax.tree.leaves(on_mesh), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


if __name__ == "__main__":
    print(largest_difference_on_mesh())
