"""Plain torch with a Hugging Face model: what somebody writes who writes the loop by hand.

Log-probs at completion positions alone, SDPA attention (no mask: nothing is padded), gradients over micro-batches,
fused AdamW. Decoding prefills each prompt once, copies its cache to the group, and feeds token after token to the model
until the longest sequence of the batch is done; 64 requests are four batches of 16.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from worker import Job, Requests, Work, reward, serve


def load(work: Work):
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.float32, attn_implementation="sdpa"
    )


def logps(model, ids_BT: torch.Tensor, C: int) -> torch.Tensor:
    hidden_BCD = model.model(ids_BT, use_cache=False).last_hidden_state[:, -C - 1 : -1]
    logits_BCV = model.lm_head(hidden_BCD)
    target_BC = ids_BT[:, -C:]
    return -F.cross_entropy(logits_BCV.flatten(0, 1), target_BC.flatten(), reduction="none").view(
        target_BC.shape
    )


class Learner:
    def __init__(self, model, work: Work, rows: int):
        self.model, self.work, self.rows = model, work, rows
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=work.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )

    def update(self, ids_BT, old_BC: torch.Tensor | None, adv_B) -> tuple[float, float]:
        """One GRPO step; old_BC None: that of the policy itself. Returns loss and gradient norm."""
        C, B, total = len(self.work.completions[0]), len(ids_BT), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(0, B, self.rows):
            part = slice(i, i + self.rows)
            logp = logps(self.model, ids_BT[part], C)
            ratio = torch.exp(logp - (logp.detach() if old_BC is None else old_BC[part]))
            adv, clipped = adv_B[part, None], ratio.clamp(1 - self.work.clip, 1 + self.work.clip)
            loss = -torch.min(ratio * adv, clipped * adv).mean(dim=1).sum() / B
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.work.max_grad_norm)
        self.optimizer.step()
        return total, norm.item()


@torch.no_grad()
def decode(model, prompts: list[list[int]], group: int, steps: int) -> torch.Tensor:
    """`steps` sampled tokens for each prompt and each member of its group."""
    out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(group)
    logits_BV, tokens = out.logits[:, -1].repeat_interleave(group, dim=0), []
    while True:
        tokens.append(torch.multinomial(logits_BV.float().softmax(dim=-1), 1))
        if len(tokens) == steps:
            return torch.cat(tokens, dim=1)
        logits_BV = model(
            tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]


def rollout(model, work: Work, requests: Requests) -> list[list[int]]:
    found = []
    for prompts, lengths in requests.batches(work.slots):
        tokens = decode(model, prompts[:: work.group], work.group, max(lengths)).tolist()
        found += [ids[:n] for ids, n in zip(tokens, lengths, strict=True)]
    return found


# The rows that go through forward and backward at a time. Fewer take less memory; these were the fastest here.
ROWS = {"update": 16, "score": 16}


def score_job(work: Work) -> Job:
    model, ids_BT, C = load(work), torch.tensor(work.sequences), len(work.completions[0])

    @torch.no_grad()
    def run():
        return torch.cat([logps(model, part, C) for part in ids_BT.split(ROWS["score"])])

    return Job(run, lambda logp_BC: {"logp": logp_BC.tolist()})


def update_job(work: Work) -> Job:
    learner = Learner(load(work), work, ROWS["update"])
    tensors = (
        torch.tensor(work.sequences),
        torch.tensor(work.old_logp),
        torch.tensor(work.advantages),
    )
    return Job(
        lambda: learner.update(*tensors),
        lambda found: dict(zip(("loss", "grad_norm"), found, strict=True)),
    )


def rollout_job(kind: str):
    def make(work: Work) -> Job:
        model = load(work)
        run = lambda: rollout(model, work, work.requests[kind])
        return Job(run, lambda found: {"new_tokens": [len(ids) for ids in found]})

    return make


def iteration_job(work: Work) -> Job:
    model = load(work)
    learner = Learner(model, work, ROWS["update"])

    def run():
        completions = rollout(model, work, work.requests["iteration"])
        rewards = torch.tensor([reward(ids) for ids in completions]).view(-1, work.group)
        adv = (rewards - rewards.mean(dim=1, keepdim=True)) / (
            rewards.std(dim=1, keepdim=True) + 1e-4
        )
        ids = [work.prompts[b // work.group] + c for b, c in enumerate(completions)]
        learner.update(torch.tensor(ids), None, adv.flatten())
        return completions

    return Job(run, lambda found: {"new_tokens": [len(ids) for ids in found]})


if __name__ == "__main__":
    serve(
        {"score": score_job, "update": update_job, "iteration": iteration_job}
        | {kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")}
    )
