"""What a run's numbers come from beside its configuration and its data: the contents behind keys.

The config names a tokenizer, plug-ins and a model directory; this module tells whether what lies
there is still what it was. Each content is identified by digests, in every checkpoint, and named by
the key that leads to it:

    data.tokenizer    the tokenizer's files and its control tokens
    rewards.plugins   the source of each module
    loss.kl           the parameters of the KL reference: with cold_start.steps = 0 they are read
                      from model.path anew at every start, else from the cold start's checkpoint

(The problems have a digest of their own, with the rows that differ: `data/identity.py`.)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sapo_jax.batch import Params
from sapo_jax.data import Tokenizer
from sapo_jax.data.common import DIGEST
from sapo_jax.io.arrays import digests, flatten

TOKENIZER = "data.tokenizer"
PLUGINS = "rewards.plugins"
REFERENCE = "loss.kl"

# What a person calls the content behind each key.
_NAMES = {
    TOKENIZER: "the tokenizer",
    PLUGINS: "the source of the plug-ins",
    REFERENCE: "the parameters of the KL reference",
}
_SHOWN = 3  # parts of a content that a message names

Identity = dict[str, dict[str, Any]]


def identity_of(tokenizer: Tokenizer, plugins: Sequence[str], reference: Params | None) -> Identity:
    """JSON values: for each key the parts of its content, each with its digest or value.

    reference: the KL reference, None where there is none. Its digests are computed on the devices;
    all processes call it.
    """
    identity: Identity = {TOKENIZER: tokenizer.identity()}
    if plugins:
        identity[PLUGINS] = {module: _digest_of_source(module) for module in plugins}
    if reference is not None:
        leaves, _ = flatten(reference)
        computed = jax.device_get(digests(leaves))
        identity[REFERENCE] = {path: f"{DIGEST}{d:08x}" for path, d in computed.items()}
    return identity


def _digest_of_source(module: str) -> str:
    """Of the file of an imported module; of a package, of all its Python files."""
    imported = sys.modules[module]
    files = []
    for folder in getattr(imported, "__path__", []):
        files += sorted(Path(folder).rglob("*.py"))
    if not files and getattr(imported, "__file__", None):
        files = [Path(imported.__file__ or "")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return f"{DIGEST}{digest.hexdigest()[:32]}"


def differences(saved: Mapping[str, Any] | None, now: Identity) -> tuple[dict[str, str], list[str]]:
    """What differs from the identity in a checkpoint: ({key: sentence}, [notices]).

    saved: None where an older version of this package wrote the checkpoint; a notice then says what
    cannot be compared. A content that the checkpoint does not know (its key was not set then) is no
    difference: that the key is set now is one of the configuration.
    """
    if saved is None:
        names = ", ".join(_NAMES[key] for key in now)
        notice = (
            f"the checkpoint was written before it held a digest of {names}: whether that"
            " changed since then cannot be told"
        )
        return {}, [notice]
    different = {}
    for key, parts in now.items():
        if key not in saved:
            continue
        before = saved[key]
        all_parts = dict.fromkeys([*parts, *before])
        changed = [part for part in all_parts if parts.get(part) != before.get(part)]
        if changed:
            different[key] = f"{_NAMES[key]} changed: {_parts(changed, before, parts)}"
    return different, []


def _parts(changed: list[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first parts that differ, with their values where these are no digests."""
    texts = []
    for part in changed[:_SHOWN]:
        text = part
        is_digest = DIGEST in f"{before.get(part)}{now.get(part)}"
        if not is_digest:
            text = f"{part} was {before.get(part)}, is {now.get(part)}"
        texts.append(text)
    if len(changed) > _SHOWN:
        texts.append(f"and {len(changed) - _SHOWN} more")
    return ", ".join(texts)
