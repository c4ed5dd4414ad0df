"""The pytrees that travel between the stages. The shape legend is in `types.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Any]  # a nested dict of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What the sampler returns for P prompts and G completions each, B = P * G."""

    tokens_BC: Array  # int32 completion ids as sampled, stop token included; then the pad id
    logp_BC: Array  # float32 log-probs under the sampling distribution; 0 after the end
    length_B: Array  # int32 number of completion tokens, the stop token included
    finish_B: Array  # int32 index into FINISH_REASONS
    # Where it was asked for: the experts of every token that passed the model, T = S left-padded
    # prompt slots, then C. A token that did not pass it has E, "not recorded": padding, and a
    # completion's last token, which nothing is sampled from.
    expert_ids_BTLk: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows for the scorer and the learner.

    A row holds a prompt and its completion, or several prompts and completions (packed).

    Segments: segment_ids_BT is 0 on padding and 1, 2, ... on the prompts and completions of a row.
    A token attends to the tokens before it in its own segment, and to those of the segment
    prefix_ids_BT. For a completion that is its prompt, which it shares with the others of its
    group; where there is none, it is the token's own segment again. positions_BT goes on from
    prompt to completion.

    Completion tokens: mask_BT is True on those that are trained on. picked_BM lists the columns of
    a row's completion tokens (T where there is none). source_BM lists where the token before each
    of them stands: the hidden state there predicts it.

    Weights: weight_BT is made for the WHOLE optimiser batch, so that the loss is
    -sum(weight_BT * surrogate_BT), however the rows are split into micro-batches, packed or
    sharded.
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
    # float32, log-probs under the policy that sampled: the denominator of the ratio
    old_logp_BT: Array | None = None
    ref_logp_BT: Array | None = None  # float32, under the KL reference policy
    correction_BT: Array | None = None  # float32, sampler-trainer importance weight (a constant)
    # float32, log-probs that the sampler assigned; there where the sequence mask needs them
    sampler_logp_BT: Array | None = None
    # The experts that tokens are sent to (see models.moe); None: those that the router chooses.
    expert_ids_BTLk: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes."""

    # int32 scalar, optimiser steps that were tried; a batch without a signal is not one
    step: Array
    params: Params
    opt_state: Any
