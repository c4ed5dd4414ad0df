"""The pytrees that travel between the stages. The shape legend is in `types.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray


Params = dict[str, Any]  # nested dict of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What the sampler returns for P prompts and G completions each, B = P * G."""

    tokens_BC: (
        Array  # int32 completion ids as sampled, the stop token included; pad id after the end
    )
    logp_BC: Array  # float32 log-probabilities under the sampling distribution; 0 after the end
    length_B: Array  # int32 number of completion tokens, the stop token included
    finish_B: Array  # int32 index into FINISH_REASONS
    # Where asked for, the experts of every token that passed the model: T = S left-padded prompt slots, then C.
    # Elsewhere E, "not recorded": on padding, and on a completion's last token, which nothing is sampled from.
    expert_ids_BTLk: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows for the scorer and the learner. A row holds prompts and completions, one of each or several.

    segment_ids_BT is 0 on padding and 1, 2, ... on the prompts and completions of a row. A token attends to the tokens
    before it in its own segment and to those of the segment prefix_ids_BT: a completion's prompt, which it shares with
    the others of its group (its own segment again, where there is none). positions_BT goes on from prompt to
    completion. mask_BT is True on the completion tokens that are trained on. picked_BM lists the columns of a row's
    completion tokens (T where there is none), source_BM where the token before each of them stands: the hidden state
    there predicts it. weight_BT is made for the WHOLE optimiser batch, so that loss = -sum(weight_BT * surrogate_BT)
    however the rows are split into micro-batches, packed or sharded.
    """

    tokens_BT: Array  # int32
    positions_BT: Array  # int32
    segment_ids_BT: Array  # int32
    prefix_ids_BT: Array  # int32
    mask_BT: Array  # bool
    picked_BM: Array  # int32
    source_BM: Array  # int32
    adv_BT: Array  # float32, the sequence's advantage on each of its tokens
    weight_BT: Array  # float32, 0 where masked
    old_logp_BT: Array | None = (
        None  # float32, under the policy that sampled (the denominator of the ratio)
    )
    ref_logp_BT: Array | None = None  # float32, under the KL reference policy
    correction_BT: Array | None = None  # float32, sampler-trainer importance weight (constant)
    expert_ids_BTLk: Array | None = (
        None  # the experts that tokens are sent to (see moe.MoE); None: those of the router
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes. `step` counts optimiser steps that were tried (int32 scalar)."""

    step: Array
    params: Params
    opt_state: Any
