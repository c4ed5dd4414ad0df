"""Laying configuration layers over each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sapo_jax.config import outline
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.presets import expand
from sapo_jax.config.schema import Config
from sapo_jax.config.source import parse_override
from sapo_jax.errors import ModelDirError

# A section without a tag means this member; it lies under the files, so that `objective: {tau_pos: 2.0}` is complete.
BOTTOM: dict[str, Any] = {"objective": {"name": Config().objective.name}}


class NoSuchItem(Exception):
    """An override speaks of a list item that is not there."""


def compose(
    layers: Iterable[dict[str, Any]], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """The layers, lowest first, then the overrides, left to right; and the overrides that could not be applied.

    Mappings merge key by key, all else is replaced. A union section whose tag changes (`objective.name`,
    `data.tasks.N.kind`) starts afresh. A preset counts as its published values, at the layer that names it; likewise a
    model directory, as what its config.json says, unless a higher layer names another. Overrides of tags, of the preset
    and of the model directory come before the others, so that their order on a command line means nothing.
    """
    raw, problems, parsed, layers = BOTTOM, [], [], list(layers)
    for override in overrides:
        try:
            parsed.append(parse_override(override))
        except ConfigError as error:
            problems += error.problems
    parsed.sort(key=lambda item: not _is_tag(item[0]))
    laid_over = [_nested(*item) for item in parsed]
    paths = [path for path in map(_model_path, [*layers, *laid_over]) if path is not None]
    for layer in layers:
        raw = merge(raw, _expanded(layer, paths, problems))
    for (keys, _), layer in zip(parsed, laid_over, strict=True):
        try:
            raw = merge(raw, _expanded(layer, paths, problems))
        except NoSuchItem as error:
            problems.append(Problem((".".join(map(str, keys)),), error.args[0]))
    return raw, problems


def _nested(keys: Sequence[str | int], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _model_path(layer: dict[str, Any]) -> Any:
    model = layer.get("model")
    return model.get("path") if isinstance(model, dict) else None


def _expanded(layer: dict[str, Any], paths: list[Any], problems: list[Problem]) -> dict[str, Any]:
    if paths and _model_path(layer) not in (None, paths[-1]):
        return layer  # overruled: it need not even exist
    try:
        return expand(layer)
    except ModelDirError as error:  # nothing can be said of the shape, nor of the tokenizer
        problems.append(
            Problem(
                ("model.path",), str(error), meant=("model", "data.tokenizer", "data.chat_template")
            )
        )
        return layer


def merge(under: Any, over: Any, node: outline.Node | None = outline.ROOT) -> Any:
    """`over` laid over `under`. Integer keys are list indices. Raises NoSuchItem."""
    if not isinstance(over, dict):
        return over
    if any(isinstance(key, int) for key in over) and not _is_free(node):
        return _merge_items(under, over, node)
    tag = outline.tag_of(node) if node else None
    if not isinstance(under, dict) or (tag in over and tag in under and over[tag] != under[tag]):
        under = {}
    merged = dict(under)
    for key, value in over.items():
        merged[str(key)] = merge(
            under.get(str(key)), value, outline.child(node, key, {**under, **over})
        )
    return merged


def _merge_items(under: Any, over: dict[int, Any], node: outline.Node | None) -> list[Any]:
    items = list(under) if isinstance(under, list) else []
    for index, value in over.items():
        if not isinstance(index, int) or index >= len(items):
            count = (
                f"has {len(items)}, counted from 0" if isinstance(under, list) else "is not given"
            )
            raise NoSuchItem(f"there is no item {index} to change: the list {count}")
        items[index] = merge(items[index], value, outline.child(node, index))
    return items


def _is_free(node: outline.Node | None) -> bool:
    """Whether this is (in) a mapping whose keys are not ours to know, such as a generator's options."""
    return node is None or outline.follow(node).get("type") == "object"


def _is_tag(keys: tuple[str | int, ...]) -> bool:
    node: outline.Node | None = outline.ROOT
    for key in keys[:-1]:
        node = outline.child(node, key)
    return keys in (("model", "preset"), ("model", "path")) or (
        node is not None and outline.tag_of(node) == keys[-1]
    )
