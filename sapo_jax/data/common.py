"""What the data modules share: one error type, hashes that never change, largest-remainder shares."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from sapo_jax.errors import DataError


def text_mistake(value: Any, may_be_empty: bool = False) -> str | None:
    """What is wrong with a value of a row that should be text, as the end of a sentence; None: nothing."""
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"must be text, not {type(value).__name__} ({value!r:.40})"
    if not (value.strip() or may_be_empty):
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not text"
    return None


def stable_hash(*parts: str | int, bits: int = 63) -> int:
    """An integer in [0, 2**bits) that depends on `parts` only: not on the process, the platform or any version."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def apportion(total: int, weights: Mapping[str, float], what: str) -> dict[str, int]:
    """Split `total` into whole shares proportional to `weights` by the largest-remainder method (Hamilton).

    The shares sum to `total` and differ from the exact ones by less than 1. A weight of 0 gives 0; a positive weight
    that would get nothing is an error, as is a weight that is negative or not finite. `what` names the total in errors.
    """
    bad = {name: w for name, w in weights.items() if not (math.isfinite(w) and w >= 0)}
    if bad or not sum(weights.values()) > 0:
        raise DataError(
            f"task weights must be finite, >= 0 and not all 0, but they are {dict(weights)}"
        )
    scale = total / sum(weights.values())
    exact = {name: w * scale for name, w in weights.items()}
    shares = {name: math.floor(x) for name, x in exact.items()}
    by_remainder = sorted(
        exact, key=lambda name: shares[name] - exact[name]
    )  # stable: ties go to the earlier task
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    starved = [name for name, w in weights.items() if w > 0 and shares[name] == 0]
    if starved:
        raise DataError(
            f"{what} = {total} leaves none for {', '.join(starved)}: raise it, or the weight (weights: {dict(weights)})"
        )
    return shares
