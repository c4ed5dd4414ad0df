"""Plain torch with a Hugging Face model: what somebody writes who writes the loop by hand.

Log-probs are taken at completion positions alone, attention is SDPA (without a mask, since
nothing is padded), gradients are summed over micro-batches, and AdamW is fused. Decoding prefills
each prompt once, copies its cache to the group, and feeds token after token to the model until
the longest sequence of the batch is done; 64 requests are four batches of 16.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from worker import Job, Requests, Work, reward, serve

# The sequences that go through forward (and backward) at a time. Fewer take less memory; these were
# the fastest.
UPDATE_SEQUENCES = 16
SCORE_SEQUENCES = 16


def load(work: Work) -> PreTrainedModel:
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.float32, attn_implementation="sdpa"
    )


def logps(model: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Log-probs of the last `new_tokens` of each sequence, BC."""
    hidden_BTD = model.model(ids_BT, use_cache=False).last_hidden_state
    logits_BCV = model.lm_head(hidden_BTD[:, -new_tokens - 1 : -1])
    target_BC = ids_BT[:, -new_tokens:]
    loss = F.cross_entropy(logits_BCV.flatten(0, 1), target_BC.flatten(), reduction="none")
    return -loss.view(target_BC.shape)


class Learner:
    def __init__(self, model: PreTrainedModel, work: Work, sequences_at_a_time: int):
        self.model = model
        self.work = work
        self.sequences_at_a_time = sequences_at_a_time
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=work.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )

    def update(
        self, ids_BT: torch.Tensor, old_BC: torch.Tensor | None, adv_B: torch.Tensor
    ) -> dict[str, float]:
        """One GRPO step. old_BC None: the old log-probs are those of the policy itself."""
        new_tokens = len(self.work.completions[0])
        sequences = len(ids_BT)
        total_loss = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, sequences, self.sequences_at_a_time):
            part = slice(start, start + self.sequences_at_a_time)
            logp = logps(self.model, ids_BT[part], new_tokens)
            old = logp.detach() if old_BC is None else old_BC[part]
            ratio = torch.exp(logp - old)
            clipped = ratio.clamp(1 - self.work.clip, 1 + self.work.clip)
            adv = adv_B[part, None]
            surrogate = torch.min(ratio * adv, clipped * adv)
            loss = -surrogate.mean(dim=1).sum() / sequences
            loss.backward()
            total_loss += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.work.max_grad_norm)
        self.optimizer.step()
        return {"loss": total_loss, "grad_norm": norm.item()}


@torch.no_grad()
def decode(
    model: PreTrainedModel, prompts: list[list[int]], group: int, steps: int
) -> torch.Tensor:
    """`steps` sampled tokens for each prompt and each member of its group."""
    out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(group)
    logits_BV = out.logits[:, -1].repeat_interleave(group, dim=0)
    tokens = []
    while True:
        tokens.append(torch.multinomial(logits_BV.float().softmax(dim=-1), 1))
        if len(tokens) == steps:
            return torch.cat(tokens, dim=1)
        out = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BV = out.logits[:, -1]


def rollout(model: PreTrainedModel, work: Work, requests: Requests) -> list[list[int]]:
    """The completions, each cut to its length."""
    completions = []
    for prompts, lengths in requests.batches(work.slots):
        distinct_prompts = prompts[:: work.group]
        tokens = decode(model, distinct_prompts, work.group, max(lengths)).tolist()
        completions += [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
    return completions


def count_tokens(completions: list[list[int]]) -> dict[str, list[int]]:
    return {"new_tokens": [len(ids) for ids in completions]}


def score_job(work: Work) -> Job:
    model = load(work)
    ids_BT = torch.tensor(work.sequences)
    new_tokens = len(work.completions[0])

    @torch.no_grad()
    def run() -> torch.Tensor:
        parts = ids_BT.split(SCORE_SEQUENCES)
        return torch.cat([logps(model, part, new_tokens) for part in parts])

    return Job(run, lambda logp_BC: {"logp": logp_BC.tolist()})


def update_job(work: Work) -> Job:
    learner = Learner(load(work), work, UPDATE_SEQUENCES)
    ids_BT = torch.tensor(work.sequences)
    old_BC = torch.tensor(work.old_logp)
    adv_B = torch.tensor(work.advantages)
    return Job(lambda: learner.update(ids_BT, old_BC, adv_B), lambda metrics: metrics)


def rollout_job(kind: str) -> Callable[[Work], Job]:
    def make(work: Work) -> Job:
        model = load(work)
        return Job(lambda: rollout(model, work, work.requests[kind]), count_tokens)

    return make


def iteration_job(work: Work) -> Job:
    model = load(work)
    learner = Learner(model, work, UPDATE_SEQUENCES)

    def run() -> list[list[int]]:
        completions = rollout(model, work, work.requests["iteration"])
        rewards_PG = torch.tensor([reward(ids) for ids in completions]).view(-1, work.group)
        centered_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        adv_PG = centered_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-4)
        ids = [work.prompts[b // work.group] + c for b, c in enumerate(completions)]
        learner.update(torch.tensor(ids), None, adv_PG.flatten())
        return completions

    return Job(run, count_tokens)


if __name__ == "__main__":
    serve(
        {"score": score_job, "update": update_job, "iteration": iteration_job}
        | {kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")}
    )
