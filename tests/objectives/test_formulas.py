"""Hand-worked numbers of every objective, gate, bound and mask: values, and weights on A grad log pi."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.config import CISPO, DPPO, GRPO, SAPO, TOPR, VESPO, Bounds
from sapo_jax.config.objective import GATES
from sapo_jax.config.objective_rules import LARGEST_LOG_RATIO, gate_weight
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.dppo import kl_divergence, total_variation
from sapo_jax.objectives.ratios import MAX_LOG_RATIO
from sapo_jax.objectives.sequence_mask import leave_out, masked_sequences

# Four tokens, each a sequence of its own, so that W = s = r.
ADV = np.array([1.0, -1.0, -1.0, 1.0])
RATIO = np.array([1.3, 0.7, 1.3, 0.7])

# (value, weight) at the four tokens, to four digits.
TABLE = [
    (SAPO(), [(2.2978, 1.2712), (-1.6072, 0.6829), (-2.2023, 1.2683), (1.7022, 0.6845)]),
    (
        SAPO(tau_pos=10.0, tau_neg=12.0),
        [(0.3810, 0.2349), (-0.0089, 0.0725), (-0.3245, 0.1346), (0.0190, 0.1265)],
    ),
    (
        SAPO(gate="log"),
        [(0.2609, 0.9830), (0.3526, 0.9657), (-0.2607, 0.9813), (-0.3529, 0.9689)],
    ),
    (
        SAPO(gate="log", tau_pos=2.0, tau_neg=5.0),
        [(0.2565, 0.9342), (0.2849, 0.4927), (-0.2303, 0.6686), (-0.3423, 0.8828)],
    ),
    (
        SAPO(gate="erf"),
        [(1.1250, 0.0144), (-0.8956, 0.0011), (-1.1044, 0.0020), (0.8750, 0.0078)],
    ),
    (
        SAPO(gate="arctan"),
        [(1.1249, 0.1300), (-0.8917, 0.0501), (-1.1083, 0.0931), (0.8751, 0.0700)],
    ),
    (
        SAPO(gate="softsign"),
        [(1.0949, 0.0411), (-0.9197, 0.0134), (-1.0803, 0.0249), (0.9051, 0.0221)],
    ),
    # One bound each: where it closes, the value is that at the bound.
    (
        SAPO(bounds=Bounds(neg_low=0.2)),
        [(2.2978, 1.2712), (-1.7055, 0), (-2.2023, 1.2683), (1.7022, 0.6845)],
    ),
    (
        SAPO(bounds=Bounds(pos_high=0.27)),
        [(2.2684, 0), (-1.6072, 0.6829), (-2.2023, 1.2683), (1.7022, 0.6845)],
    ),
    (
        SAPO(bounds=Bounds(pos_low=0.2)),
        [(2.2978, 1.2712), (-1.6072, 0.6829), (-2.2023, 1.2683), (1.8007, 0)],
    ),
    # A third temperature: at (-1, 0.7) f = 4/12 sigmoid(-3.6) + 2/1.05 - 2/12 = 1.7470.
    (
        SAPO(tau_neg_below=12.0),
        [(2.2978, 1.2712), (-1.7470, 0.0725), (-2.2023, 1.2683), (1.7022, 0.6845)],
    ),
    # And with the log gate: 2/12 tanh(6 log 0.7) = -0.1621, 4 0.7^12 / (1 + 0.7^12)^2 = 0.0539.
    (
        SAPO(gate="log", tau_neg_below=12.0),
        [(0.2609, 0.9830), (0.1621, 0.0539), (-0.2607, 0.9813), (-0.3529, 0.9689)],
    ),
    (GRPO(), [(1.27, 0), (-0.8, 0), (-1.3, 1.3), (0.7, 0.7)]),
    (VESPO(), [(0.1803, 0.6871), (0.2229, 0.6250), (-0.3163, 1.2057), (-0.4299, 1.2052)]),
    (CISPO(), [(0.3332, 1.27), (0.2497, 0.7), (-0.3332, 1.27), (-0.2497, 0.7)]),
    (TOPR(), [(0.2624, 1), (0.2497, 0.7), (-0.2624, 1), (-0.3567, 1)]),
]
DPPO_TABLE = {
    0.6: [(0, 0), (0, 0), (-0.3411, 1.3), (-0.2497, 0.7)],
    0.1: [(0.3411, 1.3), (0.2497, 0.7), (-0.3411, 1.3), (-0.2497, 0.7)],
}


@functools.partial(jax.jit, static_argnums=0)
def _outputs(cfg, log_ratio_BT, adv_BT, mask_BT, old_logp_BT):
    def total(log_ratio_BT):
        surrogate_BT, diagnostics = OBJECTIVES[cfg.name](
            log_ratio_BT, adv_BT, mask_BT, cfg, old_logp_BT=old_logp_BT
        )
        return surrogate_BT.sum(), (surrogate_BT, diagnostics)

    gradient_BT, (surrogate_BT, diagnostics) = jax.grad(total, has_aux=True)(log_ratio_BT)
    return surrogate_BT, gradient_BT, diagnostics


def values_and_weights(cfg, ratio_N, adv_N, mu=0.5):
    """The surrogate and its gradient over A by log r, of sequences of one token, in float64."""
    log_ratio_N1 = np.log(np.asarray(ratio_N, np.float64))[:, None]
    adv_N1 = np.asarray(adv_N, np.float64)[:, None]
    with jax.enable_x64(True):
        surrogate_N1, gradient_N1, diagnostics = _outputs(
            cfg,
            jnp.asarray(log_ratio_N1),
            adv_N1,
            np.ones(adv_N1.shape, bool),
            np.full(adv_N1.shape, np.log(mu)),
        )
        weight_N1 = np.asarray(gradient_N1) / adv_N1
        np.testing.assert_allclose(diagnostics["grad_weight"], weight_N1, atol=1e-12)
        return np.asarray(surrogate_N1)[:, 0], weight_N1[:, 0]


@pytest.mark.parametrize("cfg, expected", TABLE, ids=[repr(cfg) for cfg, _ in TABLE])
def test_four_tokens_by_hand(cfg, expected):
    results = values_and_weights(cfg, RATIO, ADV)
    np.testing.assert_allclose(np.stack(results, axis=1), expected, atol=5.1e-5)


@pytest.mark.parametrize("mu", DPPO_TABLE)
@pytest.mark.parametrize("cfg", [DPPO(), DPPO(divergence="kl")])
def test_dppo_blocks_a_likely_token_and_not_a_rare_one(cfg, mu):
    """At mu = 0.6, r = 1.3 is a tv of 0.18 and a kl of 0.155; at mu = 0.1 it is 0.03 and 0.004."""
    results = values_and_weights(cfg, RATIO, ADV, mu)
    np.testing.assert_allclose(np.stack(results, axis=1), DPPO_TABLE[mu], atol=5.1e-5)


def test_the_divergences_by_hand():
    mu = np.array([[0.6, 0.6, 0.1, 0.01]])
    pi = np.array([[0.78, 0.42, 0.13, 0.02]])
    with jax.enable_x64(True):
        tv = total_variation(jnp.log(mu), jnp.log(pi / mu))
        kl = kl_divergence(jnp.log(mu), jnp.log(pi / mu))
    np.testing.assert_allclose(tv, [[0.18, 0.18, 0.03, 0.01]], rtol=1e-12)
    expected = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))
    np.testing.assert_allclose(kl, expected, rtol=1e-12)


def test_the_kl_divergence_keeps_its_digits_where_mu_is_nearly_1():
    """In float32, 1 - mu at mu = 1 - 1e-6 has one digit left; log1p(-exp(logp)) has all."""
    logp_BT = np.array([[-1e-6, -1e-5]])
    log_ratio_BT = np.array([[-0.2, 5e-6]])
    mu = np.exp(logp_BT)
    rest = -np.expm1(logp_BT)
    new_rest = -np.expm1(logp_BT + log_ratio_BT)
    expected = -mu * log_ratio_BT + rest * np.log(rest / new_rest)
    kl = kl_divergence(jnp.float32(logp_BT), jnp.float32(log_ratio_BT))
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-11)
    at_one = kl_divergence(jnp.zeros((1, 2)), jnp.array([[0.0, -1.0]]))
    np.testing.assert_allclose(at_one, [[0.0, 1.0]], rtol=1e-6)  # log(1 / 0.368) = 1
    to_one = kl_divergence(jnp.log(jnp.array([[0.9]])), -jnp.log(jnp.array([[0.9]])))
    assert np.isfinite(to_one) and to_one > 1


def test_dppo_s_cap_holds_the_weight_and_keeps_the_token():
    value, weight = values_and_weights(DPPO(cap=3.0, delta=0.9), [2.0, 5.0], [-1.0, -1.0], mu=0.1)
    np.testing.assert_allclose(weight, [2.0, 3.0])
    np.testing.assert_allclose(value, [-2 * np.log(2), -3 * np.log(5)])


def test_dppo_without_old_log_probs_says_so():
    ones_BT = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="needs old_logp_BT"):
        OBJECTIVES["dppo"](ones_BT, ones_BT, ones_BT > 0, DPPO())


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("ratio, expected", [
    (0.8, (0.986, 0.791)), (0.5, (0.878, 0.467)), (0.3, (0.687, 0.263)), (0.1, (0.301, 0.081)),
    (2.0, (0.878, 1.536)), (10.0, (0.301, 0.003)),
])  # fmt: skip
def test_at_the_paper_s_temperature_the_log_gate_is_heavier_on_the_left(ratio, expected):
    weights = [values_and_weights(SAPO(gate=g), [ratio], [-1.0])[1][0] for g in ("log", "ratio")]
    np.testing.assert_allclose(weights, expected, atol=5.1e-4)


def test_the_log_gate_lets_less_through_only_from_1_to_4_05():
    ratio_N = np.array([0.99, 1.01, 4.04, 4.06])
    weights = [values_and_weights(SAPO(gate=g), ratio_N, -np.ones(4))[1] for g in ("log", "ratio")]
    assert list(weights[0] < weights[1]) == [False, True, True, False]


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_has_the_temperatures_of_its_paper_and_the_width_that_is_given(gate):
    facts = GATES[gate]
    assert (SAPO(gate=gate).tau_pos, SAPO(gate=gate).tau_neg) == (facts.tau_pos, facts.tau_neg)
    width = 0.3
    cfg = SAPO(gate=gate, width_pos=width, width_neg=2 * width)
    assert cfg.tau_pos is None and cfg.temperature("pos") == pytest.approx(facts.half_width / width)
    for adv, distance in ((1.0, width), (-1.0, 2 * width)):
        for side in (-1, 1):
            ratio = 1 + side * distance
            if gate == "log":
                ratio = np.exp(side * distance)
            weight = values_and_weights(cfg, [ratio], [adv])[1][0]
            slope = weight if gate == "log" else weight / ratio
            assert slope == pytest.approx(0.5, abs=1e-12)


def test_half_widths_in_units_of_the_sigmoid_s():
    widths = {name: facts.half_width for name, facts in GATES.items()}
    assert [round(widths[name], 3) for name in GATES] == [1.763, 1.763, 1.177, 1.0, 0.766]
    shares = [widths[name] / widths["ratio"] for name in ("erf", "arctan", "softsign")]
    np.testing.assert_allclose(shares, [0.668, 0.567, 0.435], atol=5e-4)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "key", ["tau_pos_below", "tau_pos_above", "tau_neg_below", "tau_neg_above"]
)
def test_a_quadrant_s_temperature_acts_there_alone_and_leaves_value_and_slope_continuous(gate, key):
    """Of the four tokens one changes; next to r = 1 the value and the weight are those at r = 1."""
    plain = SAPO(gate=gate, tau_pos=1.0, tau_neg=1.05)
    cfg = dataclasses.replace(plain, **{key: 6.0})
    changed_token = ["tau_pos_above", "tau_neg_below", "tau_neg_above", "tau_pos_below"].index(key)
    ratios = np.concatenate([RATIO, [1 - 1e-7, 1.0, 1 + 1e-7]])
    advs = np.concatenate([ADV, np.full(3, ADV[changed_token])])
    before = np.stack(values_and_weights(plain, ratios, advs))
    after = np.stack(values_and_weights(cfg, ratios, advs))
    is_other = np.arange(7) != changed_token
    np.testing.assert_allclose(after[:, is_other], before[:, is_other], atol=1e-7)
    assert after[1, changed_token] < 0.7 * before[1, changed_token]


@pytest.mark.parametrize("gate", GATES)
def test_the_weight_that_the_checks_reckon_with_is_that_of_the_gate(gate):
    log_ratio_N = np.linspace(-4, 4, 41)
    weight_N = values_and_weights(SAPO(gate=gate, tau_neg=3.0), np.exp(log_ratio_N), -np.ones(41))[
        1
    ]
    expected_N = [gate_weight(gate, 3.0, log_ratio) for log_ratio in log_ratio_N]
    np.testing.assert_allclose(weight_N, expected_N, rtol=1e-9, atol=1e-300)
    assert LARGEST_LOG_RATIO == MAX_LOG_RATIO


# ---------------------------------------------------------------- bounds


BOUNDS = {  # bound, the sign of A, a ratio inside, the bound's, one beyond
    "neg_low": (0.5, -1.0, (0.6, 0.5, 0.4)),
    "neg_high": (2.0, -1.0, (2.9, 3.0, 3.5)),
    "pos_low": (0.5, 1.0, (0.6, 0.5, 0.4)),
    "pos_high": (1.0, 1.0, (1.9, 2.0, 2.5)),
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize(
    "cfg", [SAPO(), SAPO(gate="log"), GRPO(clip_low=0.9, clip_high=9.0), CISPO(clip_high=9.0),
            DPPO(delta=0.99)],
    ids=repr,
)  # fmt: skip
def test_a_bound_holds_the_value_beyond_it_and_changes_nothing_else(cfg, name):
    distance, adv, ratios = BOUNDS[name]
    bounded = dataclasses.replace(cfg, bounds=Bounds(**{name: distance}))
    value, weight = values_and_weights(cfg, ratios, np.full(3, adv), mu=0.1)
    held_value, held_weight = values_and_weights(bounded, ratios, np.full(3, adv), mu=0.1)
    np.testing.assert_allclose(held_value, [value[0], value[1], value[1]], rtol=1e-12)
    np.testing.assert_allclose(held_weight, [weight[0], weight[1], 0], rtol=1e-12)
    assert np.all(weight > 0)
    # The same ratios with the other sign of A.
    other = values_and_weights(cfg, ratios, np.full(3, -adv), mu=0.1)
    held_other = values_and_weights(bounded, ratios, np.full(3, -adv), mu=0.1)
    np.testing.assert_array_equal(held_other, other)


def test_grpo_with_neg_high_2_is_the_dual_clip_at_3():
    """For A < 0 the value is held at 3 A, and there is no gradient for r > 3."""
    cfg = GRPO(bounds=Bounds(neg_high=2.0))
    value, weight = values_and_weights(cfg, [2.9, 3.0, 3.5, 100.0], np.full(4, -2.0))
    np.testing.assert_allclose(value, [-5.8, -6.0, -6.0, -6.0])
    np.testing.assert_allclose(weight, [2.9, 3.0, 0, 0])


# ---------------------------------------------------------------- sequences


def test_vespo_and_topr_take_the_product_over_the_sequence():
    """r = (2, 0.5, 1.5), W = 1.5, one weight for all: 1.5^3 e^-1 = 1.2416 (its peak) for A < 0."""
    log_ratio_1T = np.log(np.array([[2.0, 0.5, 1.5]]))
    mask_1T = np.ones((1, 3), bool)
    for cfg, adv, expected in (
        (VESPO(), -1.0, 1.5**3 * np.exp(2 * (1 - 1.5))),
        (VESPO(), 1.0, 1.5**2 * np.exp(3 * (1 - 1.5))),
        (TOPR(), -1.0, 1.0),
    ):
        with jax.enable_x64(True):
            _, gradient_1T, d = _outputs(
                cfg, jnp.asarray(log_ratio_1T), np.full((1, 3), adv), mask_1T, np.zeros((1, 3))
            )
        np.testing.assert_allclose(gradient_1T, np.full((1, 3), expected * adv), rtol=1e-12)
        np.testing.assert_allclose(d["ratio"], np.full((1, 3), 1.5), rtol=1e-12)
    # W = 0.5: TOPR tapers the negative sequence and leaves the positive one.
    for adv, expected in ((-1.0, 0.5), (1.0, 1.0)):
        with jax.enable_x64(True):
            _, gradient_1T, _ = _outputs(
                TOPR(), jnp.log(jnp.array([[0.5, 0.5, 2.0]])), np.full((1, 3), adv), mask_1T,
                np.zeros((1, 3)),
            )  # fmt: skip
        np.testing.assert_allclose(gradient_1T, np.full((1, 3), expected * adv), rtol=1e-12)


@pytest.mark.parametrize("c1, c2, peak, height", [(2.0, 3.0, 2 / 3, 1.21), (3.0, 2.0, 1.5, 1.24)])
def test_vespo_s_weight_peaks_at_c1_over_c2(c1, c2, peak, height):
    ratio_N = np.linspace(0.01, 4, 1000)
    weight = values_and_weights(VESPO(c1_pos=c1, c2_pos=c2), ratio_N, np.ones(1000))[1]
    assert ratio_N[weight.argmax()] == pytest.approx(peak, abs=0.004)
    assert weight.max() == pytest.approx(height, abs=0.005)


def mask_by_hand(log_ratio_BT, adv_BT, below, mask_BT=None, segment_ids_BT=None):
    if mask_BT is None:
        mask_BT = np.ones(log_ratio_BT.shape, bool)
    return np.asarray(masked_sequences(log_ratio_BT, adv_BT, mask_BT, below, segment_ids_BT))


def test_the_sequence_mask_takes_negative_sequences_that_fell_and_no_others():
    """Means -0.375, -0.375, +0.125; strictly below -0.375 is none, below -0.25 the negative one."""
    log_ratio_BT = np.array([[-0.5, -0.25], [-0.5, -0.25], [0.5, -0.25]], np.float32)
    adv_BT = np.array([[-1.0] * 2, [1.0] * 2, [-1.0] * 2], np.float32)
    assert not mask_by_hand(log_ratio_BT, adv_BT, 0.375).any()
    np.testing.assert_array_equal(
        mask_by_hand(log_ratio_BT, adv_BT, 0.25), [[True] * 2, [False] * 2, [False] * 2]
    )


def test_the_sequence_mask_counts_trained_tokens_of_its_own_sequence():
    """In a packed row: means -0.5 (of the one token that is not masked) and -0.1."""
    log_ratio_BT = np.array([[-0.5, np.nan, -0.1, -0.1, -9.0]], np.float32)
    mask_BT = np.array([[True, False, True, True, False]])
    segment_ids_BT = np.array([[1, 1, 2, 2, 0]])
    left_out_BT = mask_by_hand(
        log_ratio_BT, -np.ones((1, 5), np.float32), 0.2, mask_BT, segment_ids_BT
    )
    np.testing.assert_array_equal(left_out_BT, [[True, False, False, False, False]])


def test_a_masked_sequence_has_no_value_and_no_weight():
    """sapo (1, 1.05) with delta < 0.3567 = -log 0.7 at the four tokens."""
    log_ratio_N1 = np.log(RATIO)[:, None]
    adv_N1 = ADV[:, None]
    mask_N1 = np.ones((4, 1), bool)

    @jax.jit
    def total(log_ratio_N1):
        output = OBJECTIVES["sapo"](log_ratio_N1, adv_N1, mask_N1, SAPO())
        left_out_N1 = masked_sequences(log_ratio_N1, adv_N1, mask_N1, 0.35)
        surrogate_N1, diagnostics = leave_out(*output, left_out_N1)
        return surrogate_N1.sum(), (surrogate_N1, diagnostics)

    with jax.enable_x64(True):
        results = jax.grad(total, has_aux=True)(jnp.asarray(log_ratio_N1))
    gradient_N1, (surrogate_N1, d) = jax.device_get(results)
    expected = [(2.2978, 1.2712), (0, 0), (-2.2023, 1.2683), (1.7022, 0.6845)]
    np.testing.assert_allclose(
        np.concatenate([surrogate_N1, gradient_N1 / adv_N1], axis=1), expected, atol=5.1e-5
    )
    np.testing.assert_allclose(d["grad_weight"], gradient_N1 / adv_N1, atol=1e-12)
    np.testing.assert_array_equal(d["clipped"][:, 0], [0, 1, 0, 0])
    np.testing.assert_array_equal(d["gate"][1], 0)
    np.testing.assert_array_equal(d["centered"][1], 0)
