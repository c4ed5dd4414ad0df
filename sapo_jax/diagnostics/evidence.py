"""Evidence for SAPO's assumptions A1 (small steps: r near 1) and A2 (little dispersion of log r within a sequence), and
what its soft gate keeps of the gradient that a hard clip throws away.

Everything is a sum, a histogram, a maximum or a bounded sample, by sign of A; so micro-batches, packed rows and shards
of rows add up to the same. z = log r is 0 where masked and bounded to +-20, as in the objectives. SAPO's gate is
evaluated whatever the objective of the run is (`gates.Gates.of`).

The first update of a rollout has r = 1 on every token, up to rounding: with N mini-batches, one N-th of all tokens
lies in the histograms' bin at 0 by construction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array, Batch
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.gates import Gates, clipped, closed_gate, closed_log_gate, outside
from sapo_jax.diagnostics.sequences import Sequences, fingerprints, on_tokens, sequences
from sapo_jax.objectives.ratios import is_live, masked, safe_log_ratio

SIGNS = (
    "pos",
    "neg",
    "zero",
)  # A > 0, A < 0, A = 0: every token and every sequence is in one of them
SAMPLE = 32  # sequences of an RL step whose statistics are kept one by one
NOBODY = 2**32 - 1  # fingerprint of an empty place in the sample
BINS = {
    "log_ratio": hist.SIGNED_BINS, "variance_histogram": hist.POSITIVE_BINS, "gap_log_histogram": hist.POSITIVE_BINS,
    "gap_real_histogram": hist.POSITIVE_BINS,
}  # fmt: skip
REGIONS = ("grpo_clipped", "grpo_outside", "gspo_clipped", "gspo_outside")
PER_TOKEN = ("abs_log_ratio", "gate", "grad_weight", "grad_weight_squared", "gate_error")
PER_SEQUENCE = ("mean", "variance", "gap_log", "gap_real", "adv")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """Of some tokens. Entries of `sum` and `max` are [3] for SIGNS, histograms [3, bins]; counts are int32.

    sum     tokens; log_ratio (histogram of z); abs_log_ratio |z|; gate f'(r); grad_weight r f'(r), and its square;
            gate_error |f'(r) - g(z)|, the price of A1; sequences; variance Var_i, gap_log, gap_real (D_i), bound:
            sums and histograms; breaches_log, breaches_real (sequences whose D_i is above the bound);
            coefficient/REGION and logits/REGION: gradient carried by the tokens of a region, see `_gradient`
    max     abs_log_ratio, variance
    sample  [SAMPLE] of each of PER_SEQUENCE, of the length, and of the fingerprint (NOBODY: an empty place)
    """

    sum: dict[str, Array]
    max: dict[str, Array]
    sample: dict[str, Array]


def collect_evidence(
    log_ratio_BT: Array,
    batch: Batch,
    gates: Gates,
    logp_BT: Array,
    collision_BT: Array | None = None,
) -> Evidence:
    """Of one micro-batch. collision_BT is sum_v p_v^2 of the distribution that token t was drawn from; without it there
    are no `logits/...` entries. Masked tokens are never read. Nothing here has a gradient."""
    log_ratio_BT, logp_BT, collision_BT = jax.lax.stop_gradient(
        (log_ratio_BT, logp_BT, collision_BT)
    )
    mask_BT, ids_BT = batch.mask_BT, jnp.asarray(batch.segment_ids_BT)
    z_BT, adv_BT = safe_log_ratio(log_ratio_BT, mask_BT), masked(batch.adv_BT, mask_BT)
    live_BT = is_live(log_ratio_BT, mask_BT) | jnp.isnan(z_BT)  # a NaN must show
    tau_BT, ratio_BT = gates.tau(adv_BT), jnp.exp(z_BT)
    gate_BT = jnp.where(live_BT, 1 - closed_gate(z_BT, tau_BT), 0)
    weight_BT = ratio_BT * gate_BT

    table = sequences(z_BT, adv_BT, mask_BT, ids_BT, gates)
    carried = _gradient(batch, adv_BT, weight_BT, logp_BT, collision_BT)
    regions = _regions(adv_BT, ratio_BT, on_tokens(jnp.exp(table.mean), ids_BT), gates)
    per_token = {
        "abs_log_ratio": jnp.abs(z_BT),
        "gate": gate_BT,
        "grad_weight": weight_BT,
        "grad_weight_squared": weight_BT**2,
        "gate_error": jnp.abs(closed_gate(z_BT, tau_BT) - closed_log_gate(z_BT, tau_BT)),
        **{f"{m}/total": x_BT for m, x_BT in carried.items()},
        **{
            f"{m}/{name}": jnp.where(in_BT, x_BT, 0)
            for m, x_BT in carried.items()
            for name, in_BT in regions.items()
        },
    }
    tokens = _by_sign(
        _sign(adv_BT, mask_BT), hist.signed_bin, {"tokens": mask_BT}, per_token, {"log_ratio": z_BT}
    )
    per_sequence = {
        name: getattr(table, name) for name in ("variance", "gap_log", "gap_real", "bound")
    }
    flags = {
        "sequences": table.is_there,
        "breaches_log": table.breaks_bound(table.gap_log),
        "breaches_real": table.breaks_bound(table.gap_real),
    }
    spread = {
        f"{name}_histogram": per_sequence[name] for name in ("variance", "gap_log", "gap_real")
    }
    of_sequences = _by_sign(
        _sign(table.adv, table.is_there), hist.positive_bin, flags, per_sequence, spread
    )
    return Evidence(
        sum=tokens | of_sequences,
        max={
            "abs_log_ratio": _maxima(per_token["abs_log_ratio"], _sign(adv_BT, mask_BT)),
            "variance": _maxima(table.variance, _sign(table.adv, table.is_there)),
        },
        sample=_sample(table, fingerprints(batch.tokens_BT, batch.positions_BT, ids_BT)),
    )


def _sign(adv: Array, valid: Array) -> Array:
    """Index into SIGNS; -1 where not valid."""
    return jnp.where(valid, jnp.where(adv > 0, 0, jnp.where(adv < 0, 1, 2)), -1).astype(jnp.int32)


def _by_sign(
    sign: Array, bin_of, flags: Mapping, values: Mapping, spread: Mapping
) -> dict[str, Array]:
    """Counts of the flags, sums of the values (both [3]) and histograms of `spread` ([3, bins]), all by sign."""
    here = [sign == i for i in range(len(SIGNS))]
    return {
        **{
            name: jnp.stack([jnp.sum(x & h, dtype=jnp.int32) for h in here])
            for name, x in flags.items()
        },
        **{
            name: jnp.stack([jnp.sum(jnp.where(h, x, 0)) for h in here])
            for name, x in values.items()
        },
        **{
            name: hist.histogram(bin_of(x), sign, len(SIGNS), BINS[name])
            for name, x in spread.items()
        },
    }


def _maxima(x: Array, sign: Array) -> Array:
    return jnp.stack([jnp.max(jnp.where(sign == i, x, 0)) for i in range(len(SIGNS))])


def _gradient(batch: Batch, adv_BT, weight_BT, logp_BT, collision_BT) -> dict[str, Array]:
    """How much gradient each token carries, as a norm; the gradient of the loss itself is a sum of vectors, of which
    sums of norms are an upper bound.

    coefficient   weight_BT |A| r f'(r) (times the correction): the size of the factor on grad log pi
    logits        that times ||grad_z log pi|| = ||e_y - p||_2 = sqrt((1 - p_y)^2 + sum_{v != y} p_v^2): exactly the
                  norm of the loss's gradient on the logits (over the temperature) of this position
    """
    coefficient_BT = batch.weight_BT * jnp.abs(adv_BT) * weight_BT
    if batch.correction_BT is not None:
        coefficient_BT = coefficient_BT * batch.correction_BT
    coefficient_BT = jnp.where(batch.mask_BT, coefficient_BT, 0)
    if collision_BT is None:
        return {"coefficient": coefficient_BT}
    miss_BT = -jnp.expm1(logp_BT)  # 1 - p_y
    others_BT = jnp.clip(
        collision_BT - jnp.exp(2 * logp_BT), 0, miss_BT**2
    )  # it is, but for rounding at p_y ~ 1
    norm_BT = jnp.sqrt(miss_BT**2 + others_BT)
    return {
        "coefficient": coefficient_BT,
        "logits": jnp.where(batch.mask_BT, coefficient_BT * norm_BT, 0),
    }


def _regions(adv_BT, ratio_BT, sequence_ratio_BT, gates: Gates) -> dict[str, Array]:
    """Which tokens the hard clips drop (`clipped`), and which are out of their band on either side (`outside`)."""
    return {
        "grpo_clipped": clipped(ratio_BT, adv_BT, gates.grpo),
        "grpo_outside": outside(ratio_BT, gates.grpo),
        "gspo_clipped": clipped(sequence_ratio_BT, adv_BT, gates.gspo),
        "gspo_outside": outside(sequence_ratio_BT, gates.gspo),
    }


def _sample(table: Sequences, fingerprint_BS: Array) -> dict[str, Array]:
    """The SAMPLE sequences of least fingerprint: a random choice that is the same however the rows lie.

    First within each row, which stays on its device, and then among what is left of all rows."""
    fields = {name: getattr(table, name) for name in PER_SEQUENCE} | {"length": table.count}
    fields["fingerprint"] = jnp.where(table.is_there, fingerprint_BS, jnp.uint32(NOBODY))
    order = jnp.argsort(fields["fingerprint"], axis=1, stable=True)[:, :SAMPLE]
    least = {
        name: jnp.take_along_axis(x_BS, order, axis=1).reshape(-1) for name, x_BS in fields.items()
    }
    places = max(0, SAMPLE - len(least["fingerprint"]))  # of a batch with fewer
    fill = lambda name: jnp.uint32(NOBODY) if name == "fingerprint" else 0
    return _least(
        {name: jnp.pad(x, (0, places), constant_values=fill(name)) for name, x in least.items()}
    )


def _least(fields: Mapping[str, Array]) -> dict[str, Array]:
    xp = fields["fingerprint"].__array_namespace__()
    chosen = xp.argsort(fields["fingerprint"], stable=True)[:SAMPLE]
    return {name: x[chosen] for name, x in fields.items()}


def reduce_evidence(stacked: Evidence) -> Evidence:
    """With a leading dim (micro-batches, updates, steps) -> of all of them. numpy in, numpy out, and jax likewise."""
    return Evidence(
        sum={name: x.sum(axis=0) for name, x in stacked.sum.items()},
        max={name: x.max(axis=0) for name, x in stacked.max.items()},
        sample=_least({name: x.reshape(-1) for name, x in stacked.sample.items()}),
    )


def finalize_evidence(evidence: Evidence) -> dict[str, Array]:
    """Scalars for metrics.jsonl; 0, never NaN, where there is no token.

    a1/abs_log_ratio_{mean,p50,p99,max}; a1/gate_error_mean; a2/variance_{mean,max}; a2/gap_log_mean, a2/gap_real_mean,
    a2/bound_mean; a2/breaches (of the bound by the log gate: must be 0); a2/gap_real_above_bound_fraction;
    effective_tokens/{,pos_,neg_}fraction = (sum w)^2 / (n sum w^2), w = r f'(r), over n trained tokens (Kish): 1 if
    all weigh the same, 1/n if one has it all; grad_share/REGION: the part of the summed gradient norms on the logits
    that the tokens of a region carry (of the coefficients, without collision_BT).
    """
    xp = evidence.sum["gate"].__array_namespace__()
    total = {name: x.sum(axis=0) for name, x in evidence.sum.items()}  # over the signs
    over = lambda x, n: xp.where(n > 0, x / xp.where(n > 0, n, 1), 0)
    mean = lambda name, of: over(total[name], total[of])
    counts, edges = hist.magnitudes(total["log_ratio"])
    largest = evidence.max["abs_log_ratio"].max()  # a quantile is not above it, as its bin may be
    effective = lambda s: over(s["grad_weight"] ** 2, s["tokens"] * s["grad_weight_squared"])
    of_sign = lambda i: {name: x[i] for name, x in evidence.sum.items()}
    measure = "logits" if "logits/total" in total else "coefficient"
    return {
        "a1/abs_log_ratio_mean": mean("abs_log_ratio", "tokens"),
        "a1/abs_log_ratio_p50": xp.minimum(hist.quantile(counts, edges, 0.50), largest),
        "a1/abs_log_ratio_p99": xp.minimum(hist.quantile(counts, edges, 0.99), largest),
        "a1/abs_log_ratio_max": largest,
        "a1/gate_error_mean": mean("gate_error", "tokens"),
        **{
            f"a2/{x}_mean": mean(x, "sequences")
            for x in ("variance", "gap_log", "gap_real", "bound")
        },
        "a2/variance_max": evidence.max["variance"].max(),
        "a2/breaches": total["breaches_log"],
        "a2/gap_real_above_bound_fraction": mean("breaches_real", "sequences"),
        "effective_tokens/fraction": effective(total),
        "effective_tokens/pos_fraction": effective(of_sign(0)),
        "effective_tokens/neg_fraction": effective(of_sign(1)),
        **{
            f"grad_share/{region}": mean(f"{measure}/{region}", f"{measure}/total")
            for region in REGIONS
        },
    }
