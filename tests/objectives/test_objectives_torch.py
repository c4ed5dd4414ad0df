"""Loss values and gradients, through the token weights, against plain torch written from the
papers' formulas.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sapo_jax.config import CISPO, DPPO, GRPO, GSPO, SAPO, TOPR, VESPO, Bounds
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.sequence_mask import leave_out, masked_sequences
from sapo_jax.objectives.weights import token_weights
from tests.references import objectives_torch as ref

LENGTHS = (5, 1, 7, 3, 6, 4)
MAX_NEW_TOKENS = 11
WEIGHTS = {
    "sequence_mean": 1 / (len(LENGTHS) * np.array(LENGTHS, np.float64)[:, None]),
    "token_mean": 1 / sum(LENGTHS),
    "constant": 1 / (len(LENGTHS) * MAX_NEW_TOKENS),
}
CLIPS = {"clip_low": 0.2, "clip_high": 0.27}
TINY_CLIPS = {"clip_low": 3e-4, "clip_high": 4e-4}

AGGREGATIONS = {
    "sequence_mean": ref.mean_over_sequences_of_token_means,
    "token_mean": ref.mean_over_tokens,
    "constant": lambda terms: ref.constant_length(terms, MAX_NEW_TOKENS),
}
TERMS = [  # our config, the paper's terms_{i,t} and their parameters
    (SAPO(), ref.sapo_terms, {"tau_pos": 1.0, "tau_neg": 1.05}),
    (SAPO(tau_pos=0.4, tau_neg=2.5), ref.sapo_terms, {"tau_pos": 0.4, "tau_neg": 2.5}),
    (GRPO(), ref.grpo_terms, CLIPS),
    (GSPO(**CLIPS, level="token"), ref.gspo_token_terms, CLIPS),
    (CISPO(), ref.cispo_terms, {"clip_low": 1.0, "clip_high": 0.27}),
    (CISPO(clip_low=0.3, clip_high=0.5), ref.cispo_terms, {"clip_low": 0.3, "clip_high": 0.5}),
    (
        SAPO(tau_neg_below=12.0, tau_pos_above=3.0, bounds=Bounds(pos_high=0.5)),
        ref.gated_terms,
        {
            "name": "ratio",
            "taus": {"pos": 1.0, "neg": 1.05, ("neg", "below"): 12.0, ("pos", "above"): 3.0},
            "bounds": {"pos": (None, 0.5)},
        },
    ),
    (
        SAPO(gate="log", tau_neg_below=12.0),
        ref.gated_terms,
        {"name": "log", "taus": {"pos": 1.0, "neg": 1.05, ("neg", "below"): 12.0}},
    ),
    *(
        (
            SAPO(gate=gate, tau_pos=2.0, tau_neg=5.0, bounds=Bounds(neg_low=0.2, pos_low=0.3)),
            ref.gated_terms,
            {
                "name": gate,
                "taus": {"pos": 2.0, "neg": 5.0},
                "bounds": {"neg": (0.2, None), "pos": (0.3, None)},
            },
        )
        for gate in ("log", "erf", "arctan", "softsign")
    ),
    (
        GRPO(bounds=Bounds(neg_high=0.3, pos_low=0.4)),
        ref.bounded_terms,
        {
            "terms_of": functools.partial(ref.grpo_terms, **CLIPS),
            "bounds": {"neg": (None, 0.3), "pos": (0.4, None)},
        },
    ),
    (VESPO(), ref.vespo_terms, {}),
    (
        VESPO(c1_pos=0.5, c2_pos=0.2, c1_neg=1.0, c2_neg=4.0),
        ref.vespo_terms,
        {"pos": (0.5, 0.2), "neg": (1.0, 4.0)},
    ),
    (DPPO(), ref.dppo_terms, {"divergence": "tv", "delta": 0.15}),
    (
        DPPO(divergence="kl", cap=1.4),
        ref.dppo_terms,
        {"divergence": "kl", "delta": 0.05, "cap": 1.4},
    ),
    (
        DPPO(delta=0.3, bounds=Bounds(neg_high=0.3)),
        ref.bounded_terms,
        {
            "terms_of": functools.partial(ref.dppo_terms, divergence="tv", delta=0.3),
            "bounds": {"neg": (None, 0.3)},
        },
    ),
    (TOPR(), ref.topr_terms, {}),
]
CASES = [
    pytest.param(
        cfg, lambda *x, t=terms, p=params, a=aggregate: a(t(*x, **p)), norm, id=f"{cfg}-{norm}"
    )
    for cfg, terms, params in TERMS
    for norm, aggregate in AGGREGATIONS.items()
] + [
    pytest.param(
        GSPO(**clips), lambda *x, p=clips: ref.gspo(*x, **p), "sequence_mean", id=f"{clips}-gspo"
    )
    for clips in (CLIPS, TINY_CLIPS)
]


def sequences():
    """logp, old_logp (float32 numbers, so that both precisions start from the same ones) and adv of
    each sequence.

    Log-ratios reach about +-1; those of the second half are tiny, so that GSPO's narrow clip lets some sequences pass.
    """
    rng = np.random.default_rng(5)
    old_logp = [-np.abs(rng.standard_normal(n)).astype(np.float32) for n in LENGTHS]
    adv = [1.2, -0.8, -1.5, 0.9, -0.4, 2.0]
    drifts = (0.5, -0.5, -0.5, 0, 0, 0)  # with A, so that the clips act
    scales = (0.5, 0.5, 0.5, 3e-4, 3e-4, 3e-4)
    logp = [
        (old + drift + scale * rng.standard_normal(len(old))).astype(np.float32)
        for old, drift, scale in zip(old_logp, drifts, scales)
    ]
    return logp, old_logp, adv


def padded(sequences_, fill):
    rows_BT = np.full((len(LENGTHS), 9), fill, np.float32)
    for row_T, sequence in zip(rows_BT, sequences_):
        row_T[2 : 2 + len(sequence)] = sequence  # after a prompt of two tokens
    return rows_BT


def torch_value_and_gradients(paper, logp, old_logp, adv):
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logp]
    value = paper(leaves, [torch.tensor(x, dtype=torch.float64) for x in old_logp], adv)
    value.backward()
    return value.item(), [leaf.grad.numpy() for leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(cfg, logp_BT, old_logp_BT, adv_BT, mask_BT, weight_BT):
    """One program for each cfg and dtype, which all normalisations share."""

    def loss(logp_BT):
        surrogate_BT, _ = OBJECTIVES[cfg.name](
            logp_BT - old_logp_BT, adv_BT, mask_BT, cfg, old_logp_BT=old_logp_BT
        )
        return -jnp.sum(weight_BT * surrogate_BT)

    return jax.value_and_grad(loss)(logp_BT)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-6)])
@pytest.mark.parametrize("cfg, paper, normalization", CASES)
def test_loss_and_gradient(cfg, paper, normalization, dtype, tolerance):
    logp, old_logp, adv = sequences()
    value, gradients = torch_value_and_gradients(paper, logp, old_logp, adv)
    if cfg.name == "cispo":  # the paper's value has log pi where ours has log pi - log pi_old
        weights = [g / a for g, a in zip(gradients, adv)]
        value -= sum(a * np.sum(w * old) for w, a, old in zip(weights, adv, old_logp))

    with jax.enable_x64(dtype == np.float64):
        mask_BT = padded([np.ones(n) for n in LENGTHS], 0) > 0
        weight_BT = token_weights(mask_BT, None, normalization, MAX_NEW_TOKENS)
        if dtype == np.float64:  # token_weights are float32 by contract, too coarse here
            weight_BT = WEIGHTS[normalization] * mask_BT
        logp_BT = padded(logp, -9.0).astype(dtype)
        old_logp_BT = padded(old_logp, -3.0).astype(dtype)
        adv_BT = np.broadcast_to(np.array(adv, dtype)[:, None], mask_BT.shape)
        loss_value, gradient_BT = loss_and_gradient(
            cfg, logp_BT, old_logp_BT, adv_BT, mask_BT, weight_BT
        )
    loss_value = np.asarray(loss_value)
    gradient_BT = np.asarray(gradient_BT)

    assert loss_value.dtype == gradient_BT.dtype == dtype
    np.testing.assert_allclose(-loss_value, value, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        -gradient_BT[mask_BT], np.concatenate(gradients), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_array_equal(gradient_BT[~mask_BT], 0)


MASKED = [
    (SAPO(), functools.partial(ref.sapo_terms, tau_pos=1.0, tau_neg=1.05)),
    (GRPO(), functools.partial(ref.grpo_terms, **CLIPS)),
    (VESPO(), ref.vespo_terms),
]


@functools.partial(jax.jit, static_argnums=0)
def masked_loss_and_gradient(cfg, logp_BT, old_logp_BT, sampler_BT, adv_BT, mask_BT, weight_BT):
    def loss(logp_BT):
        output = OBJECTIVES[cfg.name](logp_BT - old_logp_BT, adv_BT, mask_BT, cfg)
        left_out_BT = masked_sequences(logp_BT - sampler_BT, adv_BT, mask_BT, 0.3)
        surrogate_BT, _ = leave_out(*output, left_out_BT)
        return -jnp.sum(weight_BT * surrogate_BT)

    return jax.value_and_grad(loss)(logp_BT)


@pytest.mark.parametrize("cfg, terms", MASKED, ids=[cfg.name for cfg, _ in MASKED])
def test_loss_and_gradient_with_a_sequence_mask(cfg, terms):
    """Of the three negative sequences one has fallen by more than 0.3 per token, measured from the
    sampler; another one would have, measured from the old policy.
    """
    logp, old_logp, adv = sequences()
    sampler_logp = [old + 0.2 * (-1) ** i for i, old in enumerate(old_logp)]
    drifts = [np.mean(new - old) for new, old in zip(logp, sampler_logp)]
    left_out = [a < 0 and drift < -0.3 for a, drift in zip(adv, drifts)]
    assert sum(left_out) == 1

    def paper(leaves, old, adv):
        sampler = [torch.tensor(x, dtype=torch.float64) for x in sampler_logp]
        return ref.mean_over_sequences_of_token_means(
            ref.mask_sequences(terms(leaves, old, adv), leaves, sampler, adv, 0.3)
        )

    value, gradients = torch_value_and_gradients(paper, logp, old_logp, adv)
    with jax.enable_x64(True):
        mask_BT = padded([np.ones(n) for n in LENGTHS], 0) > 0
        loss_value, gradient_BT = masked_loss_and_gradient(
            cfg,
            padded(logp, -9.0).astype(np.float64),
            padded(old_logp, -3.0).astype(np.float64),
            padded(sampler_logp, 7.0).astype(np.float64),
            np.broadcast_to(np.array(adv)[:, None], mask_BT.shape),
            mask_BT,
            WEIGHTS["sequence_mean"] * mask_BT,
        )
    gradient_BT = np.asarray(gradient_BT)
    np.testing.assert_allclose(-np.asarray(loss_value), value, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(
        -gradient_BT[mask_BT], np.concatenate(gradients), rtol=1e-10, atol=1e-10
    )
    for row_T, is_left_out, length in zip(gradient_BT, left_out, LENGTHS):
        assert np.all(row_T[2 : 2 + length] == 0) == is_left_out or cfg.name == "grpo"


def test_the_examples_are_worth_testing():
    """For both signs of A, GRPO's clip and DPPO's region drop some tokens but not all, and GSPO's
    clip some sequences but not all.
    """
    logp, old_logp, adv = sequences()
    for paper in (
        lambda *x: ref.mean_over_tokens(ref.grpo_terms(*x, **CLIPS)),
        lambda *x: ref.mean_over_tokens(ref.dppo_terms(*x, divergence="tv", delta=0.15)),
        lambda *x: ref.gspo(*x, **TINY_CLIPS),
    ):
        gradients = torch_value_and_gradients(paper, logp, old_logp, adv)[1]
        for sign in (1, -1):
            of_sign = np.concatenate([g for g, a in zip(gradients, adv) if a * sign > 0])
            assert np.any(of_sign == 0) and np.any(of_sign != 0)
