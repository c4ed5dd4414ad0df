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

FinishReason = Literal[
    "stop", "length"
]  # the model ended the completion / it reached its limit (max_new_tokens)
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
    metadata: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # JSON values, for the verifier
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
