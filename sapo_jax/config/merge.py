"""Laying the layers of a configuration, files and overrides, over each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.outline import ROOT, Node
from sapo_jax.config.presets import expand
from sapo_jax.config.schema import Config
from sapo_jax.config.source import KeyPath, Layer, Override, parse_override
from sapo_jax.errors import ModelDirError

# The lowest layer. `objective: {tau_pos: 2.0}` in a file is complete, because this says which
# objective a section without a name means.
BOTTOM: Layer = {"objective": {"name": Config().objective.name}}

# Numbers of an objective whose meaning hangs on another key of it. Where a higher layer changes
# that key, those of the layers below mean nothing any more and are forgotten.
DEPENDENT_KEYS: dict[str, tuple[str, ...]] = {
    "gate": (
        "tau_pos",
        "tau_neg",
        "width_pos",
        "width_neg",
        "tau_pos_below",
        "tau_pos_above",
        "tau_neg_below",
        "tau_neg_above",
    ),
    "divergence": ("delta",),
}


class NoSuchItem(Exception):
    """An override speaks of an item of a list that is not there."""


def compose(layers: Iterable[Layer], overrides: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """One mapping of all layers, lowest first, and then of the overrides, left to right.

    Also returns what is wrong with the overrides and layers that could not be applied.

    - Mappings merge key by key; all else, lists too, is replaced.
    - A union section whose tag changes (`objective.name`, `data.tasks.N.kind`) starts afresh.
    - Another `objective.gate` forgets the temperatures and widths of the old one, another
      `objective.divergence` its delta.
    - A preset counts as its published values, at the layer that names it.
    - Likewise a model directory, as what its config.json says, unless a higher layer names
      another one.
    - Overrides of tags, of such keys, of the preset and of the model directory are applied before
      the others, so that their order on a command line means nothing.
    """
    problems: list[Problem] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except ConfigError as error:
            problems += error.problems
    # Sorting is stable: among overrides of the same turn the later one wins.
    parsed.sort(key=lambda override: _turn(override.keys))

    layers = list(layers)
    model_path = _highest_model_path([*layers, *(override.as_layer() for override in parsed)])
    merged = BOTTOM
    for layer in layers:
        merged = merge(merged, _expanded(layer, model_path, problems))
    for override in parsed:
        layer = _expanded(override.as_layer(), model_path, problems)
        try:
            merged = merge(merged, layer)
        except NoSuchItem as error:
            problems.append(Problem((override.path,), str(error)))
    return merged, problems


def _turn(keys: KeyPath) -> int:
    """When an override is applied: 0 for a key that decides which other keys there are, or what
    their values are; 1 for one that gives others their meaning; 2 for the rest."""
    if keys in (("model", "preset"), ("model", "path")):
        return 0
    section = ROOT
    for key in keys[:-1]:
        section = section.child(key)
    if section.tag is not None and section.tag == keys[-1]:
        return 0
    if keys[0] == "objective" and keys[-1] in DEPENDENT_KEYS:
        return 1
    return 2


def _model_path(layer: Layer) -> Any:
    """What the layer says of `model.path`; None where it says nothing."""
    model = layer.get("model")
    if not isinstance(model, dict):
        return None
    return model.get("path")


def _highest_model_path(layers: Sequence[Layer]) -> Any:
    for layer in reversed(layers):
        path = _model_path(layer)
        if path is not None:
            return path
    return None


def _expanded(layer: Layer, model_path: Any, problems: list[Problem]) -> Layer:
    """The layer with its preset or model directory written out; problems with those are added."""
    path = _model_path(layer)
    if path is not None and path != model_path:
        return layer  # a higher layer names another directory: this one need not even exist
    try:
        return expand(layer)
    except ModelDirError as error:
        # Nothing can be said of the model's shape, nor of its tokenizer.
        in_doubt = ("model", "data.tokenizer", "data.chat_template")
        problems.append(Problem(("model.path",), str(error), in_doubt=in_doubt))
        return layer


def merge(under: Any, over: Any, node: Node = ROOT) -> Any:
    """`over` laid over `under`, two values of the place that `node` describes.

    Integer keys in `over` are positions in a list. Raises NoSuchItem.
    """
    if not isinstance(over, dict):
        return over
    speaks_of_items = any(isinstance(key, int) for key in over)
    if speaks_of_items and not node.is_mapping:
        return _merge_items(under, over, node)
    if not isinstance(under, dict) or _tag_changes(under, over, node):
        under = {}
    merged = _without_forgotten(under, over, node)
    section = {**under, **over}
    for key, value in over.items():
        child = node.child(key, section=section)
        merged[str(key)] = merge(under.get(str(key)), value, child)
    return merged


def _tag_changes(under: dict, over: dict, node: Node) -> bool:
    tag = node.tag
    return tag in over and tag in under and over[tag] != under[tag]


def _without_forgotten(under: dict, over: dict, node: Node) -> dict[str, Any]:
    """A copy of `under` without the numbers that `over` leaves without a meaning."""
    kept = dict(under)
    known = node.member_for({**under, **over})
    for key, dependents in DEPENDENT_KEYS.items():
        if key not in over or key not in known.keys():
            continue
        default = known.child(key).rules.get("default")
        if over[key] != under.get(key, default):
            for dependent in dependents:
                kept.pop(dependent, None)
    return kept


def _merge_items(under: Any, over: dict, node: Node) -> list[Any]:
    """`under`, a list, with the items replaced or changed that `over` names by their positions."""
    items: list[Any] = []
    count = "is not given"
    if isinstance(under, list):
        items = list(under)
        count = f"has {len(items)}, counted from 0"
    for position, value in over.items():
        if not isinstance(position, int) or position >= len(items):
            raise NoSuchItem(f"there is no item {position} to change: the list {count}")
        items[position] = merge(items[position], value, node.child(position))
    return items
