"""The evidence for A1 and A2 against float64 loops; its invariances; extreme, masked and empty inputs; its rows."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from sapo_jax.batch import Batch
from sapo_jax.config import SAPO
from sapo_jax.diagnostics import (
    Gates,
    collect_evidence,
    evidence_row,
    finalize_evidence,
    ratio_quantiles,
    read_evidence,
    reduce_evidence,
)
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.binning import positive_bin
from sapo_jax.diagnostics.evidence import NO_SEQUENCE, SAMPLE, stack_evidence
from sapo_jax.diagnostics.quadrants import SIGNS
from sapo_jax.diagnostics.rows import sums_by_name
from sapo_jax.diagnostics.sequences import sequence_statistics
from sapo_jax.io.files import plain_json
from sapo_jax.objectives.sapo import sapo
from sapo_jax.objectives.weights import token_weights
from tests.diagnostics.reference import of_rows, of_sequence
from tests.models.tiny import quick_jit

SAMPLED = ("length", "mean", "variance", "gap_log", "gap_real", "adv")  # also in `reference`

GATES = Gates.of(SAPO(tau_pos=0.8, tau_neg=1.7))
GSPO_LIKE = dataclasses.replace(
    GATES, gspo=(0.05, 0.08)
)  # a band that some sequences of the example leave, and some not


def batch_of(tokens) -> Batch:
    unused = dict.fromkeys(("prefix_ids_BT", "picked_BM", "source_BM"), tokens["segment_ids_BT"])
    used = {name: x for name, x in tokens.items() if name in Batch.__dataclass_fields__}
    return Batch(**unused, **used)


def with_own(tokens, gates=GSPO_LIKE):
    """The tokens with what SAPO reports of them, `gate` and `grad_weight`, in numpy."""
    z_BT = np.clip(np.where(tokens["mask_BT"], tokens["log_ratio_BT"], 0), -20, 20)
    is_live_BT = tokens["mask_BT"] & ~(np.abs(tokens["log_ratio_BT"]) > 20)
    tau_BT = np.where(tokens["adv_BT"] > 0, gates.tau_pos, gates.tau_neg)
    x_BT = np.clip(tau_BT / 2 * np.expm1(z_BT), -40, 40)
    gate_BT = np.where(is_live_BT, 1 / np.cosh(x_BT) ** 2, 0)
    own = {"gate": gate_BT, "grad_weight": np.exp(z_BT) * gate_BT}
    return tokens | {name: x_BT.astype(np.float32) for name, x_BT in own.items()}


def collect(tokens, gates=GSPO_LIKE):
    """Of the tokens `with_own`."""
    return collect_evidence(
        tokens["log_ratio_BT"],
        batch_of(tokens),
        gates,
        tokens["logp_BT"],
        {name: tokens[name] for name in ("gate", "grad_weight")},
        tokens["collision_BT"],
    )


compiled = functools.partial(quick_jit, static_argnames="gates")(collect)


def evidence_of(tokens, gates=GSPO_LIKE):
    return jax.device_get(compiled(with_own(tokens, gates), gates))


positive_bins = jax.jit(positive_bin)
statistics_of_sequences = quick_jit(sequence_statistics, static_argnums=4)


def sequence(rng, n_prompt: int, n: int, adv: float, spread: float) -> dict[str, np.ndarray]:
    """One sequence: prompt tokens, then n trained ones whose log-ratios are multiples of 2^-10 (exact sums)."""
    length = n_prompt + n
    logp = rng.uniform(-3, -0.01, length).astype(np.float32)
    z = np.round(rng.normal(rng.normal(0, spread), spread, length) * 1024) / 1024
    return {
        "tokens_BT": rng.integers(0, 1000, length).astype(np.int32),
        "positions_BT": np.arange(length, dtype=np.int32),
        "mask_BT": np.arange(length) >= n_prompt,
        "adv_BT": np.full(length, adv, np.float32),
        "log_ratio_BT": z.astype(np.float32),
        "logp_BT": logp,
        "collision_BT": np.exp(2 * logp)
        + rng.uniform(0, 1, length).astype(np.float32) * (1 - np.exp(logp)) ** 2,
    }


def example(seed: int = 0, n: int = 12, spread: float = 0.1) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        sequence(rng, int(rng.integers(1, 5)), int(rng.integers(1, 9)), adv, spread)
        for adv in rng.choice([-0.5, 0, 2.0], n)
    ]


def rows_of(
    sequences: list[dict], per_row: int, T: int, pad: float = 0.0, num_rows: int = 0
) -> dict[str, np.ndarray]:
    """`per_row` sequences packed into each row of T slots; what is left is padding that holds `pad`.

    Rows of padding alone follow, where there are fewer than `num_rows`: so tests with few sequences
    share the compiled programs of those with (12, 14), (12, 30) and (10, 45) rows and tokens.
    """

    def padding(x: np.ndarray, n: int) -> np.ndarray:
        return np.full(n, pad if x.dtype.kind == "f" else 0, x.dtype)

    rows = []
    for start in range(0, len(sequences), per_row):
        packed = sequences[start : start + per_row]
        ids = np.concatenate(
            [np.full(len(s["mask_BT"]), i + 1, np.int32) for i, s in enumerate(packed)]
        )
        row = {name: np.concatenate([s[name] for s in packed]) for name in packed[0]} | {
            "segment_ids_BT": ids
        }
        rows.append(
            {name: np.concatenate([x, padding(x, T - len(ids))]) for name, x in row.items()}
        )
    empty_row = {name: padding(x, T) for name, x in rows[0].items()}
    rows += [empty_row] * (num_rows - len(rows))
    tokens = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    tokens["weight_BT"] = token_weights(
        tokens["mask_BT"], tokens["segment_ids_BT"], "sequence_mean", 8
    )
    return tokens


def assert_same(a, b, float_rtol=2e-5):
    """Counts, histograms and the sampled sequences exactly; float sums to their rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    expected = dict(jax.tree.leaves_with_path(b))
    for path, x in jax.tree.leaves_with_path(a):
        name = jax.tree_util.keystr(path)
        if np.asarray(expected[path]).dtype.kind in "iu":
            np.testing.assert_array_equal(x, expected[path], err_msg=name)
        else:
            np.testing.assert_allclose(x, expected[path], rtol=float_rtol, atol=1e-9, err_msg=name)


# ---------------------------------------------------------------- numbers


def test_by_hand():
    """tau = 2, A = 1. z = (0, 0.2): mean 0.1, Var 0.01, bound 0.01. Of g = sech^2(z): (1 + 0.961043)/2 - 0.990066 =
    -0.009545. Of f' at r - 1 = (0, 0.221403; mean 0.105171): (1 + 0.952539)/2 - 0.989020 = -0.012750, above the bound.
    GRPO clips none at 0.27, GSPO clips both (s = 1.105). Weights 1/2 each."""
    gates = Gates.of(SAPO(tau_pos=2.0))
    tokens = rows_of([sequence(np.random.default_rng(0), 1, 2, 1.0, 0.0)], 1, 5, pad=np.nan)
    tokens["log_ratio_BT"][0, 1:3] = 0.0, 0.2
    tokens["logp_BT"][0, 1:3] = np.log([0.5, 0.25])
    tokens["collision_BT"][0, 1:3] = (
        0.5,
        0.4375,
    )  # p = (1/2, 1/2); p = (1/4, 1/4, 1/2) + rounding of nothing: 0.375
    tokens["collision_BT"][0, 2] = 0.375
    found = evidence_of(tokens, gates)
    sums = sums_by_name(found)
    of_positive = {name: float(x[0]) for name, x in sums.items() if x.ndim == 1}
    f1 = 1 / np.cosh(np.expm1(0.2)) ** 2
    w0, w1 = 1.0, np.exp(0.2) * f1
    norms = np.sqrt(0.5), np.sqrt(0.75**2 + 0.375 - 0.0625)  # ||e_y - p||
    expected = {
        "tokens": 2, "sequences": 1, "variance": 0.01, "bound": 0.01, "gap_log": 0.0095448, "gap_real": 0.0127504,
        "breaches_log": 0, "breaches_real": 1, "abs_log_ratio": 0.2, "gate": 1 + f1, "grad_weight": w0 + w1,
        "grad_weight_squared": 1 + w1**2, "gate_error": 1 / np.cosh(0.2) ** 2 - f1,
        "coefficient/total": (w0 + w1) / 2, "coefficient/grpo_clipped": 0, "coefficient/grpo_outside": 0,
        "coefficient/gspo_clipped": (w0 + w1) / 2, "coefficient/gspo_outside": (w0 + w1) / 2,
        "logits/total": (w0 * norms[0] + w1 * norms[1]) / 2, "logits/grpo_clipped": 0, "logits/grpo_outside": 0,
        "logits/gspo_clipped": (w0 * norms[0] + w1 * norms[1]) / 2,
        "logits/gspo_outside": (w0 * norms[0] + w1 * norms[1]) / 2,
    }  # fmt: skip
    assert of_positive == pytest.approx(expected, rel=2e-5, abs=1e-7)
    assert all(not x[1:].any() for x in sums.values())  # nothing with A <= 0
    assert found.sample.length.tolist() == [2] + [0] * (SAMPLE - 1)
    metrics = {name: float(x) for name, x in finalize_evidence(found).items()}
    assert metrics["effective_tokens/fraction"] == pytest.approx(
        (w0 + w1) ** 2 / (2 * (1 + w1**2)), rel=1e-6
    )
    assert metrics["grad_share/gspo_clipped"] == metrics["grad_share/gspo_clipped_above"] == 1
    assert metrics["grad_share/gspo_clipped_below"] == 0
    assert "effective_tokens/neg_fraction" not in metrics  # no token has A < 0
    assert metrics["a1/abs_log_ratio_max"] == pytest.approx(0.2) and metrics["a2/breaches"] == 0
    assert metrics["a2/gap_real_above_bound_fraction"] == 1


def test_sequences_against_float64_loops():
    """Three sequences in a row, spreads from tiny to large: sums, histograms and the sample of the reference."""
    sequences = [
        s for i, spread in enumerate((1e-3, 0.05, 0.4, 2.0)) for s in example(i, 6, spread)
    ]
    tokens = rows_of(sequences, 3, 45, pad=np.nan, num_rows=10)
    found = evidence_of(tokens)
    reference = of_rows(
        *(tokens[n] for n in ("log_ratio_BT", "adv_BT", "mask_BT", "segment_ids_BT")), GATES
    )
    sums = sums_by_name(found)
    assert len(reference) == 24
    for i, sign in enumerate(SIGNS):
        mine = [
            r
            for r in reference
            if {"pos": r["adv"] > 0, "neg": r["adv"] < 0, "zero": r["adv"] == 0}[sign]
        ]
        assert mine and found.sequences.count[i] == len(mine)
        for name in ("variance", "gap_log", "gap_real", "bound"):
            expected = np.array([r[name] for r in mine])
            assert sums[name][i] == pytest.approx(expected.sum(), rel=1e-5)
            if name != "bound":
                bins = np.asarray(positive_bins(expected.astype(np.float32)))
                clear = np.all(
                    np.abs(
                        sums[f"{name}_histogram"][i].cumsum()
                        - np.bincount(bins, minlength=91).cumsum()
                    )
                    <= 1
                )
                assert clear and sums[f"{name}_histogram"][i].sum() == len(mine)
        assert found.sequences.breaches_real[i] == sum(r["gap_real"] > r["bound"] for r in mine)
    assert found.largest.variance.max() == pytest.approx(
        max(r["variance"] for r in reference), rel=1e-5
    )
    sampled = sorted(
        zip(*(getattr(found.sample, name)[:24].tolist() for name in SAMPLED), strict=True)
    )
    expected = sorted(tuple(r[name] for name in SAMPLED) for r in reference)
    np.testing.assert_allclose(sampled, expected, rtol=1e-4, atol=1e-7)


def test_tokens_against_the_objective_and_numpy():
    tokens = rows_of(example(1, 30, 0.3), 3, 45)
    mask_BT, adv_BT, z_BT = (
        tokens["mask_BT"],
        tokens["adv_BT"],
        tokens["log_ratio_BT"].astype(np.float64),
    )
    found = evidence_of(tokens)
    sums = sums_by_name(found)
    _, own = jax.device_get(
        quick_jit(sapo, static_argnums=3)(
            tokens["log_ratio_BT"], adv_BT, mask_BT, SAPO(tau_pos=0.8, tau_neg=1.7)
        )
    )
    tau_BT, r_BT = np.where(adv_BT > 0, 0.8, 1.7), np.exp(z_BT)
    gate_BT, log_gate_BT = (
        1 / np.cosh(tau_BT / 2 * (r_BT - 1)) ** 2,
        1 / np.cosh(tau_BT / 2 * z_BT) ** 2,
    )
    p_BT = np.exp(tokens["logp_BT"].astype(np.float64))
    norm_BT = np.sqrt(np.where(mask_BT, 1 - 2 * p_BT + tokens["collision_BT"], 0))
    coefficient_BT = tokens["weight_BT"] * np.abs(adv_BT) * r_BT * gate_BT
    grpo_BT = np.where(adv_BT > 0, r_BT > 1.27, (adv_BT < 0) & (r_BT < 0.8))
    for sign, mine_BT in enumerate(
        (mask_BT & (adv_BT > 0), mask_BT & (adv_BT < 0), mask_BT & (adv_BT == 0))
    ):
        expected = {
            "abs_log_ratio": np.abs(z_BT), "gate": own["gate"], "grad_weight": own["grad_weight"],
            "grad_weight_squared": (r_BT * gate_BT) ** 2, "gate_error": np.abs(gate_BT - log_gate_BT),
            "coefficient/total": coefficient_BT, "logits/total": coefficient_BT * norm_BT,
            "coefficient/grpo_clipped": coefficient_BT * grpo_BT, "logits/grpo_clipped": coefficient_BT * grpo_BT * norm_BT,
            "logits/grpo_outside": coefficient_BT * norm_BT * ((r_BT > 1.27) | (r_BT < 0.8)),
        }  # fmt: skip
        for name, x_BT in expected.items():
            assert sums[name][sign] == pytest.approx(float(x_BT[mine_BT].sum()), rel=2e-5), name
        counts = np.histogram(z_BT[mine_BT], hist.SIGNED_EDGES)[0]
        np.testing.assert_array_equal(found.tokens.log_ratio_histogram[sign], counts)
        assert found.tokens.count[sign] == mine_BT.sum() > 0
    shares = finalize_evidence(found)
    assert 0.02 < shares["grad_share/grpo_clipped"] < shares["grad_share/grpo_outside"] < 1
    assert 0.02 < shares["grad_share/gspo_clipped"] < shares["grad_share/gspo_outside"] < 1


def test_the_norm_is_that_of_the_losses_gradient_on_the_logits():
    """Against autodiff: loss = -sum(weight surrogate) as a function of the logits; each position's norm, summed."""
    tokens = rows_of(example(3, 8, 0.3), 2, 30, num_rows=12)
    rng = np.random.default_rng(0)
    tokens["tokens_BT"] %= 11
    logits_BTV = rng.normal(0, 3, (*tokens["mask_BT"].shape, 11)).astype(np.float32)

    def gather(logits_BTV):
        index_BT1 = tokens["tokens_BT"][..., None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), index_BT1, -1)[..., 0]

    tokens["logp_BT"] = np.asarray(quick_jit(gather)(logits_BTV))
    tokens["collision_BT"] = (scipy.special.softmax(logits_BTV, axis=-1) ** 2).sum(-1)
    tokens["correction_BT"] = rng.uniform(0.5, 2, tokens["mask_BT"].shape).astype(np.float32)
    old_logp_BT = tokens["logp_BT"] - tokens["log_ratio_BT"]

    def loss(logits_BTV):
        log_ratio_BT = gather(logits_BTV) - old_logp_BT
        surrogate_BT, _ = sapo(
            log_ratio_BT, tokens["adv_BT"], tokens["mask_BT"], SAPO(tau_pos=0.8, tau_neg=1.7)
        )
        return -jnp.sum(tokens["weight_BT"] * tokens["correction_BT"] * surrogate_BT)

    norms_BT = np.linalg.norm(quick_jit(jax.grad(loss))(logits_BTV), axis=-1)
    assert evidence_of(tokens).logits.total.sum() == pytest.approx(norms_BT.sum(), rel=1e-5)


def test_a_certain_token_has_a_norm_of_its_own_rounding():
    """p_y = 1 - 1e-6: sum p^2 has no digits left for the others, so the norm is between 1 and sqrt(2) times 1 - p_y."""
    tokens = rows_of(example(4, 4), 1, 14, num_rows=12)
    tokens["logp_BT"][:], tokens["collision_BT"][:] = np.float32(-1e-6), np.float32(1.0)
    found = evidence_of(tokens)
    ratio = found.logits.total.sum() / found.coefficient.total.sum() / 1e-6
    assert 0.999 < ratio < 1.42


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize(("per_row", "T"), [(1, 13), (1, 20), (2, 30), (3, 40), (4, 60)])
def test_packing_and_padding_change_nothing(per_row, T):
    sequences = example(2, 24, 0.2)
    alone = evidence_of(rows_of(sequences, 1, 16))
    assert_same(evidence_of(rows_of(sequences, per_row, T, pad=np.nan)), alone)


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_micro_batches_add_up(micro_batches):
    """In a scan and reduced on the host, as in training. 48 sequences, of which the sample keeps SAMPLE."""
    tokens = with_own(rows_of(example(5, 48, 0.2), 2, 30))
    whole = evidence_of(tokens)
    parts = {name: x.reshape(micro_batches, -1, *x.shape[1:]) for name, x in tokens.items()}
    stacked = quick_jit(
        lambda parts: jax.lax.scan(lambda _, part: (None, collect(part)), None, parts)[1]
    )(parts)
    assert_same(reduce_evidence(jax.device_get(stacked)), whole)
    assert_same(jax.device_get(quick_jit(reduce_evidence)(stacked)), whole)
    assert (whole.sample.fingerprint != NO_SEQUENCE).all()


def test_the_order_of_rows_and_tokens_changes_nothing_but_rounding():
    """Rows permuted; and the trained tokens of a sequence permuted (prompt and fingerprint apart)."""
    sequences = example(6, 24, 0.2)
    tokens = rows_of(sequences, 2, 30)
    whole = evidence_of(tokens)
    order = np.random.default_rng(0).permutation(12)
    assert_same(evidence_of({name: x[order] for name, x in tokens.items()}), whole)
    shuffled = []
    for i, s in enumerate(sequences):
        order = np.arange(len(s["mask_BT"]))
        order[s["mask_BT"]] = np.random.default_rng(i).permutation(order[s["mask_BT"]])
        shuffled.append(
            {
                name: x if name in ("tokens_BT", "positions_BT") else x[order]
                for name, x in s.items()
            }
        )
    found = evidence_of(rows_of(shuffled, 2, 30))
    # Where in its sequence a token stands is all that has changed.
    unplaced = [
        dataclasses.replace(
            evidence,
            quadrants=dataclasses.replace(
                evidence.quadrants,
                position_histogram=evidence.quadrants.position_histogram.sum(axis=1),
            ),
        )
        for evidence in (found, whole)
    ]
    assert_same(*unplaced)


def test_the_sample_is_one_of_all_sequences():
    """No position in the batch is preferred: over many batches of 64, each place is taken about half the time."""
    taken = np.zeros(64)
    tokens = rows_of([sequence(np.random.default_rng(i), 2, 2, 1.0, 0.1) for i in range(64)], 1, 4)
    for seed in range(40):
        tokens["tokens_BT"] = (
            np.random.default_rng(seed).integers(0, 1000, (64, 4)).astype(np.int32)
        )
        tokens["log_ratio_BT"][:, 2:] = np.arange(64)[:, None] / 64  # the mean tells the place
        chosen = np.round(evidence_of(tokens).sample.mean * 64).astype(int)
        assert len(set(chosen.tolist())) == SAMPLE
        taken[chosen] += 1
    assert (
        abs(taken[:32].mean() - 20) < 2 and taken.min() > 5 and taken.max() < 35
    )  # sd of a place: 3.2


# ---------------------------------------------------------------- the bound


@pytest.mark.parametrize("tau", [0.5, 1.05, 4.0])
def test_the_log_gate_never_breaks_the_bound(tau):
    """Sequences of all means and spreads, 1e-8 to 20, and nearly constant ones; tolerance: see sequences.ROUNDING."""
    rng = np.random.default_rng(0)
    B, T = 4000, 16
    mean_B1, spread_B1 = (
        rng.choice([-1, 1], (B, 1)) * 10 ** rng.uniform(-8, 1.3, (B, 1)),
        10 ** rng.uniform(-8, 1, (B, 1)),
    )
    tokens = rows_of([sequence(rng, 1, T - 1, 1.0, 0.1)], 1, T)
    tokens = {name: np.repeat(x, B, axis=0) for name, x in tokens.items()}
    tokens["log_ratio_BT"] = (mean_B1 + spread_B1 * rng.normal(size=(B, T))).astype(np.float32)
    found = evidence_of(tokens, Gates.of(SAPO(tau_pos=tau))).sequences
    assert found.count.sum() == B and found.breaches_log.sum() == 0
    # The count counts: the real gate does not obey this bound.
    assert found.breaches_real.sum() > 100
    assert found.gap_log.sum() > 0.01 * B


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
def test_long_sequences_do_not_break_the_bound_by_rounding(spread):
    """20,000 tokens about 0.1, whose plain float32 sum is off by 1e-4 of itself: still Var, D and the bound."""
    z_T = (0.1 + spread * np.random.default_rng(0).normal(size=20_000)).astype(np.float32)
    one_BT = np.ones((1, 20_000), np.int32)
    table = statistics_of_sequences(z_T[None], one_BT.astype(np.float32), one_BT > 0, one_BT, GATES)
    assert table.exists[0, 1] and not table.breaks_bound(table.gap_log).any()
    expected = of_sequence(torch.tensor(z_T, dtype=torch.float64), 0.8)
    assert table.mean[0, 1] == pytest.approx(expected["mean"], rel=1e-6)
    assert table.variance[0, 1] == pytest.approx(expected["variance"], rel=1e-4, abs=1e-11)
    ulp_of_the_gate = np.tanh(0.8 / 2 * 0.1) ** 2 * 2.0**-23  # differences of 1 - g cannot be finer
    assert table.gap_log[0, 1] == pytest.approx(
        expected["gap_log"], rel=1e-3, abs=4 * ulp_of_the_gate
    )


def test_a_wrong_bound_would_be_broken():
    """The count of breaches is not zero by construction: with half the bound, sequences break it."""
    z_BT = np.array([[-0.01, 0.01], [0.3, 0.3]], np.float32)
    one_BT = np.ones((2, 2))
    table = statistics_of_sequences(
        z_BT, one_BT.astype(np.float32), one_BT.astype(bool), one_BT.astype(np.int32), GATES
    )
    assert not table.breaks_bound(table.gap_log).any()
    halved = dataclasses.replace(table, bound=table.bound / 2)
    np.testing.assert_array_equal(
        halved.breaks_bound(table.gap_log), [[False, True, False], [False, False, False]]
    )


# ---------------------------------------------------------------- extremes


def test_extreme_log_ratios_stay_finite():
    """+-200 count as +-20: no inf, no NaN; the objective gives such tokens no gradient, so they carry none."""
    tokens = rows_of(example(7, 12), 1, 14)
    tokens["log_ratio_BT"] = np.where(np.arange(14) % 2, 200, -200) * np.ones((12, 1), np.float32)
    found = evidence_of(tokens)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert found.largest.abs_log_ratio.max() == 20 and found.tokens.gate.sum() == 0
    assert found.coefficient.total.sum() == 0 and found.sequences.breaches_log.sum() == 0
    assert found.tokens.log_ratio_histogram[:, [0, 1, -2, -1]].sum() == found.tokens.count.sum()
    assert all(np.isfinite(x) for x in finalize_evidence(found).values())


def test_masked_tokens_are_never_read():
    tokens = rows_of(example(8, 12, 0.2), 2, 30, num_rows=12)
    dirty = {
        name: np.where(tokens["mask_BT"], x, np.float32(np.nan)) if x.dtype.kind == "f" else x
        for name, x in tokens.items()
    }
    assert np.isnan(dirty["log_ratio_BT"]).any()
    assert_same(evidence_of(dirty), evidence_of(tokens), float_rtol=0)


def test_a_nan_at_a_trained_token_shows():
    tokens = rows_of(example(9, 12, 0.2), 1, 14)
    place = np.argwhere(tokens["mask_BT"] & (tokens["adv_BT"] > 0))[0]
    tokens["log_ratio_BT"][tuple(place)] = np.nan
    found = evidence_of(tokens)
    assert np.isnan(found.tokens.gate[0]) and np.isnan(found.sequences.variance[0])
    assert (
        np.isfinite(found.tokens.gate[1:]).all() and np.isfinite(found.sequences.variance[1:]).all()
    )
    assert found.tokens.count[0] - found.tokens.log_ratio_histogram[0].sum() == 1
    assert found.sequences.count[0] - found.sequences.variance_histogram[0].sum() == 1


def test_nothing_trained_is_all_zeros_and_adds_nothing():
    tokens = rows_of(example(10, 12, 0.2), 1, 14)
    nothing = evidence_of({**tokens, "mask_BT": np.zeros_like(tokens["mask_BT"])})
    assert not any(x.any() for x in sums_by_name(nothing).values())
    assert not nothing.largest.abs_log_ratio.any() and not nothing.largest.variance.any()
    assert (nothing.sample.fingerprint == NO_SEQUENCE).all()
    assert finalize_evidence(nothing) == {"a2/breaches": 0}  # the one count among the metrics
    some = evidence_of(tokens)
    both = reduce_evidence(stack_evidence([nothing, some]))
    assert_same(both, some, float_rtol=0)


def test_a_masked_row_and_an_absent_sign():
    """One completion's verifier failed: its row does not count. No token has A < 0: zeros there, and no NaN."""
    tokens = rows_of(example(11, 12, 0.2), 1, 14)
    tokens["adv_BT"] = np.abs(tokens["adv_BT"])
    tokens["mask_BT"] = tokens["mask_BT"] & (np.arange(12) != 4)[:, None]
    found = evidence_of(tokens)
    assert found.sequences.count.sum() == 11 and found.sequences.count[1] == 0
    metrics = finalize_evidence(found)
    assert all(np.isfinite(x) for x in metrics.values())
    assert not any(
        "neg_" in name for name in metrics if "share" not in name and "fraction" not in name
    )
    assert "effective_tokens/neg_fraction" not in metrics
    assert ratio_quantiles(found, GATES)["gate"]["neg"] == []


def test_it_has_no_gradient():
    tokens = with_own(rows_of(example(12, 6, 0.2), 1, 14))

    def total(log_ratio_BT):
        found = collect({**tokens, "log_ratio_BT": log_ratio_BT})
        return sum(x.sum() for x in jax.tree.leaves(found) if x.dtype.kind == "f")

    np.testing.assert_array_equal(quick_jit(jax.grad(total))(tokens["log_ratio_BT"]), 0)


# ---------------------------------------------------------------- rows


def test_a_row_goes_through_json_and_back():
    """Two updates of two micro-batches: what is read is what was collected, to 7 digits; and it is small."""
    parts = [evidence_of(rows_of(example(i, 24, 0.02 * (i + 1)), 2, 30)) for i in range(4)]
    row = evidence_row([stack_evidence(parts[:2]), stack_evidence(parts[2:])], GSPO_LIKE)
    text = json.dumps(row, allow_nan=False)
    assert len(text) < 10_000
    found, gates = read_evidence(json.loads(text))
    assert gates == GSPO_LIKE
    whole = reduce_evidence(stack_evidence(parts))
    assert_same(found, whole, float_rtol=1e-6)
    assert len(row["by_update"]["a2/variance_mean"]) == 2
    first = finalize_evidence(reduce_evidence(stack_evidence(parts[:2])))
    assert row["by_update"]["a2/variance_mean"][0] == pytest.approx(
        float(first["a2/variance_mean"]), rel=1e-6
    )
    expected = {name: float(x) for name, x in finalize_evidence(whole).items()}
    assert {name: float(x) for name, x in finalize_evidence(found).items()} == pytest.approx(
        expected, rel=1e-6
    )


def test_quantiles_by_sign_are_those_of_the_tokens():
    """Of r, f'(r) and r f'(r), to within the histogram's bins."""
    tokens = rows_of(example(13, 300, 0.3), 3, 45)
    found = ratio_quantiles(evidence_of(tokens), GATES)
    for sign, tau, mine_BT in (
        ("pos", 0.8, tokens["adv_BT"] > 0),
        ("neg", 1.7, tokens["adv_BT"] < 0),
    ):
        r_N = np.exp(tokens["log_ratio_BT"][mine_BT & tokens["mask_BT"]].astype(np.float64))
        gate_N = 1 / np.cosh(tau / 2 * (r_N - 1)) ** 2
        for name, x_N in {"ratio": r_N, "gate": gate_N, "grad_weight": r_N * gate_N}.items():
            expected = np.quantile(x_N, (0.05, 0.5, 0.95))
            np.testing.assert_allclose(np.array(found[name][sign])[[1, 3, 5]], expected, rtol=0.08)


def test_a_nan_survives_the_row():
    tokens = rows_of(example(9, 12, 0.2), 1, 14)
    tokens["log_ratio_BT"][tokens["mask_BT"]] = np.nan
    row = json.loads(
        json.dumps(
            plain_json(evidence_row([stack_evidence([evidence_of(tokens)])], GATES)),
            allow_nan=False,
        )
    )
    found, _ = read_evidence(row)
    assert np.isnan(found.tokens.gate).any() and found.tokens.log_ratio_histogram.sum() == 0


@pytest.mark.parametrize("spoil", [
    lambda row: row.pop("gates"), lambda row: row["sum"].update(log_ratio=[[172, [1, 2]]] * 3),
    lambda row: row.update(sum=3), lambda row: row["sample"].pop("fingerprint"), lambda row: row["sum"].pop("tokens"),
    lambda row: row["gates"].update(extra=1), lambda row: row["max"].update(variance="many"),
])  # fmt: skip
def test_rows_of_another_form_are_refused(spoil):
    row = evidence_row([stack_evidence([evidence_of(rows_of(example(), 1, 14))])], GATES)
    spoil(row)
    with pytest.raises(ValueError, match="not a row of diagnostics"):
        read_evidence(row)
