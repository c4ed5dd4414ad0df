"""The mixture of experts in blocks against a loop over the experts in float64 numpy: values and
gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.ops.expert_parallel import (
    MOST_TOKENS_THROUGH_ALL_EXPERTS,
    DecodeMoeFfn,
    moe_ffn,
)
from sapo_jax.ops.moe_xla import local_moe_ffn, sort_into_blocks
from tests.models.tiny import quick_jit

D, F, E = 6, 10, 5
compiled_sort = quick_jit(sort_into_blocks, static_argnums=(1, 2))
FEW = MOST_TOKENS_THROUGH_ALL_EXPERTS["cpu"]
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
    # An id of E is an expert of another device.
    "remote": lambda rng: np.array([rng.permutation(E + 1)[:2] for _ in range(35)]),
    "remote-alone": lambda rng: np.full((35, 2), E),
}


def by_expert(x_ND, ids_Nk, gate_Nk, gate, up, down, d_y_ND):
    """Values and gradients, one expert at a time on the tokens that it gets, from the formula, in
    float64."""
    y_ND, d_x_ND = np.zeros((2, *x_ND.shape))
    d_gate_Nk, d_gate, d_up, d_down = (np.zeros(w.shape) for w in (gate_Nk, gate, up, down))
    for e in range(len(gate)):
        tokens, choices = np.nonzero(ids_Nk == e)
        weight = gate_Nk[tokens, choices][:, None].astype(np.float64)
        x = x_ND[tokens].astype(np.float64)
        d_y = d_y_ND[tokens].astype(np.float64)
        a = x @ gate[e]
        b = x @ up[e]
        sigmoid = 1 / (1 + np.exp(-a))
        out = (a * sigmoid * b) @ down[e]
        np.add.at(y_ND, tokens, weight * out)
        d_gate_Nk[tokens, choices] = (d_y * out).sum(axis=1)
        d_hidden = (weight * d_y) @ down[e].T
        d_a = d_hidden * b * sigmoid * (1 + a * (1 - sigmoid))
        d_b = d_hidden * a * sigmoid
        np.add.at(d_x_ND, tokens, d_a @ gate[e].T + d_b @ up[e].T)
        d_gate[e] = x.T @ d_a
        d_up[e] = x.T @ d_b
        d_down[e] = (a * sigmoid * b).T @ (weight * d_y)
    return y_ND, (d_x_ND, d_gate_Nk, d_gate, d_up, d_down)


def example(route: str):
    """The experts of each token; tokens, gates and weights; the cotangent of the output."""
    rng = np.random.default_rng(4)
    ids_Nk = ROUTES[route](rng).astype(np.int32)
    N = len(ids_Nk)
    shapes = (N, D), ids_Nk.shape, (E, D, F), (E, D, F), (E, F, D), (N, D)
    *arrays, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return ids_Nk, arrays, cotangent


@functools.partial(quick_jit, static_argnums=3)
def value_and_gradients(arrays, ids_Nk, cotangent, block):
    def mix(x, gate, *weights):
        return local_moe_ffn(x, ids_Nk, gate, *weights, block=block)

    y, pull = jax.vjp(mix, *arrays)
    return y, pull(cotangent)


@pytest.mark.parametrize(
    ("route", "block"), [*((r, 14) for r in ROUTES), ("mixed", 1), ("mixed", 7), ("mixed", 128)]
)
def test_values_and_gradients(route, block):
    """No token is dropped, however they fall; an expert that gets no token gets no gradient."""
    ids_Nk, arrays, cotangent = example(route)
    y, gradients = value_and_gradients(arrays, ids_Nk, cotangent, block)
    expected_y, expected = by_expert(arrays[0], ids_Nk, *arrays[1:], cotangent)
    has_expert_N = (ids_Nk < E).any(axis=1)
    assert np.array_equal(np.any(np.asarray(y) != 0, axis=1), has_expert_N)  # a dropped one is 0
    names = ("y", "tokens", "gates", "gate", "up", "down")
    for name, ours, theirs in zip(names, (y, *gradients), (expected_y, *expected), strict=True):
        atol = 1e-6 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol, err_msg=name)
    idle = np.setdiff1d(np.arange(E), ids_Nk)
    assert not any(np.any(np.asarray(g)[idle]) for g in gradients[2:])


def assert_sorted_into_blocks(ids_Nk: np.ndarray, block: int) -> None:
    """Every copy is in one place, in a block of its expert, and knows it; other places are empty."""
    copies = jax.tree.map(np.asarray, compiled_sort(ids_Nk, E, block))
    has_expert_m = ids_Nk.ravel() < E
    placed = np.flatnonzero(has_expert_m)
    place_m = copies.place_Nk.ravel()
    np.testing.assert_array_equal(np.sort(copies.copy_nb[copies.copy_nb < ids_Nk.size]), placed)
    np.testing.assert_array_equal(copies.copy_nb.ravel()[place_m[placed]], placed)
    expert_of_placed = np.searchsorted(copies.start_e, place_m[placed] // block, side="right") - 1
    np.testing.assert_array_equal(expert_of_placed, ids_Nk.ravel()[placed])
    assert np.all(place_m[~has_expert_m] == copies.copy_nb.size)
    blocks_of_expert = [-(-np.sum(ids_Nk == e) // block) for e in range(E)]
    np.testing.assert_array_equal(np.diff(copies.start_e), blocks_of_expert)


@pytest.mark.parametrize("route", ["mixed", "two-each", "remote", "remote-alone", "one-row"])
def test_sort_into_blocks(route):
    ids_Nk, _, _ = example(route)
    assert_sorted_into_blocks(ids_Nk, block=4)


# Few shapes, so that there are few programs to compile; any ids, so also those of other devices.
ids_of_12_copies = st.lists(st.integers(0, E), min_size=12, max_size=12).map(np.array)


@settings(deadline=None, derandomize=True)
@given(ids_of_12_copies, st.sampled_from([1, 2, 3]), st.sampled_from([1, 5]))
def test_any_ids_are_sorted_into_blocks(id_m, k, block):
    assert_sorted_into_blocks(id_m.reshape(-1, k).astype(np.int32), block)


def test_tokens_come_back_in_order():
    """Expert e multiplies by e + 1, so that every token can be told from the others (silu(x) = x
    for large x)."""
    ids_N1 = np.array([3, 0, 2, 0, 3, 1, 4, 0], np.int32)[:, None]
    x_ND = 100.0 + np.arange(8, dtype=np.float32)[:, None]
    ones = np.ones((E, 1, 1), np.float32)
    up = np.arange(1, E + 1, dtype=np.float32)[:, None, None] / 100
    y_ND = jax.jit(local_moe_ffn)(x_ND, ids_N1, np.ones((8, 1), np.float32), ones, up, ones)
    np.testing.assert_allclose(y_ND, x_ND**2 * (ids_N1 + 1) / 100, rtol=1e-6)


def test_backward_keeps_nothing_for_each_block():
    """What a backward pass needs is as large as the tokens: no hidden units, and no weights for
    each block."""
    shapes = (512, 32), (2, 32, 64), (2, 32, 64), (2, 64, 32)
    x, *weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids = jnp.asarray(np.zeros((512, 1), np.int32))
    gates = jnp.asarray(np.ones((512, 1), np.float32))

    def pull(x, *weights):
        return jax.vjp(lambda x, *w: local_moe_ffn(x, ids, gates, *w, block=8), x, *weights)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, x, *weights))
    assert max(leaf.size for leaf in kept) == x.size


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """512 equal parts of one sum: in bfloat16 it stays at 256 of them."""
    x = jnp.asarray(np.ones((512, 1), jnp.bfloat16))
    ids = jnp.asarray(np.zeros((512, 1), np.int32))
    gates = jnp.asarray(np.ones((512, 1), jnp.bfloat16))
    weights = (np.ones((1, 1, 1), jnp.bfloat16),) * 3

    @quick_jit
    def gradients(*weights):
        y, pull = jax.vjp(lambda *w: local_moe_ffn(x, ids, gates, *w, block=1), *weights)
        return pull(jnp.ones_like(y))

    _, of_up, of_down = (
        float(gradient[0, 0, 0]) for gradient in map(np.asarray, gradients(*weights))
    )
    silu_of_1 = 1 / (1 + np.exp(-1))
    assert of_up == of_down == pytest.approx(512 * silu_of_1, rel=0.01)


@pytest.mark.parametrize("B", [3, FEW, FEW + 1])
def test_decode_moe_ffn(B):
    """A few rows through all experts, more through their own: the same."""
    rng = np.random.default_rng(5)
    k = 2

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    ids = np.array([rng.permutation(E)[:k] for _ in range(B)])
    x = normal(B, D)
    gate = np.abs(normal(B, k))
    y = quick_jit(lambda x, *w: DecodeMoeFfn(*w)(x, ids, gate))(x, *weights)
    one_token_rows = (array[:, None] for array in (x, ids, gate))
    expected = quick_jit(moe_ffn)(*one_token_rows, *weights)[:, 0]
    np.testing.assert_allclose(y, expected, atol=2e-5, rtol=1e-5)
