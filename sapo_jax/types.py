"""The nouns that travel between the stages, and THE shape legend.

Shape legend (a suffix on a name is its shape, e.g. `logp_BT`, `reward_PG`, `expert_ids_BTLk`):

    P  distinct prompts in a rollout      G  completions per prompt (group size)
    B  sequences; P * G in a rollout, in group order: sequence b belongs to prompt b // G
    R  slots of the sampler: sequences that are decoded at a time
    S  prompt tokens (padded)             C  completion tokens (padded)
    T  tokens of a row (prompt + completion, padded; several sequences when packed)
    L  layers (those with experts, where experts are meant)
    D  model width    F  MLP width     V  vocabulary
    H  query heads K  key/value heads   h  head width
    E  experts     k  experts per token
    N  rows of any flattened batch        M  completion tokens of a row (padded)

`axis` is a mesh axis, `dim` an array dimension. Arrays aligned with tokens (`logp_BT`, `mask_BT`, ...) hold at
position t the value that belongs to token t; so `logp_BT[b, t] = log p(token t | tokens before t)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Any]  # nested dict of arrays

FinishReason = Literal["stop", "length"]  # the model ended the completion / it reached its limit (max_new_tokens)
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)

# ok / wrong: the verifier judged the answer. unparsable: there was no answer to judge (reward 0).
# timeout / error: the verifier itself failed, which says nothing of the answer: the sample is masked, never scored 0.
Status = Literal["ok", "wrong", "unparsable", "timeout", "error"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One problem, on the host. `index` identifies it for ever: the sampler's random numbers depend on it."""

    index: int
    text: str  # the rendered prompt, as the model sees it
    ids: tuple[int, ...]  # its tokens; never empty
    question: str  # the problem alone, for people to read; of a conversation the last user message
    answer: str
    verifier: str
    task: str  # the name of the mixture component it came from
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON values, for the verifier
    conversation: str = ""  # messages and tools as JSON, where they are more than the question: it tells problems apart


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion. `reward` is meaningless unless `valid`."""

    status: Status
    reward: float
    detail: str = ""

    @property
    def valid(self) -> bool:
        return self.status not in ("timeout", "error")

    @property
    def correct(self) -> bool:
        return self.status == "ok"


def _pytree(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Rollout:
    """What the sampler returns for P prompts and G completions each, B = P * G."""

    tokens_BC: Array  # int32 completion ids as sampled, the stop token included; pad id after the end
    logp_BC: Array  # float32 log-probabilities under the sampling distribution; 0 after the end
    length_B: Array  # int32 number of completion tokens, the stop token included
    finish_B: Array  # int32 index into FINISH_REASONS
    # Where asked for, the experts of every token that passed the model: T = S left-padded prompt slots, then C.
    # Elsewhere E, "not recorded": on padding, and on a completion's last token, which nothing is sampled from.
    expert_ids_BTLk: Array | None = None


@_pytree
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
    old_logp_BT: Array | None = None  # float32, under the policy that sampled (the denominator of the ratio)
    ref_logp_BT: Array | None = None  # float32, under the KL reference policy
    correction_BT: Array | None = None  # float32, sampler-trainer importance weight (constant)
    expert_ids_BTLk: Array | None = None  # the experts that tokens are sent to (see moe.MoE); None: those of the router


@_pytree
class TrainState:
    """All that an update changes. `step` counts optimiser steps that were tried (int32 scalar)."""

    step: Array
    params: Params
    opt_state: Any
