"""The nouns that live on the host, without JAX, and THE shape legend.

Shape legend (a suffix on a name is its shape, for example `logp_BT`, `reward_PG`):

    P  distinct prompts in a rollout      G  completions per prompt (group size)
    B  sequences; P * G in a rollout, in group order: sequence b belongs to prompt b // G
    R  slots of the sampler: sequences that are decoded at a time
    S  prompt tokens (padded)             C  completion tokens (padded)
    T  tokens of a row (prompt + completion, padded; several sequences when packed)
    L  layers (those with experts, where experts are meant)
    D  model width    F  MLP width        V  vocabulary
    H  query heads    K  key/value heads  h  head width
    E  experts        k  experts per token
    N  rows of any flattened batch        M  completion tokens of a row (padded)

`axis` is a mesh axis, `dim` an array dimension. Arrays aligned with tokens (`logp_BT`, `mask_BT`,
...) hold at position t the value that belongs to token t; so `logp_BT[b, t]` is
log p(token t | tokens before t).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

# stop: the model ended the completion. length: the completion reached max_new_tokens.
FinishReason = Literal["stop", "length"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)

# ok, wrong: the verifier graded the answer. unparsable: there was no answer to grade (reward 0).
# timeout: the answer kept the verifier busy until the deadline (reward 0). error: the verifier
# itself failed, which says nothing about the answer. Such a sample is masked; it is never scored 0.
Status = Literal["ok", "wrong", "unparsable", "timeout", "error"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One problem, on the host.

    `index` identifies it for ever: the sampler's random numbers depend on it.
    """

    index: int
    text: str  # the rendered prompt, as the model sees it
    ids: tuple[int, ...]  # its tokens; never empty
    question: str  # the problem alone, for people; of a conversation the last user message
    answer: str
    verifier: str
    task: str  # the name of the mixture component it came from
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON, for the verifier
    # Messages and tools as JSON, where they are more than the question: they tell problems apart.
    conversation: str = ""
    # `path:line` of the row it was read from, for messages; "" where no file held it.
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion. `reward` has a meaning only if `valid`."""

    status: Status
    reward: float
    detail: str = ""

    @property
    def valid(self) -> bool:
        """Whether the verifier worked."""
        return self.status != "error"

    @property
    def correct(self) -> bool:
        return self.status == "ok"
