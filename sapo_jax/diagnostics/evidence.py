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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.gates import Gates, clipped, closed_gate, closed_log_gate, outside
from sapo_jax.diagnostics.sequences import fingerprints, on_tokens, sequences
from sapo_jax.objectives.ratios import is_live, masked, safe_log_ratio
from sapo_jax.types import Array, Batch

SIGNS = ("pos", "neg", "zero")  # A > 0, A < 0, A = 0: every token and every sequence is in one of them
SAMPLE = 32  # sequences of an RL step whose statistics are kept one by one
NOBODY = 2**32 - 1  # fingerprint of an empty place in the sample
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = {
    "log_ratio": hist.SIGNED_BINS, "variance_histogram": hist.POSITIVE_BINS, "gap_log_histogram": hist.POSITIVE_BINS,
    "gap_real_histogram": hist.POSITIVE_BINS,
}  # fmt: skip
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
    log_ratio_BT: Array, batch: Batch, gates: Gates, logp_BT: Array, collision_BT: Array | None = None
) -> Evidence:
    """Of one micro-batch. collision_BT is sum_v p_v^2 of the distribution that token t was drawn from; without it there
    are no `logits/...` entries. Masked tokens are never read. Nothing here has a gradient."""
    log_ratio_BT, logp_BT, collision_BT = jax.lax.stop_gradient((log_ratio_BT, logp_BT, collision_BT))
    mask_BT, ids_BT = batch.mask_BT, jnp.asarray(batch.segment_ids_BT)
    z_BT, adv_BT = safe_log_ratio(log_ratio_BT, mask_BT), masked(batch.adv_BT, mask_BT)
    live_BT = is_live(log_ratio_BT, mask_BT) | jnp.isnan(z_BT)  # a NaN must show
    tau_BT, ratio_BT = gates.tau(adv_BT), jnp.exp(z_BT)
    gate_BT = jnp.where(live_BT, 1 - closed_gate(z_BT, tau_BT), 0)
    weight_BT = ratio_BT * gate_BT

    table = sequences(z_BT, adv_BT, mask_BT, ids_BT, gates)
    sequence_ratio_BT = on_tokens(jnp.exp(table.mean), ids_BT)
    carried = _gradient(batch, adv_BT, weight_BT, logp_BT, collision_BT)
    regions = _regions(adv_BT, ratio_BT, sequence_ratio_BT, gates)
    token_sign, sequence_sign = _sign(adv_BT, mask_BT), _sign(table.adv, table.is_there)
    per_token = {
        "abs_log_ratio": jnp.abs(z_BT),
        "gate": gate_BT,
        "grad_weight": weight_BT,
        "grad_weight_squared": weight_BT**2,
        "gate_error": jnp.abs(closed_gate(z_BT, tau_BT) - closed_log_gate(z_BT, tau_BT)),
        **{f"{measure}/{name}": jnp.where(r, x, 0) for measure, x in carried.items() for name, r in regions.items()},
    }
    per_sequence = {name: getattr(table, name) for name in ("variance", "gap_log", "gap_real", "bound")}
    breaches = {"breaches_log": table.breaks_bound(table.gap_log), "breaches_real": table.breaks_bound(table.gap_real)}
    counts = {"tokens": mask_BT}, {"sequences": table.is_there, **breaches}
    return Evidence(
        sum={
            **_by_sign(_count, counts[0], token_sign),
            **_by_sign(_count, counts[1], sequence_sign),
            **_by_sign(_sum, per_token, token_sign),
            **_by_sign(_sum, per_sequence, sequence_sign),
            "log_ratio": hist.histogram(hist.signed_bin(z_BT), token_sign, len(SIGNS), hist.SIGNED_BINS),
            **{
                f"{name}_histogram": hist.histogram(
                    hist.positive_bin(per_sequence[name]), sequence_sign, len(SIGNS), hist.POSITIVE_BINS
                )
                for name in ("variance", "gap_log", "gap_real")
            },
        },
        max={
            **_by_sign(_max, {"abs_log_ratio": per_token["abs_log_ratio"]}, token_sign),
            **_by_sign(_max, {"variance": table.variance}, sequence_sign),
        },
        sample=_sample(table, fingerprints(batch.tokens_BT, batch.positions_BT, ids_BT)),
    )


_sum = lambda x, here: jnp.sum(jnp.where(here, x, 0))
_max = lambda x, here: jnp.max(jnp.where(here, x, 0))
_count = lambda x, here: jnp.sum(x & here, dtype=jnp.int32)


def _by_sign(reduce, values: Mapping[str, Array], sign: Array) -> dict[str, Array]:
    return {name: jnp.stack([reduce(x, sign == i) for i in range(len(SIGNS))]) for name, x in values.items()}


def _sign(adv: Array, valid: Array) -> Array:
    """Index into SIGNS; -1 where not valid."""
    return jnp.where(valid, jnp.where(adv > 0, 0, jnp.where(adv < 0, 1, 2)), -1).astype(jnp.int32)


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
    others_BT = jnp.clip(collision_BT - jnp.exp(2 * logp_BT), 0, miss_BT**2)  # it is, but for rounding at p_y ~ 1
    norm_BT = jnp.sqrt(miss_BT**2 + others_BT)
    return {"coefficient": coefficient_BT, "logits": jnp.where(batch.mask_BT, coefficient_BT * norm_BT, 0)}


def _regions(adv_BT, ratio_BT, sequence_ratio_BT, gates: Gates) -> dict[str, Array]:
    """Which tokens the hard clips drop (`clipped`), and which are out of their band on either side (`outside`)."""
    return {
        "total": jnp.ones_like(ratio_BT, bool),
        "grpo_clipped": clipped(ratio_BT, adv_BT, gates.grpo),
        "grpo_outside": outside(ratio_BT, gates.grpo),
        "gspo_clipped": clipped(sequence_ratio_BT, adv_BT, gates.gspo),
        "gspo_outside": outside(sequence_ratio_BT, gates.gspo),
    }


def _sample(table, fingerprint_BS: Array) -> dict[str, Array]:
    """The SAMPLE sequences of least fingerprint: a random choice that is the same however the rows lie."""
    fields = {name: getattr(table, name) for name in PER_SEQUENCE} | {"length": table.count}
    fields["fingerprint"] = jnp.where(table.is_there, fingerprint_BS, jnp.uint32(NOBODY))
    empty = {"fingerprint": jnp.uint32(NOBODY)}
    padded = {  # never fewer than SAMPLE places
        name: jnp.concatenate([x.reshape(-1), jnp.full(SAMPLE, empty.get(name, 0), x.dtype)])
        for name, x in fields.items()
    }
    return _least(padded)


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
    s, xp = evidence.sum, evidence.sum["gate"].__array_namespace__()
    over = lambda x, n: xp.where(n > 0, x / xp.where(n > 0, n, 1), 0)  # noqa: E731
    total = lambda name: s[name].sum()  # noqa: E731
    counts, edges = hist.magnitudes(s["log_ratio"].sum(axis=0))
    effective = lambda w, w2, n: over(w**2, n * w2)  # noqa: E731
    weights = [s[name] for name in ("grad_weight", "grad_weight_squared", "tokens")]
    measure = "logits" if "logits/total" in s else "coefficient"
    regions = [name.removeprefix(f"{measure}/") for name in s if name.startswith(f"{measure}/")]
    return {
        "a1/abs_log_ratio_mean": over(total("abs_log_ratio"), total("tokens")),
        **{f"a1/abs_log_ratio_p{100 * q:.0f}": hist.quantile(counts, edges, q) for q in (0.5, 0.99)},
        "a1/abs_log_ratio_max": evidence.max["abs_log_ratio"].max(),
        "a1/gate_error_mean": over(total("gate_error"), total("tokens")),
        **{
            f"a2/{name}_mean": over(total(name), total("sequences"))
            for name in ("variance", "gap_log", "gap_real", "bound")
        },
        "a2/variance_max": evidence.max["variance"].max(),
        "a2/breaches": total("breaches_log"),
        "a2/gap_real_above_bound_fraction": over(total("breaches_real"), total("sequences")),
        "effective_tokens/fraction": effective(*(x.sum() for x in weights)),
        **{f"effective_tokens/{SIGNS[i]}_fraction": effective(*(x[i] for x in weights)) for i in (0, 1)},
        **{
            f"grad_share/{r}": over(total(f"{measure}/{r}"), total(f"{measure}/total")) for r in regions if r != "total"
        },
    }


# ---------------------------------------------------------------- rows of diagnostics.jsonl


def evidence_row(updates: Sequence[Evidence], gates: Gates) -> dict[str, Any]:
    """A JSON-able row for the evidence of the N updates of a step, each with a leading dim of micro-batches (numpy).

    `gates`, `sum`, `max`, `sample` as in Evidence, with histograms trimmed of zeros ([first bin, [counts]]) for each of
    SIGNS; `quantiles` of ratio, gate and grad_weight by sign, from the histogram (within its bins, 12 % of |z|);
    `by_update`: means of |z| and Var_i in each update, to see the policy drift from the one that sampled.
    """
    each = [reduce_evidence(update) for update in updates]
    evidence = reduce_evidence(jax.tree.map(lambda *x: np.stack(x), *each))
    per_update = [finalize_evidence(e) for e in each]
    filled = evidence.sample["fingerprint"] != NOBODY
    return {
        "gates": dataclasses.asdict(gates),
        "sum": {name: [hist.trim(row) for row in x] if name in BINS else _short(x) for name, x in evidence.sum.items()},
        "max": {name: _short(x) for name, x in evidence.max.items()},
        "sample": {name: _short(x[filled]) for name, x in evidence.sample.items()},
        "quantiles": {"q": list(QUANTILES)} | ratio_quantiles(evidence, gates),
        "by_update": {
            name: _short([m[name] for m in per_update]) for name in ("a1/abs_log_ratio_mean", "a2/variance_mean")
        },
    }


def _short(x) -> list:
    """Integers as they are, floats with 7 significant digits: as many as float32 has."""
    x = np.asarray(x)
    return [int(v) if x.dtype.kind in "iu" else float(f"{v:.7g}") for v in x]


def ratio_quantiles(evidence: Evidence, gates: Gates) -> dict[str, dict[str, list[float]]]:
    """QUANTILES of r, f'(r) and r f'(r) where A > 0 and where A < 0: exact within a bin of log r."""
    z, found = hist.SIGNED_CENTERS, {"ratio": {}, "gate": {}, "grad_weight": {}}
    for i, tau in enumerate((gates.tau_pos, gates.tau_neg)):
        gate = 1 - closed_gate(z, np.float64(tau))
        for name, values in {"ratio": np.exp(z), "gate": gate, "grad_weight": np.exp(z) * gate}.items():
            found[name][SIGNS[i]] = _short(hist.quantiles_of(values, evidence.sum["log_ratio"][i], QUANTILES))
    return found


def read_evidence(row: Mapping[str, Any]) -> tuple[Evidence, Gates]:
    """What `evidence_row` wrote, in numpy (float64, int64). Raises ValueError where the row is not of this form."""
    try:
        sums = {
            name: np.stack([hist.untrim(t, BINS[name]) for t in row["sum"][name]]) if name in BINS else _numbers(x)
            for name, x in row["sum"].items()
        }
        maxima = {name: _numbers(row["max"][name]) for name in ("abs_log_ratio", "variance")}
        sample = {name: _numbers(row["sample"][name]) for name in ("fingerprint", "length", *PER_SEQUENCE)}
        missing = {"tokens", "sequences", "coefficient/total", *BINS, *PER_TOKEN} - sums.keys()
        if missing or len({len(x) for x in sample.values()}) != 1:
            raise ValueError(f"without {', '.join(sorted(missing)) or 'samples of one length'}")
        gates = dict(row["gates"], grpo=tuple(row["gates"]["grpo"]), gspo=tuple(row["gates"]["gspo"]))
        return Evidence(sums, maxima, {name: _filled(name, x) for name, x in sample.items()}), Gates(**gates)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a row of diagnostics ({type(error).__name__}: {error})") from error


def _numbers(values: list) -> np.ndarray:
    """int64 if all are integers, else float64; "NaN" and the like are strings in JSON (see `metrics`)."""
    return np.array(values, np.int64 if all(type(v) is int for v in values) else np.float64)


def _filled(name: str, x: np.ndarray) -> np.ndarray:
    return np.append(x, np.full(SAMPLE - len(x), NOBODY if name == "fingerprint" else 0, x.dtype))
