"""The TPU kernels' own code, interpreted on CPU, against the functions in plain XLA: values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sapo_jax.config import Mesh
from sapo_jax.distributed.sharding import make_mesh, on_tpu
from sapo_jax.ops import attention as kernels
from sapo_jax.ops import attention_tpu as kernels_tpu
from sapo_jax.ops.moe_xla import mix_experts

# Segments and prefixes of rows in the layout of types.Batch: (tokens, segment, prefix) runs
SHARED = [
    [(20, 1, 1), (30, 2, 1), (25, 3, 1), (10, 4, 4), (40, 5, 4)],
    [(60, 1, 1), (50, 2, 1), (15, 3, 1)],
]
OWN = [
    [(20, 1, 1), (30, 2, 1), (10, 3, 3), (50, 4, 3)],
    [(128, 1, 1)],
]  # each completion after its own prompt


def rows(layout, T: int):
    """positions, segments, prefixes, all BT."""
    segments, prefixes, positions = np.zeros((3, len(layout), T), np.int32)
    for b, runs in enumerate(layout):
        t, length = 0, {}
        for n, segment, prefix in runs:
            here, length[segment] = slice(t, t + n), n
            segments[b, here], prefixes[b, here] = segment, prefix
            positions[b, here] = np.arange(n) + (length[prefix] if prefix != segment else 0)
            t += n
    return positions, segments, prefixes


@pytest.mark.parametrize(
    ("layout", "T", "h"),
    [(SHARED, 130, 16), (OWN, 128, 128), (SHARED, 256, 128)],
    ids=["shared", "own", "two-blocks"],
)
def test_attention(layout, T, h, monkeypatch):
    """Values and gradients of rows that share prompts and of rows that do not; padding in columns and head width."""
    monkeypatch.setattr(kernels_tpu, "BLOCKS", (128,))
    positions, segments, prefixes = rows(layout, T)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((2, T, n, h)).astype(np.float32) for n in (4, 2, 2, 4))
    real = (segments > 0)[..., None, None]

    def ours(q, k, v):
        return kernels_tpu.attention(
            q, k, v, segments_BT=segments, prefixes_BT=prefixes, interpret=True
        )

    def exact(q, k, v):
        return kernels.attention(q, k, v, positions, segments, prefixes)

    assert bool(kernels_tpu._shares_prompts(jnp.array(segments), jnp.array(prefixes))) == (
        layout is SHARED
    )
    out, gradient = jax.jit(lambda *x: _value_and_vjp(ours, x, d_out * real))(q, k, v)
    expected_out, expected = jax.jit(lambda *x: _value_and_vjp(exact, x, d_out * real))(q, k, v)
    np.testing.assert_allclose(
        out * real, expected_out * real, atol=5e-6
    )  # scores of 128 float32 terms: +-1e-6 each
    for name, a, b in zip("qkv", gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def _value_and_vjp(f, args, cotangent):
    out, backward = jax.vjp(f, *args)
    return out, backward(cotangent)


def test_without_prefixes_segments_are_attended_to_alone():
    positions, segments, _ = rows(SHARED, 128)
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 128, 2, 128)).astype(np.float32)
    out = kernels_tpu.attention(q, k, v, segments_BT=segments, interpret=True)
    expected = kernels.attention(q, k, v, positions, segments)
    np.testing.assert_allclose(out[segments > 0], expected[segments > 0], atol=5e-6)


@pytest.mark.slow
def test_attention_on_a_mesh_of_eight(tmp_path):
    """Rows over data, heads over tensor: values and gradients as on one device, and decoding. In a process with eight
    devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_kernels_tpu"], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-5


def on_mesh() -> float:
    """Largest difference, of values and gradients, between a mesh of 4 x 2 and one device."""
    _, segments, prefixes = rows(SHARED * 2, 128)
    rng = np.random.default_rng(3)
    q, k, v, d_out = (
        rng.standard_normal((4, 128, n, 128)).astype(np.float32) for n in (4, 2, 2, 4)
    )
    real = (segments > 0)[..., None, None]

    def run(q, k, v):
        f = lambda q, k, v: (
            kernels_tpu.sharded_attention(q, k, v, segments, prefixes, interpret=True) * real
        )
        return _value_and_vjp(f, (q, k, v), d_out)

    decoding = cached(2, 2, 128, B=8)[:5]
    one = jax.jit(run)(q, k, v), paged(*decoding)
    with jax.set_mesh(make_mesh(Mesh(data=4, tensor=2))):
        many = jax.jit(run)(q, k, v), paged(*decoding)
    return max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    )


def cached(K: int, G: int, T: int, B: int = 5, h: int = 128):
    """Queries, keys and values of a cache whose rows start at pages and end anywhere; one is not live."""
    rng = np.random.default_rng(4)
    shapes = (B, K, G, h), (B, K, h, T), (B, K, T, h)
    q, k, v = (jnp.array(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    first_B = rng.integers(0, T // kernels.PAGE, B).astype(np.int32) * kernels.PAGE
    last_B = (first_B + rng.integers(0, T - first_B)).astype(np.int32)
    live_B = np.arange(B) != B // 2
    return q, k, v, first_B, np.where(live_B, last_B, first_B - 1).astype(np.int32), live_B


def paged(*args):
    with pltpu.force_tpu_interpret_mode():
        return np.asarray(jax.jit(kernels_tpu.sharded_decode_attention)(*args).astype(jnp.float32))


@pytest.mark.parametrize(
    ("K", "G", "T"), [(2, 2, 320), (1, 8, 1024)], ids=["few-queries", "whole-tiles"]
)
def test_decode_attention(K, G, T):
    """Of random numbers; and of a query that sees all alike, where each value tells its column: just those columns."""
    q, k, v, first_B, last_B, live_B = cached(K, G, T)
    expected = kernels.decode_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), first_B, last_B, live_B
    )
    np.testing.assert_allclose(
        paged(q, k, v, first_B, last_B)[live_B], expected[live_B], rtol=2**-8, atol=1e-6
    )
    column_T = np.arange(T)
    seen_BT = (column_T >= first_B[:, None]) & (column_T <= last_B[:, None])
    for block in range(0, T, 128):
        tells_Th = jnp.array(column_T[:, None] == block + np.arange(128), jnp.bfloat16)
        weight_BKGh = paged(q * 0, k, jnp.broadcast_to(tells_Th, v.shape), first_B, last_B)
        times = weight_BKGh * np.maximum(seen_BT.sum(axis=1), 1)[:, None, None, None]
        here_BT = np.pad(seen_BT, [(0, 0), (0, 128)])[:, block : block + 128]
        np.testing.assert_allclose(
            times, np.broadcast_to(here_BT[:, None, None], times.shape), atol=0.01
        )


def test_decode_attention_reads_live_pages_alone():
    """Not a number wherever nothing live is: nobody sees it."""
    q, k, v, first_B, last_B, live_B = cached(2, 2, 512)
    page_T = np.arange(512) // kernels.PAGE
    dead_BT = (page_T < first_B[:, None] // kernels.PAGE) | (
        page_T > last_B[:, None] // kernels.PAGE
    )
    dead_BT |= ~live_B[:, None]
    assert dead_BT.mean() > 0.3
    spoilt = (
        jnp.where(dead_BT[:, None, None], jnp.nan, k),
        jnp.where(dead_BT[:, None, :, None], jnp.nan, v),
    )
    np.testing.assert_array_equal(
        paged(q, *spoilt, first_B, last_B), paged(q, k, v, first_B, last_B)
    )


def test_on_tpu_attention_is_the_kernel(monkeypatch):
    """Traced for TPU: a pallas_call."""
    positions, segments, prefixes = rows(SHARED, 128)
    q = jnp.zeros((2, 128, 4, 128))
    program = lambda: str(
        jax.make_jaxpr(lambda q: kernels.attention(q, q, q, positions, segments, prefixes))(q)
    )
    assert "pallas_call" not in program()
    monkeypatch.setattr(kernels, "on_tpu", lambda: True)
    assert "pallas_call" in program()


def test_the_platform_is_that_of_the_mesh_in_scope():
    """On this machine without a TPU: no mesh, or one of its own devices."""
    assert not on_tpu()
    with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
        assert not on_tpu()
        assert not jax.jit(on_tpu)()


@pytest.mark.parametrize(
    ("N", "strangers"), [(24, False), (25, False), (25, True)], ids=["whole", "padded", "strangers"]
)
def test_experts(N, strangers, monkeypatch):
    """Values and gradients: whole tiles and padded ones, experts that are idle, experts that are not here."""
    monkeypatch.setattr(kernels_tpu, "ROWS", 8)
    D, F, E, k = 128, 256, 4, 2
    rng = np.random.default_rng(2)
    shapes = (N, D), (N, k), (E, D, F), (E, D, F), (E, F, D), (N, D)
    x, gates, *weights, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    weights = [w * w.shape[1] ** -0.5 for w in weights]

    def compiled(f):
        return jax.jit(
            lambda ids, x, g, *w: _value_and_vjp(
                lambda x, g, *w: f(x, ids, g, *w), (x, g, *w), d_out
            )
        )

    ours = compiled(lambda *a: kernels_tpu.mix_experts(*a, strangers=strangers, interpret=True))
    exact = compiled(mix_experts)
    choices = [0, 2, 4, 5][: 2 + 2 * strangers]  # idle experts; 4 is none of these
    for ids in (
        rng.integers(0, E, (N, k)),
        np.full((N, k), 2),
        np.minimum(rng.choice(choices, (N, k)), E),
    ):
        (out, gradient), (expected_out, expected) = (
            ours(ids, x, gates, *weights),
            exact(ids, x, gates, *weights),
        )
        np.testing.assert_allclose(out, expected_out, atol=2e-5)
        for name, a, b in zip(
            ("x", "gates", "gate", "up", "down"), gradient, expected, strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-4 if name == "gates" else 5e-5, err_msg=name)


def test_copies_and_their_gradient():
    x, order = jnp.arange(6.0).reshape(3, 2), jnp.array([5, 0, 3, 1, 4, 2])
    out, backward = jax.vjp(lambda x: kernels_tpu.copies(x, order, 2), x)
    np.testing.assert_array_equal(out, np.repeat(x, 2, axis=0)[order])
    np.testing.assert_array_equal(backward(out)[0], 2 * x)


if __name__ == "__main__":
    print(on_mesh())
