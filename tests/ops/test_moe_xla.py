"""The mixture of experts in blocks against a loop over the experts in float64 numpy: values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.ops.expert_parallel import FEW, decoding_experts, moe_ffn
from sapo_jax.ops.moe_xla import mix_experts, sort_into_blocks
from tests.models.tiny import quick_jit

D, F, E = 6, 10, 5
ROUTES = {  # the experts of each token; those of one shape share a compiled program
    "mixed": lambda rng: rng.integers(0, E, (70, 1)),
    "whole-blocks": lambda rng: rng.permutation(np.repeat(np.arange(E), 14))[:, None],
    "empty-experts": lambda rng: rng.choice([1, 3], (70, 1)),
    "first-and-last-empty": lambda rng: rng.integers(1, E - 1, (70, 1)),
    "all-to-one": lambda rng: np.full((70, 1), 2),
    "all-to-the-last": lambda rng: np.full((70, 1), E - 1),
    "fewer-rows-than-experts": lambda rng: np.array([[4], [0], [4]]),
    "one-row": lambda rng: np.array([[3]]),
    "two-each": lambda rng: np.array([rng.permutation(E)[:2] for _ in range(35)]),
    "strangers": lambda rng: np.array(
        [rng.permutation(E + 1)[:2] for _ in range(35)]
    ),  # E: another device's
    "strangers-alone": lambda rng: np.full((35, 2), E),
}


def by_expert(x_ND, ids_Nk, gate_Nk, gate, up, down, cotangent_ND):
    """Values and gradients, one expert at a time on the tokens that are its own, from the formula, in float64."""
    y_ND, dx_ND = np.zeros((2, *x_ND.shape))
    d_gate_Nk, d_gate, d_up, d_down = (np.zeros(w.shape) for w in (gate_Nk, gate, up, down))
    for e in range(len(gate)):
        own, choice = np.nonzero(ids_Nk == e)
        weight = gate_Nk[own, choice][:, None].astype(np.float64)
        x, g = x_ND[own].astype(np.float64), cotangent_ND[own].astype(np.float64)
        a, b = x @ gate[e], x @ up[e]
        sigmoid = 1 / (1 + np.exp(-a))
        out = (a * sigmoid * b) @ down[e]
        np.add.at(y_ND, own, weight * out)
        d_gate_Nk[own, choice] = (g * out).sum(axis=1)
        d_hidden = (weight * g) @ down[e].T
        d_a, d_b = d_hidden * b * sigmoid * (1 + a * (1 - sigmoid)), d_hidden * a * sigmoid
        np.add.at(dx_ND, own, d_a @ gate[e].T + d_b @ up[e].T)
        d_gate[e], d_up[e], d_down[e] = x.T @ d_a, x.T @ d_b, (a * sigmoid * b).T @ (weight * g)
    return y_ND, (dx_ND, d_gate_Nk, d_gate, d_up, d_down)


def example(route: str):
    rng = np.random.default_rng(4)
    ids_Nk = ROUTES[route](rng).astype(np.int32)
    shapes = (len(ids_Nk), D), ids_Nk.shape, (E, D, F), (E, D, F), (E, F, D), (len(ids_Nk), D)
    *arrays, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return ids_Nk, arrays, cotangent


@functools.partial(quick_jit, static_argnums=3)
def value_and_gradients(arrays, ids_Nk, cotangent, block):
    mix = lambda x, gate, *weights: mix_experts(x, ids_Nk, gate, *weights, block=block)
    y, pull = jax.vjp(mix, *arrays)
    return y, pull(cotangent)


@pytest.mark.parametrize(
    ("route", "block"), [*((r, 14) for r in ROUTES), ("mixed", 1), ("mixed", 7), ("mixed", 128)]
)
def test_values_and_gradients(route, block):
    """No token is dropped, however they fall; what is not there gets no gradient."""
    ids_Nk, arrays, cotangent = example(route)
    y, gradients = value_and_gradients(arrays, ids_Nk, cotangent, block)
    expected_y, expected = by_expert(arrays[0], ids_Nk, *arrays[1:], cotangent)
    somewhere_N = (ids_Nk < E).any(axis=1)
    assert np.array_equal(
        np.any(np.asarray(y) != 0, axis=1), somewhere_N
    )  # a dropped token would be 0
    names = ("y", "tokens", "gates", "gate", "up", "down")
    for name, ours, theirs in zip(names, (y, *gradients), (expected_y, *expected), strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max(), err_msg=name
        )
    idle = np.setdiff1d(np.arange(E), ids_Nk)
    assert not any(np.any(np.asarray(g)[idle]) for g in gradients[2:])


@pytest.mark.parametrize("route", ["mixed", "two-each", "strangers", "strangers-alone", "one-row"])
def test_blocks(route):
    """Every copy is in one place, in a block of its expert, and knows it; other places are empty."""
    ids_Nk, _, _ = example(route)
    blocks = jax.tree.map(
        np.asarray, quick_jit(sort_into_blocks, static_argnums=(1, 2))(ids_Nk, E, 4)
    )
    here = ids_Nk.ravel() < E
    copies = np.flatnonzero(here)
    np.testing.assert_array_equal(np.sort(blocks.copy_nb[blocks.copy_nb < ids_Nk.size]), copies)
    np.testing.assert_array_equal(blocks.copy_nb.ravel()[blocks.place_Nk.ravel()[copies]], copies)
    expert_m = (
        np.searchsorted(blocks.start_e, blocks.place_Nk.ravel()[copies] // 4, side="right") - 1
    )
    np.testing.assert_array_equal(expert_m, ids_Nk.ravel()[copies])
    assert np.all(blocks.place_Nk.ravel()[~here] == blocks.copy_nb.size)
    np.testing.assert_array_equal(
        np.diff(blocks.start_e), [-(-np.sum(ids_Nk == e) // 4) for e in range(E)]
    )


def test_tokens_come_back_in_order():
    """Expert e multiplies by e + 1, so that every token can be told from the others (silu(x) = x for large x)."""
    ids_N1 = np.array([3, 0, 2, 0, 3, 1, 4, 0], np.int32)[:, None]
    x_ND = 100.0 + np.arange(8, dtype=np.float32)[:, None]
    gate, down = np.ones((E, 1, 1), np.float32), np.ones((E, 1, 1), np.float32)
    up = np.arange(1, E + 1, dtype=np.float32)[:, None, None] / 100
    y_ND = jax.jit(mix_experts)(x_ND, ids_N1, np.ones((8, 1), np.float32), gate, up, down)
    np.testing.assert_allclose(y_ND, x_ND**2 * (ids_N1 + 1) / 100, rtol=1e-6)


def test_backward_keeps_nothing_for_each_block():
    """What a backward pass needs is as large as the tokens: no hidden units, and no weights for each block."""
    x, ids = jnp.ones((512, 32)), jnp.zeros((512, 1), jnp.int32)
    weights = jnp.ones((2, 32, 64)), jnp.ones((2, 32, 64)), jnp.ones((2, 64, 32))
    _, pull = jax.vjp(
        lambda x, *w: mix_experts(x, ids, jnp.ones((512, 1)), *w, block=8), x, *weights
    )
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) == x.size


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """512 equal parts of one sum: in bfloat16 it stays at 256 of them."""
    x, ids, gate = (
        jnp.ones((512, 1), jnp.bfloat16),
        jnp.zeros((512, 1), jnp.int32),
        jnp.ones((512, 1), jnp.bfloat16),
    )
    weights = (jnp.ones((1, 1, 1), jnp.bfloat16),) * 3
    y, pull = jax.vjp(lambda *w: mix_experts(x, ids, gate, *w, block=1), *weights)
    _, of_up, of_down = (float(d.astype(jnp.float32)[0, 0, 0]) for d in pull(jnp.ones_like(y)))
    assert of_up == of_down == pytest.approx(512 * float(jax.nn.silu(1.0)), rel=0.01)


@pytest.mark.parametrize("B", [3, FEW["cpu"], FEW["cpu"] + 1])
def test_decoding_experts(B):
    """A few rows through all experts, more through their own: the same."""
    rng, D, F, k = np.random.default_rng(5), 6, 10, 2
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    ids = np.array([rng.permutation(E)[:k] for _ in range(B)])
    x, gate = normal(B, D), np.abs(normal(B, k))
    found = quick_jit(lambda x, *w: decoding_experts(*w)(x, ids, gate))(x, *weights)
    expected = quick_jit(moe_ffn)(*(x[:, None] for x in (x, ids, gate)), *weights)[:, 0]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
