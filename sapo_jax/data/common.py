"""What the data modules share: checks of text, hashes that never change, whole shares by weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from sapo_jax.config.task_rules import largest_remainder
from sapo_jax.errors import DataError

DIGEST = "digest:"  # what a digest begins with, where it stands among other values
_NOT_TEXT = "holds half of a surrogate pair, which is not text"


def text_mistake(value: Any, may_be_empty: bool = False) -> str | None:
    """What is wrong with a value that should be text, as the end of a sentence about it.

    None where nothing is wrong.
    """
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"must be text, not {type(value).__name__} ({value!r:.40})"
    if not value.strip() and not may_be_empty:
        return "is empty"
    try:
        check_text(value)
    except ValueError:
        return _NOT_TEXT
    return None


def check_text(text: str) -> str:
    """The string itself. Raises ValueError where it holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[:80]!r} {_NOT_TEXT}") from error
    return text


def normalise_space(text: str) -> str:
    """The text with every run of white space made one space, and none at its ends."""
    return " ".join(text.split())


def stable_hash(*parts: str | int, bits: int = 63) -> int:
    """An integer in [0, 2**bits) that depends on `parts` alone.

    It does not depend on the process, the platform or any version: splits, the numbers of problems
    and shuffles rest on it, so changing it would change every run. `bits` is at most 64.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def digest_of_json(value: Any) -> str:
    """A digest of JSON values, as text that begins with DIGEST; the order of keys has no say."""
    text = json.dumps(value, sort_keys=True)
    return f"{DIGEST}{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def apportion(total: int, weights: Mapping[str, float], what: str) -> dict[str, int]:
    """Split `total` into whole shares proportional to `weights`, by the largest-remainder method
    (`config.task_rules.largest_remainder`).

    A weight of 0 gives 0. Raises DataError for a weight that is negative or not finite, and where a
    positive weight would get nothing. `what` names the total in the message.
    """
    valid = [math.isfinite(weight) and weight >= 0 for weight in weights.values()]
    if not all(valid) or not sum(weights.values()) > 0:
        raise DataError(
            f"task weights must be finite, >= 0 and not all 0, but they are {dict(weights)}"
        )
    shares = largest_remainder(total, weights)
    starved = [name for name, weight in weights.items() if weight > 0 and shares[name] == 0]
    if starved:
        raise DataError(
            f"{what} = {total} leaves none for {', '.join(starved)}:"
            f" raise it, or the weight (weights: {dict(weights)})"
        )
    return shares
