"""Extreme ratios and junk behind the mask, drawn by hypothesis: float32 and bfloat16 against float64.

Every objective in every variant of the conformance suite: values, gradients and diagnostics are
finite, and they are what float64 makes of the same numbers. A token next to a clip or a bound, which
float32 may put on its other side, is left out of the comparison.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.correction import CORRECTIONS
from sapo_jax.objectives.kl import KL_ESTIMATORS
from tests.objectives.conformance import (
    EVERY_VARIANT,
    Tokens,
    evaluate,
    weighted,
)

SHAPE = (6, 9)  # that of conformance.example, for which everything is compiled already
FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}

LOG_RATIOS = st.one_of(
    st.sampled_from(
        [0.0, 1e-8, -1e-8, 19.9, 20.0, -20.0, 20.5, -20.5, 88.8, -103.0, 200.0, -200.0]
    ),
    st.floats(-3, 3, width=32),
    st.floats(-200, 200, width=32),
)
ADVANTAGES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-6, -1e-6]),
    st.floats(-5, 5, width=32, allow_subnormal=False),
)
JUNK = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -1e30, 0.0])


@st.composite
def batches(draw) -> Tokens:
    """Tokens with junk behind the mask, in numbers that bfloat16 has."""
    mask_BT = draw(hnp.arrays(bool, SHAPE))
    log_ratio_BT = draw(hnp.arrays(np.float32, SHAPE, elements=LOG_RATIOS))
    adv_B1 = draw(hnp.arrays(np.float32, (SHAPE[0], 1), elements=ADVANTAGES))
    old_logp_BT = draw(hnp.arrays(np.float32, SHAPE, elements=st.floats(-30, 0, width=32)))
    junk_BT = draw(hnp.arrays(np.float32, SHAPE, elements=JUNK))

    def coarse(x_BT):
        rounded_BT = x_BT.astype(jnp.bfloat16).astype(np.float32)
        return np.where(mask_BT, rounded_BT, junk_BT)

    return weighted(
        coarse(log_ratio_BT),
        coarse(np.broadcast_to(adv_B1, SHAPE)),
        mask_BT,
        old_logp_BT=coarse(old_logp_BT),
    )


def oracle(cfg, tokens: Tokens, nudge: float = 0.0) -> dict[str, np.ndarray]:
    """The outputs in float64, at log-ratios that are moved by a small part of themselves."""
    tokens = tokens.astype(np.float64)
    log_ratio_BT = tokens.log_ratio_BT * (1 + nudge) + nudge
    with jax.enable_x64(True):
        return evaluate(OBJECTIVES[cfg.name], cfg, tokens.replace(log_ratio_BT=log_ratio_BT))


def steady_tokens(cfg, tokens: Tokens, weight_BT: np.ndarray) -> np.ndarray:
    """Where the weight has no jump next to the token's ratio, such as a hard clip has."""
    nudged = [oracle(cfg, tokens, by)["grad_weight"] for by in (1e-5, -1e-5)]
    jumps_BT = np.abs(nudged[0] - nudged[1]) > 1e-2 * (1 + np.abs(weight_BT))
    if cfg.name == "gspo":  # one token at the edge of a clip takes its whole sequence along
        jumps_BT |= jumps_BT.any(axis=1, keepdims=True)
    return ~jumps_BT


@pytest.mark.parametrize("cfg", EVERY_VARIANT, ids=repr)
@FEW
@given(tokens=batches())
def test_every_objective_is_finite_and_what_float64_makes_of_it(cfg, tokens):
    expected = oracle(cfg, tokens)
    steady_BT = steady_tokens(cfg, tokens, expected["grad_weight"])
    for dtype in DTYPES.values():
        result = evaluate(OBJECTIVES[cfg.name], cfg, tokens.astype(dtype))
        for name, value_BT in result.items():
            value_BT = np.asarray(value_BT, np.float64)
            assert np.all(np.isfinite(value_BT)), name
            assert np.all(value_BT[~tokens.mask_BT] == 0), name
            tolerance = 3e-5
            if name == "gradient" and dtype == jnp.bfloat16:
                tolerance = 1e-2  # a gradient has the dtype of what it is a gradient by
            np.testing.assert_allclose(
                value_BT[steady_BT],
                expected[name][steady_BT],
                rtol=tolerance,
                atol=tolerance,
                err_msg=name,
            )


jitted_kl = jax.jit(
    lambda name, x_BT, mask_BT: jax.value_and_grad(lambda x: KL_ESTIMATORS[name](x, mask_BT).sum())(
        x_BT
    ),
    static_argnums=0,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KL_ESTIMATORS)
@FEW
@given(tokens=batches())
def test_kl_estimators_are_finite_and_what_float64_makes_of_them(name, dtype, tokens):
    value, gradient_BT = jitted_kl(name, tokens.astype(DTYPES[dtype]).log_ratio_BT, tokens.mask_BT)
    with jax.enable_x64(True):
        expected = jitted_kl(name, tokens.astype(np.float64).log_ratio_BT, tokens.mask_BT)
    tolerance = 1e-2 if dtype == "bfloat16" else 3e-5
    np.testing.assert_allclose(value, expected[0], rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(
        np.asarray(gradient_BT, np.float64), expected[1], rtol=tolerance, atol=3e-5
    )


@pytest.mark.parametrize("name", CORRECTIONS)
@FEW
@given(tokens=batches())
def test_corrections_are_within_their_cap(name, tokens):
    weight_BT = np.asarray(CORRECTIONS[name](tokens.log_ratio_BT, tokens.mask_BT, 2.0))
    assert np.all((weight_BT >= 0) & (weight_BT <= 2)) and np.all(weight_BT[~tokens.mask_BT] == 0)
