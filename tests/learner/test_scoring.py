"""Chunked log-probabilities of the head against jax.nn.log_softmax over the whole vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.learner.scoring import head_logprobs, make_scorer, score, split_micro_batches
from tests.models import tiny
from tests.models.tiny import quick_jit

N, D = 24, 6
head_logprobs_jitted = quick_jit(head_logprobs, static_argnums=(3, 4))  # temperature, chunk
CASES = [  # V, chunk, temperature; 37 and 41 are prime
    (40, 40, 1.0), (40, 64, 0.7), (40, 20, 0.7), (40, 16, 1.0), (40, 7, 0.7),
    (37, 37, 0.7), (37, 16, 1.0), (41, 1, 0.7),
]  # fmt: skip


def whole(hidden_ND, head_VD, targets_N, temperature, weight_N):
    """Log-probs, entropy, greedy flag, sum p^2; gradients of sum(weight * log-prob). From the formulas, in float64."""
    z_NV = hidden_ND.astype(np.float64) @ head_VD.T / temperature
    logp_NV = z_NV - z_NV.max(axis=1, keepdims=True)
    logp_NV -= np.log(np.exp(logp_NV).sum(axis=1, keepdims=True))
    chosen_NV = np.arange(len(head_VD)) == targets_N[:, None]
    entropy_N = -np.sum(np.exp(logp_NV) * logp_NV, axis=1)
    dz_NV = weight_N[:, None] * (chosen_NV - np.exp(logp_NV)) / temperature
    logp_N = logp_NV[chosen_NV]
    collision_N = np.sum(np.exp(2 * logp_NV), axis=1)
    return (logp_N, entropy_N, logp_N == logp_NV.max(axis=1), collision_N), (
        dz_NV @ head_VD,
        dz_NV.T @ hidden_ND,
    )


def example(V: int, scale: float = 1.5):
    rng = np.random.default_rng(V)
    hidden_ND, head_VD = (
        rng.standard_normal(shape).astype(np.float32) * scale for shape in ((N, D), (V, D))
    )
    targets_N = rng.integers(0, V, N).astype(np.int32)
    targets_N[:2] = 0, V - 1
    targets_N[2:8] = np.argmax(hidden_ND @ head_VD.T, axis=1)[2:8]  # some are the mode
    return hidden_ND, head_VD, targets_N


@pytest.mark.parametrize(("V", "chunk", "temperature"), CASES)
def test_head_logprobs(V, chunk, temperature):
    """Values, entropy, greedy flag, sum p^2, and the gradients of a weighted sum of log-probs."""
    hidden_ND, head_VD, targets_N = example(V)
    weight_N = np.random.default_rng(0).standard_normal(N).astype(np.float32)

    def loss(hidden_ND, head_VD):
        out = head_logprobs(hidden_ND, head_VD, targets_N, temperature, chunk)
        without_gradient = 7 * out.entropy_N.sum() + 7 * out.collision_N.sum()
        return jnp.sum(weight_N * out.logp_N) + without_gradient, out

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (logp_N, entropy_N, greedy_N, collision_N)), gradients = run(hidden_ND, head_VD)
    expected, expected_gradients = whole(hidden_ND, head_VD, targets_N, temperature, weight_N)
    assert logp_N.dtype == entropy_N.dtype == jnp.float32 and greedy_N.dtype == bool
    np.testing.assert_allclose(logp_N, expected[0], atol=1e-5)
    np.testing.assert_allclose(entropy_N, expected[1], atol=1e-5)
    np.testing.assert_array_equal(greedy_N, expected[2])
    np.testing.assert_allclose(collision_N, expected[3], rtol=1e-5)
    assert 0 < np.sum(greedy_N) < N
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


def test_log_probs_agree_with_jax():
    hidden_ND, head_VD, targets_N = example(37)
    logp_N = head_logprobs_jitted(hidden_ND, head_VD, targets_N, 0.7, 16).logp_N
    expected_NV = np.asarray(jax.nn.log_softmax(hidden_ND @ head_VD.T / 0.7))
    np.testing.assert_allclose(logp_N, expected_NV[np.arange(N), targets_N], atol=1e-5)


@pytest.mark.parametrize("chunk", [8, 16])
def test_extreme_logits(chunk):
    """Logits of +-1e4: finite values and gradients, log-probs as exact as float32 can."""
    V = 16
    head_VD = np.zeros((V, 2), np.float32)
    head_VD[:, 0] = np.array([1e4, 1e4, -1e4, 0] + [-1e4] * 11 + [9999.0])
    head_VD[:, 1] = np.array(
        [0.5] + [0] * 15
    )  # logits 10000.5 and 10000: differences are exact in float32
    hidden_ND, targets_N = np.ones((5, 2), np.float32), np.array([0, 1, 2, 3, 15], np.int32)

    def loss(hidden_ND, head_VD):
        out = head_logprobs(hidden_ND, head_VD, targets_N, 1.0, chunk)
        return out.logp_N.sum(), out

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (logp_N, entropy_N, greedy_N, collision_N)), gradients = run(hidden_ND, head_VD)
    logits = head_VD.astype(np.float64).sum(axis=1)
    expected = logits - logits.max() - np.log(np.sum(np.exp(logits - logits.max())))
    np.testing.assert_allclose(logp_N, expected[targets_N], rtol=1e-6)
    np.testing.assert_allclose(entropy_N, -np.sum(np.exp(expected) * expected), rtol=1e-5)
    np.testing.assert_array_equal(greedy_N, [True, False, False, False, False])
    np.testing.assert_allclose(collision_N, np.sum(np.exp(2 * expected)), rtol=1e-6)
    prob_V = np.exp(expected)
    expected_head = np.bincount(targets_N, minlength=V) - 5 * prob_V
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_allclose(gradients[1], np.stack([expected_head] * 2, axis=1), atol=1e-5)


def test_ties_are_all_greedy():
    """`a most probable one`: both of two equal logits, also in different slices."""
    head_VD = np.array([[0.0], [2.0], [1.0], [2.0]], np.float32)
    targets_N = np.arange(4, dtype=np.int32)
    for chunk in (4, 2, 1):
        out = head_logprobs_jitted(np.ones((4, 1), np.float32), head_VD, targets_N, 1.0, chunk)
        assert out.greedy_N.tolist() == [0, 1, 0, 1]


def test_only_one_slice_of_logits_exists_at_a_time():
    """No array of the compiled gradient has N x V numbers or more."""
    V, rows = 4096, 512
    sizes = (
        jax.ShapeDtypeStruct((rows, 4), jnp.float32),
        jax.ShapeDtypeStruct((V, 4), jnp.float32),
    )
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def temporaries(chunk):
        def loss(hidden, head, targets):
            return head_logprobs(hidden, head, targets, 1.0, chunk).logp_N.sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*sizes, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(V) >= 4 * rows * V  # so the measure is worth something
    assert temporaries(256) < 4 * rows * V / 2


# ---------------------------------------------------------------- score


@pytest.fixture(scope="module")
def scored():
    batch = tiny.batch()
    run = quick_jit(lambda params: score(tiny.policy().bind(params), batch, 0.8))
    return batch, run(tiny.params())


def test_score_is_aligned_with_the_tokens(scored):
    """Position t speaks of token t given those before it, at the temperature; 0 where no completion token stands."""
    batch, scores = scored
    model = tiny.policy().bind(tiny.params())
    arrays = (batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, batch.prefix_ids_BT)
    logp_BTV = quick_jit(
        lambda: jax.nn.log_softmax(model.logits(model.forward(*arrays).hidden_BTD) / 0.8, axis=-1)
    )()
    expected_BT = np.take_along_axis(
        np.asarray(logp_BTV)[:, :-1], batch.tokens_BT[:, 1:, None], axis=-1
    )[..., 0]
    real_BT = batch.mask_BT[:, 1:]
    np.testing.assert_allclose(
        np.asarray(scores.logp_BT)[:, 1:][real_BT], expected_BT[real_BT], atol=1e-5
    )
    entropy_BT = -(np.exp(logp_BTV) * logp_BTV).sum(axis=-1)[:, :-1]
    np.testing.assert_allclose(
        np.asarray(scores.entropy_BT)[:, 1:][real_BT], entropy_BT[real_BT], atol=1e-5
    )
    collision_BT = np.exp(2 * logp_BTV).sum(axis=-1)[:, :-1]
    np.testing.assert_allclose(
        np.asarray(scores.collision_BT)[:, 1:][real_BT], collision_BT[real_BT], rtol=1e-4
    )
    for x_BT in (scores.logp_BT, scores.entropy_BT, scores.greedy_BT, scores.collision_BT):
        assert not np.any(np.asarray(x_BT)[~batch.mask_BT])
    assert scores.logp_BT.dtype == scores.entropy_BT.dtype == jnp.float32


def test_entropy_has_no_gradient():
    batch, policy = tiny.batch(lengths=(6, 6)), tiny.policy()

    def entropy(params):
        return score(policy.bind(params), batch, 1.0).entropy_BT.sum()

    assert not any(np.any(g) for g in jax.tree.leaves(quick_jit(jax.grad(entropy))(tiny.params())))


def test_micro_batches_change_nothing(scored):
    batch, scores = scored
    for micro_batch in (1, 2):
        scored_again = make_scorer(tiny.policy(), 0.8, micro_batch)(tiny.params(), batch)
        np.testing.assert_allclose(scored_again.logp_BT, scores.logp_BT, atol=1e-5)
        np.testing.assert_allclose(scored_again.entropy_BT, scores.entropy_BT, atol=1e-5)
        assert scored_again.expert_ids_BTLk is None


def test_a_scorer_of_a_dense_model_records_no_routing():
    scorer = make_scorer(tiny.policy(), 0.8, 2, record_routing=True)
    with pytest.raises(ValueError, match="record_routing: the model is dense"):
        scorer(tiny.params(), tiny.batch())


def test_split_keeps_rows_in_order_and_absent_fields_absent():
    batch = tiny.batch()
    micros = split_micro_batches(batch, 2)
    assert micros.tokens_BT.shape == (2, 2, batch.tokens_BT.shape[1]) and micros.old_logp_BT is None
    np.testing.assert_array_equal(micros.adv_BT.reshape(batch.adv_BT.shape), batch.adv_BT)
