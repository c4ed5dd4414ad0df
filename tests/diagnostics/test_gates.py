"""The gates, the bound they obey, clips, bins and quantiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sapo_jax.config import CISPO, GRPO, GSPO, SAPO
from sapo_jax.config.objective import GATES, Bounds
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.binning import histogram, positive_bin, signed_bin
from sapo_jax.diagnostics.gates import Gates, clipped, closed_gate, closed_log_gate, outside
from sapo_jax.objectives.grpo import grpo
from sapo_jax.objectives.gspo import gspo
from sapo_jax.objectives.sapo import sapo
from tests.diagnostics.reference import of_sequence

# One program each, instead of their single operations.
signed_bins = jax.jit(signed_bin)
positive_bins = jax.jit(positive_bin)
histogram_of = jax.jit(histogram, static_argnums=(2, 3))


def token_diagnostics(objective, z_BT, adv_BT, cfg):
    """What the objective reports of each token, where none is masked."""
    mask_BT = np.ones(z_BT.shape, bool)
    return jax.jit(objective, static_argnums=3)(z_BT, adv_BT, mask_BT, cfg)[1]


def test_settings_are_the_runs_own_or_the_papers():
    assert Gates.of(SAPO(tau_pos=0.5, tau_neg=2.0)) == Gates(0.5, 2.0, (0.2, 0.27), (3e-4, 4e-4))
    assert Gates.of(GRPO(clip_low=0.1, clip_high=0.3)) == Gates(1.0, 1.05, (0.1, 0.3), (3e-4, 4e-4))
    assert Gates.of(GSPO(clip_low=0.01, clip_high=0.02)) == Gates(
        1.0, 1.05, (0.2, 0.27), (0.01, 0.02)
    )
    assert Gates.of(CISPO()) == Gates(1.0, 1.05, (0.2, 0.27), (3e-4, 4e-4))


def test_closed_gates_by_hand():
    """tau = 2: sech^2(1) = 0.419974; r = 2, so r - 1 = 1; tiny z keep their digits, huge ones give no NaN."""
    one = np.float32(1)
    assert closed_log_gate(one, 2 * one) == pytest.approx(1 - 0.41997434, abs=1e-7)
    assert closed_gate(np.log(2 * one), 2 * one) == pytest.approx(1 - 0.41997434, abs=1e-7)
    assert closed_log_gate(np.float32(1e-5), 2 * one) == pytest.approx(1e-10, rel=1e-6)
    assert closed_gate(np.float32(-1e-5), 2 * one) == pytest.approx(1e-10, rel=1e-4)
    np.testing.assert_array_equal(closed_gate(jnp.array([20.0, 80.0]), 1.0), 1)


@pytest.mark.parametrize("tau", [0.3, 1.0, 1.05, 7.0])
def test_the_bounds_constant_is_the_supremum_of_the_second_derivative(tau):
    """sup |g''| = tau^2 / 2, by central differences in float64; and a sequence comes as near to the bound as one likes."""
    z = np.linspace(-20 / tau, 20 / tau, 400_001)
    g = 1 - closed_log_gate(z, np.float64(tau))
    second = np.diff(g, 2) / (z[1] - z[0]) ** 2
    assert np.abs(second).max() == pytest.approx(tau**2 / 2, rel=1e-5)
    assert np.abs(z[1:-1][np.abs(second).argmax()]) < 1e-3
    found = of_sequence(torch.tensor([-0.01, 0.01], dtype=torch.float64), tau)
    assert found["gap_log"] <= found["bound"] and found["gap_log"] > 0.99 * found["bound"]


def test_clips_are_those_of_the_objectives():
    """Tokens that the objectives report as clipped, on both sides of the bands and for both signs of A."""
    rng = np.random.default_rng(0)
    z_BT = rng.normal(0, 0.3, (6, 9)).astype(np.float32)
    adv_BT = np.broadcast_to(rng.choice([-1.0, 1.0], (6, 1)), z_BT.shape).astype(np.float32)
    gates = Gates.of(SAPO())
    for objective, cfg, band, z in (
        (grpo, GRPO(), gates.grpo, z_BT),
        (gspo, GSPO(), gates.gspo, z_BT.mean(1)[:, None]),
    ):
        expected_BT = token_diagnostics(objective, z_BT, adv_BT, cfg)["clipped"]
        found_BT = np.broadcast_to(clipped(np.exp(z), adv_BT, band), z_BT.shape)
        np.testing.assert_array_equal(found_BT, expected_BT)
        assert 0 < found_BT.sum() < outside(np.exp(z) + 0 * z_BT, band).sum() <= found_BT.size


@pytest.mark.parametrize("cfg", [
    SAPO(tau_pos=0.4, tau_neg=3.0), SAPO(gate="log", tau_neg_below=5.0), SAPO(gate="erf", tau_pos=1.0, tau_neg=2.0),
    SAPO(gate="arctan", width_neg=0.5), SAPO(gate="softsign"),
    SAPO(tau_pos_above=2.0, bounds=Bounds(neg_low=0.2, pos_high=0.5)), SAPO(bounds=Bounds(neg_high=2.0, pos_low=0.3)),
], ids=str)  # fmt: skip
def test_the_gate_is_that_of_the_objective(cfg):
    """Every gate, temperatures by sign and by side, and bounds; of numpy and of jax arrays; read back from a row."""
    z_BT = np.broadcast_to(np.linspace(-1.5, 1.5, 31, dtype=np.float32), (3, 31))
    adv_BT = np.broadcast_to(np.array([[1.0], [-1.0], [0.0]], np.float32), z_BT.shape)
    expected_BT = token_diagnostics(sapo, z_BT, adv_BT, cfg)["gate"]
    gates = Gates.of(cfg)
    np.testing.assert_allclose(1 - gates.closed(z_BT, adv_BT), expected_BT, rtol=2e-5, atol=1e-6)
    of_jax_BT = gates.closed(jnp.asarray(z_BT), jnp.asarray(adv_BT))
    np.testing.assert_allclose(1 - of_jax_BT, expected_BT, rtol=2e-5, atol=1e-6)


def test_the_log_gate_that_stands_for_another_gate_is_as_wide():
    """Its slope is 1/2 at the same distance from 1; of the ratio gate the temperature itself is taken."""
    for cfg in (SAPO(), SAPO(gate="log", tau_neg=5.0), SAPO(gate="erf"), SAPO(gate="softsign")):
        gates = Gates.of(cfg)
        width = GATES[cfg.gate].half_width / gates.tau_neg
        distance = np.float64(width)
        z = distance if cfg.gate == "log" else np.log1p(distance)
        closed_log = closed_log_gate(distance, np.float64(gates.log_taus[1]))
        assert closed_log == pytest.approx(0.5)
        if cfg.gate != "log":  # there it is r f'(r) that is 1/2
            assert gates.closed(z, np.float64(-1.0)) == pytest.approx(0.5)
    assert Gates.of(SAPO(tau_pos=0.4, tau_neg=3.0)).log_taus == (0.4, 3.0)


# ---------------------------------------------------------------- histograms


def test_signed_bins():
    """Symmetric about the bin of 0, contiguous, beyond +-20, and fine enough: 12 % wide in the tails."""
    edges, centers = hist.SIGNED_EDGES, hist.SIGNED_CENTERS
    np.testing.assert_array_equal(edges, -edges[::-1])
    assert len(centers) == hist.SIGNED_BINS == 173 and centers[hist.SIDE] == 0
    assert edges[-1] > 20 and edges[hist.SIDE + 1] < 1e-4
    wide = centers > 0.01
    assert np.all(np.diff(edges)[wide] / centers[wide] < 0.126)
    np.testing.assert_array_equal(signed_bins(centers.astype(np.float32)), np.arange(173))
    x = np.random.default_rng(0).normal(0, 1, 1000) * 10.0 ** np.random.default_rng(1).uniform(
        -6, 1, 1000
    )
    expected = np.clip(np.searchsorted(edges, x) - 1, 0, 172)
    np.testing.assert_array_equal(signed_bins(x.astype(np.float32)), expected)
    np.testing.assert_array_equal(
        signed_bins(np.array([np.nan, np.inf, -np.inf, 1e9])), [-1, 172, 0, 172]
    )


def test_positive_bins():
    edges = hist.POSITIVE_EDGES
    assert hist.POSITIVE_BINS == 91 and edges[0] == 0
    np.testing.assert_allclose(edges[[1, -1]], [1e-12, 1e3])
    middle = np.sqrt(edges[1:-1] * edges[2:]).astype(np.float32)
    np.testing.assert_array_equal(positive_bins(middle), np.arange(1, 91))
    np.testing.assert_array_equal(
        positive_bins(np.array([0, 1e-30, 9e-13, 1e9, np.inf, np.nan])), [0, 0, 0, 90, 90, -1]
    )


def test_histogram_counts_by_row_and_leaves_out_what_is_not_valid():
    bins, rows = np.array([[0, 1, 1], [2, -1, 1]]), np.array([[0, 0, 1], [1, 0, -1]])
    found = histogram_of(bins, rows, 2, 3)
    np.testing.assert_array_equal(found, [[1, 1, 0], [0, 1, 1]])
    assert found.dtype == jnp.int32


@pytest.mark.parametrize("xp", [np, jnp])
def test_quantiles_are_within_a_bin(xp):
    x = np.random.default_rng(0).normal(0.02, 0.3, 20_000).astype(np.float32)
    no_rows = np.zeros(len(x), int)
    counts = xp.asarray(histogram_of(signed_bins(x), no_rows, 1, hist.SIGNED_BINS))[0]
    for q in (0.01, 0.25, 0.5, 0.99):
        assert hist.quantile(counts, hist.SIGNED_EDGES, q) == pytest.approx(
            np.quantile(x, q), rel=0.13, abs=2e-4
        )
        folded, edges = hist.magnitudes(counts)
        assert folded.sum() == len(x) and len(edges) == len(folded) + 1
        assert hist.quantile(folded, edges, q) == pytest.approx(
            np.quantile(np.abs(x), q), rel=0.13, abs=2e-4
        )
    assert hist.quantile(xp.zeros(3, int), np.arange(4.0), 0.5) == 0
    np.testing.assert_allclose(hist.quantile(xp.asarray([0, 4, 0, 4]), np.arange(5.0), 0.75), 3.5)


def test_quantiles_of_a_function_that_is_not_monotone():
    """The values 4 1 0 1 4, twenty of each but forty of the first."""
    counts, values = np.array([40, 20, 20, 20, 20]), np.array([-2.0, -1, 0, 1, 2]) ** 2
    assert hist.weighted_quantiles(values, counts, (0.1, 0.4, 0.9)) == [0.0, 1.0, 4.0]
    assert hist.weighted_quantiles(values, 0 * counts, (0.5,)) == []


def test_trimming_loses_nothing():
    for counts in (
        np.zeros(5, int),
        np.array([0, 3, 0, 2, 0]),
        np.array([1, 0, 0, 0, 9]),
        np.array([0, 0, 0, 0, 1]),
    ):
        np.testing.assert_array_equal(hist.untrim(hist.trim(counts), 5), counts)
    assert hist.trim(np.array([0, 3, 0, 2, 0])) == [1, [3, 0, 2]]
    with pytest.raises(ValueError, match="up to bin 6, but there are 5"):
        hist.untrim([3, [1, 2, 3]], 5)
