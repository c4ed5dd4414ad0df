"""Routing as data: the experts that a rollout's tokens are sent to, made once and replayed.

The config key `train.routing_replay` chooses who makes them:

    r2  The old-policy scoring pass records them, the updates replay them. So the ratio changes
        with the weights alone, not with the experts (Routing Replay of the GSPO paper, arXiv
        2507.18071, section 5.3).
    r3  The sampler records them, scoring and updates replay them. So sampler and trainer also
        agree on the experts, which rounding makes differ (Rollout Routing Replay, arXiv
        2510.11370).

The ids travel as `expert_ids_BTLk` of a Batch; `models.moe` says what they mean, and that gate
weights stay live. The KL reference chooses its own experts, as it is a model of its own. Nothing of
this is in a checkpoint: each rollout makes its ids anew.
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
    """The sampler's expert ids on packed rows, BTLk, checked.

    On padding and on the last tokens of completions they are E, "not recorded".

    Raises ValueError where the sampler did not record routing.
    """
    if rollout.expert_ids_BTLk is None:
        raise ValueError("the rollout has no expert ids; make the sampler with record_routing")
    slot_ids_BTLk = np.asarray(rollout.expert_ids_BTLk)
    G = len(rollout.length_B) // len(prompts)
    prompt_length_B = np.repeat([len(prompt.ids) for prompt in prompts], G)
    C = rollout.tokens_BC.shape[1]
    S = slot_ids_BTLk.shape[1] - C
    expert_ids_BTLk = rows.place_slots(slot_ids_BTLk, S, prompt_length_B, fill=model.num_experts)
    return check_expert_ids(expert_ids_BTLk, rows.arrays, model)


def check_expert_ids(
    expert_ids_BTLk: np.ndarray, rows: Mapping[str, np.ndarray], model: Model
) -> np.ndarray:
    """Returns the ids if every token of the rows has k different experts in every sparse layer.

    A token on which nothing depends may have E, "not recorded", in place of all its ids: padding,
    and the last token of a completion.

    rows: fields of `batch.Batch` by name.

    Raises ValueError that names the first token at fault.
    """
    segment_ids_BT = rows["segment_ids_BT"]
    E = model.num_experts
    k = model.num_experts_per_tok
    shape = (*segment_ids_BT.shape, sum(model.sparse_layers), k)
    if expert_ids_BTLk.shape != shape or not np.issubdtype(expert_ids_BTLk.dtype, np.integer):
        raise ValueError(
            f"expert_ids_BTLk: expected integers {shape} (rows, tokens, sparse layers, k), "
            f"got {expert_ids_BTLk.dtype} {expert_ids_BTLk.shape}"
        )

    def refuse(bad_BTL: np.ndarray, why: str) -> None:
        """Raise for the first token that is bad in some layer, if there is one."""
        if bad_BTL.any():
            b, t, layer = np.argwhere(bad_BTL)[0].tolist()
            ids = expert_ids_BTLk[b, t, layer].tolist()
            raise ValueError(
                f"expert_ids_BTLk[{b}, {t}, {layer}] = {ids} "
                f"(row {b}, token {t}, sparse layer {layer}): {why}"
            )

    is_absent_BTL = (expert_ids_BTLk == E).all(axis=-1)
    is_real_BT = segment_ids_BT > 0
    is_needed_BT = is_real_BT & ~_is_last_of_completion(segment_ids_BT, rows["prefix_ids_BT"])
    is_outside_BTL = ((expert_ids_BTLk < 0) | (expert_ids_BTLk >= E)).any(axis=-1)
    sorted_BTLk = np.sort(expert_ids_BTLk, axis=-1)
    is_repeated_BTL = (sorted_BTLk[..., 1:] == sorted_BTLk[..., :-1]).any(axis=-1)
    refuse(
        is_absent_BTL & is_needed_BT[..., None],
        "no experts were recorded for a token that others depend on",
    )
    refuse(is_outside_BTL & ~is_absent_BTL, f"the experts are 0 to {E - 1}")
    refuse(is_repeated_BTL & ~is_absent_BTL, f"a token goes to {k} different experts")
    return expert_ids_BTLk


def _is_last_of_completion(segment_ids_BT: np.ndarray, prefix_ids_BT: np.ndarray) -> np.ndarray:
    is_last_of_segment_BT = np.diff(segment_ids_BT, axis=1, append=0) != 0
    is_completion_BT = segment_ids_BT != prefix_ids_BT
    return is_last_of_segment_BT & is_completion_BT


def router_metrics(routings: Sequence[Routing], model: Model) -> dict[str, float]:
    """Metrics of the router over the updates on a rollout.

    routings: those of the updates; their arrays have leading dims of micro-batches and of sparse
        layers, and are summed over updates and micro-batches.

    `router/load_max` is E times the largest load of an expert in any layer, `router/aux_loss` the
    mean over layers. Both are about the experts that the router chose, replayed or not, over all
    tokens of the updates. `replay_difference` is the share of these k experts that are not among
    the k replayed ones, over the tokens that have some, for each layer of the model.
    """
    summed = jax.tree.map(lambda *arrays: np.concatenate(arrays).sum(axis=0), *routings)
    metrics = {
        "router/load_max": summed.load_E.max() * model.num_experts,
        "router/aux_loss": summed.aux_loss.mean(),
    }
    replay = summed.replay
    if replay is not None:
        difference_L = replay.difference / np.maximum(replay.tokens, 1)
        metrics["router/replay_difference_mean"] = difference_L.mean()
        metrics["router/replay_difference_max"] = difference_L.max()
        sparse_layers = np.flatnonzero(model.sparse_layers)
        for layer, difference in zip(sparse_layers, difference_L, strict=True):
            metrics[f"replay_difference/layer_{layer}"] = difference
    return {name: float(value) for name, value in metrics.items()}
