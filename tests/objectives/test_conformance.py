"""Every objective in every variant passes every check, and every check fails on an objective broken
on purpose.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sapo_jax.config import GRPO, GSPO, SAPO
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.gspo import gspo
from sapo_jax.objectives.sapo import sapo
from tests.objectives.conformance import (
    CHECKS,
    GATE_PRODUCT,
    VARIANTS,
    assert_close,
    evaluate,
    example,
    with_sequence_mask,
)

CASES = [
    pytest.param(OBJECTIVES[name], cfg, id=repr(cfg)) for name in VARIANTS for cfg in VARIANTS[name]
]


def test_every_objective_has_variants_of_its_own_config():
    assert VARIANTS.keys() == OBJECTIVES.keys()
    assert all(cfg.name == name for name, variants in VARIANTS.items() for cfg in variants)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("objective, cfg", CASES)
def test_conformance(objective, cfg, check):
    check(objective, cfg)


# A masked sequence is a constant, so its surrogate is not its value at r = 1 plus `centered`.
MASK_CHECKS = {name: check for name, check in CHECKS.items() if name != "centered"}


@pytest.mark.parametrize("check", MASK_CHECKS.values(), ids=MASK_CHECKS)
@pytest.mark.parametrize("name", ["sapo", "vespo"])
def test_conformance_behind_a_sequence_mask(name, check):
    check(with_sequence_mask(OBJECTIVES[name]), VARIANTS[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("cfg", GATE_PRODUCT, ids=repr)
def test_conformance_of_every_gate_with_and_without_bounds_and_quadrants(cfg, check):
    check(sapo, cfg)


@pytest.mark.slow
@pytest.mark.parametrize("check", MASK_CHECKS.values(), ids=MASK_CHECKS)
@pytest.mark.parametrize("objective, cfg", CASES)
def test_conformance_of_every_variant_behind_a_sequence_mask(objective, cfg, check):
    check(with_sequence_mask(objective), cfg)


class Variants(chex.TestCase):
    @chex.all_variants(
        with_pmap=False
    )  # with and without jit, on device and from numpy; pmap is not used here
    @parameterized.named_parameters((name, name) for name in OBJECTIVES)
    def test_same_numbers_under_every_transformation(self, name):
        tokens = example()
        cfg = VARIANTS[name][0]

        def objective(log_ratio_BT, adv_BT, mask_BT, old_logp_BT):
            return OBJECTIVES[name](log_ratio_BT, adv_BT, mask_BT, cfg, old_logp_BT=old_logp_BT)

        surrogate_BT, diagnostics = self.variant(objective)(
            tokens.log_ratio_BT, tokens.adv_BT, tokens.mask_BT, tokens.old_logp_BT
        )
        expected = evaluate(OBJECTIVES[name], cfg, tokens)
        expected.pop("gradient")
        assert_close({"surrogate": surrogate_BT, **diagnostics}, expected)


# ---------------------------------------------------------------- each check can fail


def change(**changes):
    """SAPO with one output changed: surrogate=fn or a diagnostic=fn of (old value, log_ratio, adv)."""

    def broken(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None, old_logp_BT=None):
        surrogate_BT, diagnostics = sapo(log_ratio_BT, adv_BT, mask_BT, cfg)
        outputs = {"surrogate": surrogate_BT, **diagnostics}
        for name, new in changes.items():
            outputs[name] = new(outputs[name], jnp.asarray(log_ratio_BT), adv_BT)
        return outputs.pop("surrogate"), outputs

    return broken


def masks_after_exp(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None, old_logp_BT=None):
    """The trap of DESIGN 5: where() around exp() is right in value and NaN in gradient."""
    return jnp.where(mask_BT, jnp.exp(log_ratio_BT) * adv_BT, 0), sapo(
        log_ratio_BT, adv_BT, mask_BT, cfg
    )[1]


def ignores_segments(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None, old_logp_BT=None):
    return gspo(log_ratio_BT, adv_BT, mask_BT, cfg)


def reports_gate_of_wrong_sign(
    log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None, old_logp_BT=None
):
    """The clip range that is right for A > 0, whatever the sign of A."""
    surrogate_BT, diagnostics = OBJECTIVES["grpo"](log_ratio_BT, adv_BT, mask_BT, cfg)
    clipped_BT = (diagnostics["ratio"] > 1 + cfg.clip_high).astype(jnp.float32)
    return surrogate_BT, {**diagnostics, "clipped": clipped_BT}


BROKEN = {
    "reinforce_at_ratio_one": (change(surrogate=lambda s, x, a: 2 * s), SAPO()),
    "masked_is_never_read": (masks_after_exp, SAPO()),
    "padding": (change(surrogate=lambda s, x, a: s / s.shape[1]), SAPO()),
    "packing": (ignores_segments, GSPO(clip_low=0.2, clip_high=0.27)),
    "row_permutation": (
        change(surrogate=lambda s, x, a: s * (1 + jnp.arange(len(s))[:, None])),
        SAPO(),
    ),
    "micro_batches": (change(surrogate=lambda s, x, a: s / s.shape[0]), SAPO()),
    "jit": (change(surrogate=lambda s, x, a: s if x[0, 0] >= 0 else -s), SAPO()),
    "zero_advantage": (change(surrogate=lambda s, x, a: s + 0.1 * x), SAPO()),
    "finite": (change(surrogate=lambda s, x, a: jnp.exp(x) * a), SAPO()),
    "grad_weight": (change(grad_weight=lambda w, x, a: w / jnp.exp(x)), SAPO()),
    "clipped": (reports_gate_of_wrong_sign, GRPO()),
    "centered": (change(centered=lambda c, x, a: c + 0.01 * a), SAPO()),
    "scales_with_advantage": (change(surrogate=lambda s, x, a: s * abs(a)), SAPO()),
    "output_form": (change(surrogate=lambda s, x, a: s.astype(jnp.bfloat16)), SAPO()),
    "diagnostics_are_constants": (change(ratio=lambda r, x, a: jnp.exp(x)), SAPO()),
}


def test_every_check_has_a_broken_objective():
    assert BROKEN.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", BROKEN)
def test_check_can_fail(name):
    broken, cfg = BROKEN[name]
    expected = jax.errors.TracerBoolConversionError if name == "jit" else AssertionError
    with pytest.raises(expected):
        CHECKS[name](broken, cfg)


def test_wrong_shapes_and_mask_types_are_refused():
    tokens = example()
    for name, variants in VARIANTS.items():
        objective = functools.partial(
            OBJECTIVES[name], cfg=variants[0], old_logp_BT=tokens.old_logp_BT
        )
        with pytest.raises(AssertionError):
            objective(tokens.log_ratio_BT, tokens.adv_BT[:, :1], tokens.mask_BT)  # would broadcast
        with pytest.raises(AssertionError):
            objective(tokens.log_ratio_BT[0], tokens.adv_BT[0], tokens.mask_BT[0])
        with pytest.raises(AssertionError):
            objective(tokens.log_ratio_BT, tokens.adv_BT, tokens.mask_BT.astype(np.float32))
