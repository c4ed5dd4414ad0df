"""Routing as data: the experts that the tokens of a rollout are sent to, made once and replayed (train.routing_replay).

    r2  the old-policy scoring pass records, the updates replay: the ratio changes with the weights alone, not with the
        experts (Routing Replay of the GSPO paper, arXiv 2507.18071, section 5.3)
    r3  the sampler records, scoring and updates replay: sampler and trainer also agree on the experts, which rounding
        makes differ (Rollout Routing Replay, arXiv 2510.11370)

The ids travel as `expert_ids_BTLk` of a Batch; what they mean, and that gate weights stay live: see models.moe. The KL
reference routes for itself: it is a model of its own. Nothing of this is in a checkpoint: each rollout makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from sapo_jax.batch import Rollout
from sapo_jax.config.schema import Model
from sapo_jax.models.moe import Routing
from sapo_jax.rollout import PackedBatch
from sapo_jax.types import Prompt


def sampled_experts(
    rows: PackedBatch, prompts: Sequence[Prompt], rollout: Rollout, model: Model
) -> np.ndarray:
    """The sampler's expert ids on packed rows, BTLk, checked; E (not recorded) on padding and last tokens."""
    G, C = len(rollout.length_B) // len(prompts), rollout.tokens_BC.shape[1]
    prompt_length_B = np.repeat([len(prompt.ids) for prompt in prompts], G)
    S = rollout.expert_ids_BTLk.shape[1] - C
    ids_BTLk = rows.place_slots(rollout.expert_ids_BTLk, S, prompt_length_B, fill=model.num_experts)
    return check_expert_ids(ids_BTLk, rows.arrays, model)


def check_expert_ids(ids_BTLk: np.ndarray, rows: Mapping[str, np.ndarray], model: Model) -> np.ndarray:
    """The ids themselves, if every token of the rows (fields of types.Batch) has k different experts in every layer.

    A token may have E in place of all its ids, "not recorded", if nothing depends on it: padding, and the last token of
    a completion. Raises ValueError that names the first token at fault.
    """
    segment_BT, E, k = rows["segment_ids_BT"], model.num_experts, model.num_experts_per_tok
    expected = (*segment_BT.shape, sum(model.sparse_layers), k)
    if ids_BTLk.shape != expected or not np.issubdtype(ids_BTLk.dtype, np.integer):
        found = f"{ids_BTLk.dtype} {ids_BTLk.shape}"
        raise ValueError(
            f"expert_ids_BTLk: expected integers {expected} (rows, tokens, sparse layers, k), got {found}"
        )

    def refuse(bad_BTL: np.ndarray, why: str) -> None:
        if bad_BTL.any():
            b, t, layer = np.argwhere(bad_BTL)[0].tolist()
            place = f"expert_ids_BTLk[{b}, {t}, {layer}] = {ids_BTLk[b, t, layer].tolist()}"
            raise ValueError(f"{place} (row {b}, token {t}, sparse layer {layer}): {why}")

    absent_BTL = (ids_BTLk == E).all(axis=-1)
    needed_BT = (segment_BT > 0) & ~_last_of_completion(segment_BT, rows["prefix_ids_BT"])
    outside_BTL = ((ids_BTLk < 0) | (ids_BTLk >= E)).any(axis=-1)
    sorted_BTLk = np.sort(ids_BTLk, axis=-1)
    twice_BTL = (sorted_BTLk[..., 1:] == sorted_BTLk[..., :-1]).any(axis=-1)
    refuse(
        absent_BTL & needed_BT[..., None],
        "no experts were recorded for a token that others depend on",
    )
    refuse(outside_BTL & ~absent_BTL, f"the experts are 0 to {E - 1}")
    refuse(twice_BTL & ~absent_BTL, f"a token goes to {k} different experts")
    return ids_BTLk


def _last_of_completion(segment_BT: np.ndarray, prefix_BT: np.ndarray) -> np.ndarray:
    ends_BT = np.diff(segment_BT, axis=1, append=0) != 0
    return ends_BT & (segment_BT != prefix_BT)


def router_metrics(routings: Sequence[Routing], model: Model) -> dict[str, float]:
    """Of the updates on a rollout; the arrays have leading dims of micro-batches and sparse layers.

    Load and aux loss are those of the experts that the router chose, replayed or not, over all tokens of the updates.
    replay_difference: the share of these k experts that are not among the k replayed ones, over the tokens that have
    some, by layer of the model.
    """
    together = jax.tree.map(lambda *x: np.concatenate(x).sum(axis=0), *routings)
    load_max, replay = together.load_E.max() * model.num_experts, together.replay
    metrics = {"router/load_max": load_max, "router/aux_loss": together.aux_loss.mean()}
    if replay is not None:
        difference_L = replay.difference / np.maximum(replay.tokens, 1)
        metrics["router/replay_difference_mean"] = difference_L.mean()
        metrics["router/replay_difference_max"] = difference_L.max()
        layers = np.flatnonzero(model.sparse_layers)
        metrics |= {
            f"replay_difference/layer_{i}": x for i, x in zip(layers, difference_L, strict=True)
        }
    return {name: float(value) for name, value in metrics.items()}
