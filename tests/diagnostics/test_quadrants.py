"""The quadrants: a hand-worked example, numpy in float64, autodiff of every objective, invariances, rows."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.config import CISPO, GRPO, GSPO
from sapo_jax.diagnostics import (
    Gates,
    evidence_row,
    finalize_evidence,
    read_evidence,
    reduce_evidence,
    stack_evidence,
)
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.quadrants import (
    POSITIONS,
    PROBABILITIES,
    PROBABILITY_EDGES,
    QUADRANTS,
    RATIO_BINS,
    RATIO_EDGES,
    indices,
)
from sapo_jax.objectives import OBJECTIVES
from tests.diagnostics.test_evidence import (
    GSPO_LIKE,
    assert_same,
    compiled,
    evidence_of,
    example,
    rows_of,
    sequence,
)
from tests.models.tiny import quick_jit


def reported(tokens, cfg) -> dict:
    """What an objective reports of these tokens."""
    objective = OBJECTIVES[cfg.name]
    _, own = objective(
        tokens["log_ratio_BT"],
        tokens["adv_BT"],
        tokens["mask_BT"],
        cfg,
        segment_ids_BT=tokens["segment_ids_BT"],
    )
    return jax.device_get({name: own[name] for name in ("gate", "grad_weight")})


def evidence_with(tokens, own):
    """The evidence of an objective that reports `own` of each token."""
    return jax.device_get(compiled(tokens | own))


# ---------------------------------------------------------------- numbers


def six_tokens() -> dict[str, np.ndarray]:
    """A = 2 with r = (2, 0.5, 1), and A = -1 with r = (0.5, 1.3, 0.9), packed into one row."""
    rng = np.random.default_rng(0)
    tokens = rows_of(
        [sequence(rng, 1, 3, 2.0, 0.0), sequence(rng, 1, 3, -1.0, 0.0)], 2, 14, np.nan, 12
    )
    r_T = np.array([2, 0.5, 1, 0.5, 1.3, 0.9], np.float32)
    tokens["log_ratio_BT"][tokens["mask_BT"]] = np.log(r_T)
    tokens["logp_BT"][tokens["mask_BT"]] = np.log(np.float32(0.4))
    tokens["collision_BT"][tokens["mask_BT"]] = 0.4**2 + 0.6**2  # of two tokens
    return tokens


def test_six_tokens_by_hand():
    """GRPO closes r = 2 where A > 0 and r = 0.5 where A < 0. |A| w: 0, 1, 2 and 0, 1.3, 0.9; together 5.2.

    r - 1 - log r: 0.306853, 0.193147, 0 and 0.193147, 0.037636, 0.005361; together 0.736144. s_i = 1 and
    0.585^(1/3) = 0.836. r = 1 and s_i = 1 are in no quadrant. The old probabilities are 0.4 / r: 0.2, 0.8, 0.4 and 0.8,
    0.308, 0.444.
    """
    tokens = six_tokens()
    found = evidence_with(tokens, reported(tokens, GRPO()))
    metrics = finalize_evidence(found)
    expected = {
        "pos_below": (1 / 6, 1, 1, 0.5, 1 / 5.2, 0.193147),
        "pos_above": (1 / 6, 1, 0, 0, 0, 0.306853),
        "neg_below": (2 / 6, 0.5, 0.5, 0.45, 0.9 / 5.2, 0.198508),
        "neg_above": (1 / 6, 1, 1, 1.3, 1.3 / 5.2, 0.037636),
    }
    names = (
        "token_fraction",
        "outside_fraction",
        "gate_mean",
        "grad_weight_mean",
        "grad_share",
        "kl_share",
    )
    for quadrant, values in expected.items():
        of_quadrant = {name: metrics[f"quadrant/{quadrant}/{name}"] for name in names}
        values = (*values[:-1], values[-1] / 0.736144)
        assert of_quadrant == pytest.approx(dict(zip(names, values, strict=True)), rel=1e-5), (
            quadrant
        )

    of_sequences = {name: x for name, x in metrics.items() if name.startswith("sequence_quadrant/")}
    values = (1 / 2, 1, 2 / 3, 2.2 / 3, 2.2 / 5.2, 0.236144 / 0.736144)
    for name, value in zip(("sequence_fraction", *names[1:]), values, strict=True):
        name = f"sequence_quadrant/neg_below/{name}"
        assert of_sequences.pop(name) == pytest.approx(value, rel=1e-5), name
    # Nothing is in the other three: shares of 0, and no means.
    assert {name.rpartition("/")[2] for name in of_sequences} == {
        "sequence_fraction", "grad_share", "kl_share",
    }  # fmt: skip
    assert set(of_sequences.values()) == {0}
    assert metrics["sequence/neg_mean_log_ratio_p50"] == pytest.approx(np.log(0.585) / 3, rel=0.13)

    quadrants = found.quadrants
    parts = quadrants.position_histogram.sum(axis=2).tolist()
    assert parts == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    buckets = quadrants.probability_histogram.sum(axis=2).tolist()
    assert buckets == [[0, 0, 0, 2, 1, 0], [0, 0, 0, 2, 1, 0], [0] * 6]
    assert quadrants.position_histogram[0, 2, RATIO_EDGES.index(1.001)] == 1  # r = 1
    assert quadrants.mean_histogram[0, hist.SIDE] == 1 and quadrants.mean_histogram.sum() == 2


def reference(tokens, own) -> dict[str, np.ndarray]:
    """All sums and histograms, by loops over sequences and their tokens, in float64."""
    sums = {
        f"{of}/{name}": np.zeros((3, 3))
        for of in ("tokens", "sequences")
        for name in ("count", "outside", "gate", "grad_weight", "gradient", "kl")
    }
    histograms = {
        "mean": np.zeros((3, hist.SIGNED_BINS)),
        "position": np.zeros((3, POSITIONS, RATIO_BINS)),
        "probability": np.zeros((3, PROBABILITIES, RATIO_BINS)),
    }

    def bin_of(x: float, edges: np.ndarray) -> int:
        return int(np.clip(np.searchsorted(edges, x) - 1, 0, len(edges) - 2))

    wide = {name: x.astype(np.float64) for name, x in tokens.items() if x.dtype.kind == "f"}
    for b in range(len(tokens["mask_BT"])):
        for i in np.unique(tokens["segment_ids_BT"][b]):
            places = np.flatnonzero((tokens["segment_ids_BT"][b] == i) & tokens["mask_BT"][b])
            if not len(places):
                continue
            adv = wide["adv_BT"][b, places[0]]
            sign = 0 if adv > 0 else 1 if adv < 0 else 2
            mean = wide["log_ratio_BT"][b, places].mean()
            of_sequence = sign, 1 + int(np.sign(mean))
            s = np.exp(mean)
            sums["sequences/count"][of_sequence] += 1
            sums["sequences/outside"][of_sequence] += s < 0.95 or s > 1.08
            histograms["mean"][sign, bin_of(mean, hist.SIGNED_EDGES)] += 1
            for rank, t in enumerate(places):
                z = wide["log_ratio_BT"][b, t]
                logp = wide["logp_BT"][b, t]
                of_token = sign, 1 + int(np.sign(z))
                w = float(own["grad_weight"][b, t])
                norm = np.sqrt(1 - 2 * np.exp(logp) + wide["collision_BT"][b, t])
                values = {
                    "gate": float(own["gate"][b, t]),
                    "grad_weight": w,
                    "gradient": wide["weight_BT"][b, t] * abs(adv * w) * norm,
                    "kl": np.exp(z) - 1 - z,
                }
                sums["tokens/count"][of_token] += 1
                sums["tokens/outside"][of_token] += np.exp(z) < 0.8 or np.exp(z) > 1.27
                for name, value in values.items():
                    sums[f"tokens/{name}"][of_token] += value
                    divisor = len(places) if name in ("gate", "grad_weight") else 1
                    sums[f"sequences/{name}"][of_sequence] += value / divisor
                coarse = int(np.searchsorted(RATIO_EDGES, np.exp(z), side="right"))
                histograms["position"][sign, rank * POSITIONS // len(places), coarse] += 1
                bucket = np.searchsorted(PROBABILITY_EDGES, np.exp(logp - z), side="right")
                histograms["probability"][sign, bucket, coarse] += 1
    return sums | histograms


def test_against_loops_in_float64():
    """Three sequences a row, any gate and weight (also negative ones, as of a pull back), padding of NaN."""
    tokens = rows_of(example(1, 30, 0.3), 3, 45, pad=np.nan)
    rng = np.random.default_rng(2)
    own = {
        "gate": rng.uniform(0, 1, tokens["mask_BT"].shape).astype(np.float32),
        "grad_weight": rng.uniform(-0.2, 1.5, tokens["mask_BT"].shape).astype(np.float32),
    }
    found = evidence_with(tokens, own).quadrants
    expected = reference(tokens, own)
    for of in ("tokens", "sequences"):
        for name in ("count", "outside", "gate", "grad_weight", "gradient", "kl"):
            value = getattr(getattr(found, of), name)
            np.testing.assert_allclose(value, expected[f"{of}/{name}"], rtol=3e-5, err_msg=name)
            assert expected[f"{of}/{name}"][:2, [0, 2]].all(), name  # no quadrant is empty
    np.testing.assert_array_equal(found.position_histogram, expected["position"])
    np.testing.assert_array_equal(found.probability_histogram, expected["probability"])
    # A mean may fall into the next bin by its rounding.
    moved = np.abs(found.mean_histogram.cumsum(axis=1) - expected["mean"].cumsum(axis=1))
    assert moved.max() <= 1
    assert (expected["probability"].sum(axis=(0, 2)) > 0).sum() >= 4


@pytest.mark.parametrize(
    "cfg", [GRPO(), GSPO(clip_low=0.05, clip_high=0.08), CISPO()], ids=lambda cfg: cfg.name
)
def test_the_gradient_is_that_of_the_objective_in_use(cfg):
    """Against autodiff: norms of the gradient of loss = -sum(weight surrogate) on the logits, by quadrant."""
    tokens = rows_of(example(3, 8, 0.3), 2, 30, num_rows=12)
    tokens["tokens_BT"] %= 11
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(0, 3, (*tokens["mask_BT"].shape, 11)).astype(np.float32)
    log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    tokens["logp_BT"] = np.take_along_axis(log_p_BTV, tokens["tokens_BT"][..., None], -1)[..., 0]
    tokens["collision_BT"] = np.exp(2 * log_p_BTV).sum(-1)
    old_logp_BT = tokens["logp_BT"] - tokens["log_ratio_BT"]

    def loss(logits_BTV):
        index_BT1 = tokens["tokens_BT"][..., None]
        logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), index_BT1, -1)[..., 0]
        surrogate_BT, _ = OBJECTIVES[cfg.name](
            logp_BT - old_logp_BT,
            tokens["adv_BT"],
            tokens["mask_BT"],
            cfg,
            segment_ids_BT=tokens["segment_ids_BT"],
        )
        return -jnp.sum(tokens["weight_BT"] * surrogate_BT)

    norms_BT = np.linalg.norm(quick_jit(jax.grad(loss))(logits_BTV), axis=-1)
    found = evidence_with(tokens, reported(tokens, cfg)).quadrants
    for quadrant in QUADRANTS:
        sign = tokens["adv_BT"] > 0 if quadrant.startswith("pos") else tokens["adv_BT"] < 0
        z_BT = tokens["log_ratio_BT"]
        side = z_BT < 0 if quadrant.endswith("below") else z_BT > 0
        here = indices(quadrant)
        expected = norms_BT[sign & side].sum()
        assert found.tokens.gradient[here] == pytest.approx(expected, rel=2e-4), quadrant


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize(("per_row", "T"), [(2, 30), (3, 45)])
def test_packing_and_padding_change_nothing(per_row, T):
    sequences = example(2, 24, 0.2)
    alone = evidence_of(rows_of(sequences, 1, 14))
    assert_same(evidence_of(rows_of(sequences, per_row, T, np.nan)).quadrants, alone.quadrants)


def test_micro_batches_add_up():
    whole = rows_of(example(5, 24, 0.2), 1, 14)
    parts = [{name: x[half] for name, x in whole.items()} for half in (slice(0, 12), slice(12, 24))]
    summed = reduce_evidence(stack_evidence([evidence_of(part) for part in parts]))
    assert_same(summed.quadrants, evidence_of(whole).quadrants)


# ---------------------------------------------------------------- nothing to take a mean of


def test_what_there_is_nothing_of_is_not_logged():
    """All A = 0: no gradient, no gate of a quadrant; only counts and KL. No token at all: nothing."""
    tokens = rows_of(example(1, 12, 0.2), 1, 14)
    no_signal = finalize_evidence(
        evidence_of({**tokens, "adv_BT": np.zeros_like(tokens["adv_BT"])})
    )
    names = {name for name in no_signal if "quadrant/" in name}
    assert {name.rpartition("/")[2] for name in names} == {
        "token_fraction", "sequence_fraction", "kl_share",
    }  # fmt: skip
    assert {no_signal[name] for name in names} == {0}
    assert not any(name.startswith(("grad_share/", "sequence/")) for name in no_signal)
    nothing = evidence_of({**tokens, "mask_BT": np.zeros_like(tokens["mask_BT"])})
    assert finalize_evidence(nothing) == {"a2/breaches": 0}


def test_a_nan_at_a_trained_token_shows_in_its_quadrant_alone():
    tokens = six_tokens()
    tokens["log_ratio_BT"][0, 1] = np.nan
    own = reported(tokens, GRPO())
    found = evidence_with(tokens, own).quadrants
    assert np.isnan(found.tokens.kl[0, 1]) and np.isfinite(found.tokens.kl[1:]).all()
    assert np.isnan(finalize_evidence(evidence_with(tokens, own))["quadrant/pos_above/kl_share"])


# ---------------------------------------------------------------- rows


def test_a_row_goes_through_json_and_back_and_an_older_one_has_no_quadrants():
    parts = [evidence_of(rows_of(example(i, 24, 0.05 * (i + 1)), 2, 30)) for i in range(2)]
    row = json.loads(json.dumps(evidence_row([stack_evidence(parts)], GSPO_LIKE), allow_nan=False))
    found, _ = read_evidence(row)
    assert_same(found.quadrants, reduce_evidence(stack_evidence(parts)).quadrants, float_rtol=1e-6)
    older = {name: value for name, value in row.items() if name != "quadrants"}
    found, gates = read_evidence(older)
    assert found.quadrants is None and gates == GSPO_LIKE
    assert not any("quadrant" in name for name in finalize_evidence(found))


@pytest.mark.parametrize("spoil", [
    lambda row: row.pop("tokens"), lambda row: row["tokens"].pop("kl"), lambda row: row["sequences"].update(gate=[1.0]),
    lambda row: row["mean_histogram"].pop(), lambda row: row.update(position_histogram=[[15, [1]]] * 12),
])  # fmt: skip
def test_quadrants_of_another_form_are_refused(spoil):
    row = evidence_row([stack_evidence([evidence_of(rows_of(example(), 1, 14))])], Gates.of(GRPO()))
    spoil(row["quadrants"])
    with pytest.raises(ValueError, match="not a row of diagnostics"):
        read_evidence(row)
