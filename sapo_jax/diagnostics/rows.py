"""Rows of diagnostics.jsonl: the evidence of one RL step, written compactly and read back.

In the file, the sums of `Evidence` are one flat mapping from a name to its values by sign of A;
`_TOKEN_NAMES` and `_SEQUENCE_NAMES` hold the names that differ from the fields' own. The quadrants
have a mapping of their own, which rows of older versions lack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.evidence import (
    HISTOGRAM_BINS,
    NO_SEQUENCE,
    SAMPLE,
    Evidence,
    GradientSums,
    Maxima,
    SequenceSample,
    SequenceSums,
    TokenSums,
    finalize_evidence,
    reduce_evidence,
    stack_evidence,
)
from sapo_jax.diagnostics.gates import Gates
from sapo_jax.diagnostics.quadrants import (
    HISTOGRAM_SHAPES,
    SIGNS,
    SUMS_SHAPE,
    Quadrants,
    QuadrantSums,
)

if TYPE_CHECKING:
    from sapo_jax.batch import Array

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BY_UPDATE = ("a1/abs_log_ratio_mean", "a2/variance_mean")  # kept for each update of a step

_Part = TypeVar(
    "_Part", TokenSums, SequenceSums, GradientSums, Maxima, SequenceSample, QuadrantSums
)

_TOKEN_NAMES = {"count": "tokens", "log_ratio_histogram": "log_ratio"}
_SEQUENCE_NAMES = {"count": "sequences"}
_BINS_BY_NAME = {_TOKEN_NAMES.get(field, field): bins for field, bins in HISTOGRAM_BINS.items()}


# ---------------------------------------------------------------- writing


def evidence_row(updates: Sequence[Evidence], gates: Gates) -> dict[str, Any]:
    """A JSON-able row for the evidence of the N updates of a step.

    updates: for each, its evidence with a leading dim of micro-batches (numpy)

    The row holds
    gates       the settings
    sum, max    by name and, in the order of SIGNS, by sign of A; histograms without the zeros at
                their ends, as [first bin, [counts]]
    sample      the statistics of the sampled sequences, by name
    quantiles   of ratio, gate and grad_weight by sign, from the histogram (to within its bins,
                12 % of |z|)
    by_update   means of |z| and of Var_i in each update, to see the policy drift from the one that
                sampled; None in an update without a trained token
    quadrants   by sign of A and side of r: sums over `tokens` and over `sequences`, and histograms
    """
    evidence_of_updates = [reduce_evidence(update) for update in updates]
    evidence = reduce_evidence(stack_evidence(evidence_of_updates))
    metrics_of_updates = [finalize_evidence(update) for update in evidence_of_updates]
    row = {
        "gates": dataclasses.asdict(gates),
        "sum": {name: _values(name, x) for name, x in sums_by_name(evidence).items()},
        "max": {name: _short(x) for name, x in _fields_by_name(evidence.largest).items()},
        "sample": _sample_row(evidence.sample),
        "quantiles": {"q": list(QUANTILES)} | ratio_quantiles(evidence, gates),
        "by_update": {
            name: [_short_or_none(metrics.get(name)) for metrics in metrics_of_updates]
            for name in BY_UPDATE
        },
    }
    if evidence.quadrants is not None:
        row["quadrants"] = _quadrants_row(evidence.quadrants)
    return row


def _quadrants_row(quadrants: Quadrants) -> dict[str, Any]:
    """Its sums as flat lists: A > 0 with r < 1, r = 1 and r > 1, then A < 0, then A = 0."""
    row: dict[str, Any] = {}
    for part in ("tokens", "sequences"):
        sums = _fields_by_name(getattr(quadrants, part))
        row[part] = {name: _short(np.ravel(x)) for name, x in sums.items()}
    for name, shape in HISTOGRAM_SHAPES.items():
        histograms = np.asarray(getattr(quadrants, name)).reshape(-1, shape[-1])
        row[name] = [hist.trim(counts) for counts in histograms]
    return row


def sums_by_name(evidence: Evidence) -> dict[str, Array]:
    """All sums and histograms of the evidence by their names in the file, in alphabetic order."""
    sums = _fields_by_name(evidence.tokens, _TOKEN_NAMES)
    sums |= _fields_by_name(evidence.sequences, _SEQUENCE_NAMES)
    sums |= _with_prefix("coefficient/", _fields_by_name(evidence.coefficient))
    if evidence.logits is not None:
        sums |= _with_prefix("logits/", _fields_by_name(evidence.logits))
    return dict(sorted(sums.items()))


def _fields_by_name(part: Any, names: Mapping[str, str] | None = None) -> dict[str, Array]:
    """The fields of a dataclass; `names` holds the names that differ from the fields' own."""
    renamed = names or {}
    return {
        renamed.get(field.name, field.name): getattr(part, field.name)
        for field in dataclasses.fields(part)
    }


def _with_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _values(name: str, x: Array) -> list:
    """One of the sums, as it stands in the file."""
    if name in _BINS_BY_NAME:
        return [hist.trim(counts) for counts in np.asarray(x)]
    return _short(x)


def _sample_row(sample: SequenceSample) -> dict[str, list]:
    """The sampled sequences without the empty places, in alphabetic order of the fields."""
    filled = sample.fingerprint != NO_SEQUENCE
    fields = _fields_by_name(sample)
    return {name: _short(fields[name][filled]) for name in sorted(fields)}


def _short(x: Any) -> list:
    """Integers as they are, floats with 7 significant digits: as many as float32 has."""
    x = np.asarray(x)
    if x.dtype.kind in "iu":
        return [int(value) for value in x]
    return [float(f"{value:.7g}") for value in x]


def _short_or_none(value: Any) -> float | None:
    """A number as in `_short`; None where there is none."""
    if value is None:
        return None
    return _short([value])[0]


def ratio_quantiles(evidence: Evidence, gates: Gates) -> dict[str, dict[str, list[float]]]:
    """QUANTILES of r, f'(r) and r f'(r), by name and by sign of A; exact to within a bin of log r.

    The list is empty where no token has that sign.
    """
    z = hist.SIGNED_CENTERS
    ratio = np.exp(z)
    quantiles: dict[str, dict[str, list[float]]] = {"ratio": {}, "gate": {}, "grad_weight": {}}
    for sign, adv in (("pos", 1.0), ("neg", -1.0)):
        counts = np.asarray(evidence.tokens.log_ratio_histogram[SIGNS.index(sign)])
        gate = 1 - np.asarray(gates.closed(z, np.asarray(adv)))
        for name, values in (("ratio", ratio), ("gate", gate), ("grad_weight", ratio * gate)):
            of_values = hist.weighted_quantiles(values, counts, QUANTILES)
            quantiles[name][sign] = _short(of_values)
    return quantiles


# ---------------------------------------------------------------- reading


def read_evidence(row: Mapping[str, Any]) -> tuple[Evidence, Gates]:
    """What `evidence_row` wrote, in numpy (float64, int64).

    Raises ValueError where the row is not of this form.
    """
    try:
        return _read_evidence(row), _read_gates(row["gates"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a row of diagnostics ({type(error).__name__}: {error})") from error


def _read_evidence(row: Mapping[str, Any]) -> Evidence:
    sums = {name: _read_values(name, values) for name, values in row["sum"].items()}
    logits = None
    if any(name.startswith("logits/") for name in sums):
        logits = _read_fields(GradientSums, _without_prefix("logits/", sums))
    return Evidence(
        tokens=_read_fields(TokenSums, sums, _TOKEN_NAMES),
        sequences=_read_fields(SequenceSums, sums, _SEQUENCE_NAMES),
        coefficient=_read_fields(GradientSums, _without_prefix("coefficient/", sums)),
        logits=logits,
        largest=_read_fields(
            Maxima, {name: _numbers(values) for name, values in row["max"].items()}
        ),
        sample=_read_sample(row["sample"]),
        quadrants=_read_quadrants(row.get("quadrants")),
    )


def _read_quadrants(row: Mapping[str, Any] | None) -> Quadrants | None:
    """What `_quadrants_row` wrote; None for a row of a version that had no quadrants."""
    if row is None:
        return None
    histograms = {}
    for name, shape in HISTOGRAM_SHAPES.items():
        counts = [hist.untrim(trimmed, shape[-1]) for trimmed in row[name]]
        histograms[name] = np.stack(counts).reshape(shape)
    return Quadrants(
        tokens=_read_quadrant_sums(row["tokens"]),
        sequences=_read_quadrant_sums(row["sequences"]),
        **histograms,
    )


def _read_quadrant_sums(row: Mapping[str, list]) -> QuadrantSums:
    sums = {name: _numbers(values).reshape(SUMS_SHAPE) for name, values in row.items()}
    return _read_fields(QuadrantSums, sums)


def _read_fields(
    cls: type[_Part], values: Mapping[str, np.ndarray], names: Mapping[str, str] | None = None
) -> _Part:
    """The dataclass that `_fields_by_name` made the values of."""
    renamed = names or {}
    name_of_field = {
        field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(cls)
    }
    missing = sorted(set(name_of_field.values()) - values.keys())
    if missing:
        raise ValueError(f"without {', '.join(missing)}")
    return cls(**{field: values[name] for field, name in name_of_field.items()})


def _without_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _read_values(name: str, values: list) -> np.ndarray:
    if name in _BINS_BY_NAME:
        return np.stack([hist.untrim(trimmed, _BINS_BY_NAME[name]) for trimmed in values])
    return _numbers(values)


def _read_sample(row: Mapping[str, list]) -> SequenceSample:
    """The sampled sequences, filled up with empty places to SAMPLE."""
    sample = _read_fields(SequenceSample, {name: _numbers(values) for name, values in row.items()})
    fields = _fields_by_name(sample)
    if len({len(x) for x in fields.values()}) != 1:
        raise ValueError("without samples of one length")
    filled_up = {}
    for name, x in fields.items():
        fill = NO_SEQUENCE if name == "fingerprint" else 0
        filled_up[name] = np.append(x, np.full(SAMPLE - len(x), fill, x.dtype))
    return SequenceSample(**filled_up)


def _read_gates(row: Mapping[str, Any]) -> Gates:
    settings: dict[str, Any] = dict(row)
    settings["grpo"] = tuple(row["grpo"])  # JSON has lists alone
    settings["gspo"] = tuple(row["gspo"])
    for name in ("sides", "bounds"):
        if row.get(name) is not None:  # rows of older versions have neither
            settings[name] = tuple(row[name])
    return Gates(**settings)


def _numbers(values: list) -> np.ndarray:
    """int64 if all values are integers, else float64.

    "NaN" and the like are strings in JSON (see `io.run_log`).
    """
    if all(type(value) is int for value in values):
        return np.array(values, np.int64)
    return np.array(values, np.float64)
