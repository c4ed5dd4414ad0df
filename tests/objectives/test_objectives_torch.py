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

from sapo_jax.config import CISPO, GRPO, GSPO, SAPO
from sapo_jax.objectives import OBJECTIVES
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
        surrogate_BT, _ = OBJECTIVES[cfg.name](logp_BT - old_logp_BT, adv_BT, mask_BT, cfg)
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


def test_the_examples_are_worth_testing():
    """For both signs of A, GRPO's clip drops some tokens but not all, and GSPO's some sequences but
    not all.
    """
    logp, old_logp, adv = sequences()
    for paper in (
        lambda *x: ref.mean_over_tokens(ref.grpo_terms(*x, **CLIPS)),
        lambda *x: ref.gspo(*x, **TINY_CLIPS),
    ):
        gradients = torch_value_and_gradients(paper, logp, old_logp, adv)[1]
        for sign in (1, -1):
            of_sign = np.concatenate([g for g, a in zip(gradients, adv) if a * sign > 0])
            assert np.any(of_sign == 0) and np.any(of_sign != 0)
