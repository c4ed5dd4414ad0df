"""The shapes of the RL iteration that a plan compiles, and the FLOPs that these need."""

from __future__ import annotations

import dataclasses
import math

from sapo_jax.config.schema import Config
from sapo_jax.models.size import causal_keys, head_flops, layer_flops
from sapo_jax.rollout.packing import FEWEST_PICKED, bucket


@dataclasses.dataclass(frozen=True)
class Workload:
    """The shapes of one RL iteration whose prompts and completions all have their largest length.

    Rows hold one sequence each, or as many as fit into `train.row_tokens`.
    """

    prompts: int  # P
    sequences: int  # B = P * G
    slots: int  # R, completions that are written at a time
    prompt_tokens: int  # S
    new_tokens: int  # C
    row_tokens: int  # T
    picked: int  # M, completion tokens of a row
    rows: int  # of a mini-batch
    mini_batches: int
    parts: int = 1  # in which the rollout is sampled, one after the other

    @classmethod
    def of(cls, cfg: Config) -> Workload:
        """The workload of a config."""
        prompts = cfg.rollout.prompts_per_step
        sequences = prompts * cfg.rollout.group_size
        parts = prompts // cfg.rollout.prompts_in_flight
        sequences_at_once = sequences // parts
        prompt_tokens = cfg.data.max_prompt_tokens
        new_tokens = cfg.rollout.max_new_tokens
        sequence_tokens = prompt_tokens + new_tokens

        row_tokens = cfg.train.row_tokens or bucket(sequence_tokens)
        sequences_per_row = row_tokens // sequence_tokens
        sequences_per_mini_batch = math.ceil(sequences / cfg.train.mini_batches)
        rows = math.ceil(sequences_per_mini_batch / sequences_per_row)
        picked = min(bucket(sequences_per_row * new_tokens, FEWEST_PICKED), row_tokens)
        return cls(
            prompts=prompts,
            sequences=sequences,
            slots=min(cfg.rollout.slots or sequences_at_once, sequences_at_once),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            row_tokens=row_tokens,
            picked=picked,
            rows=rows,
            mini_batches=cfg.train.mini_batches,
            parts=parts,
        )

    def decode_steps(self, mean_tokens: float) -> float:
        """Steps of the decode loop, for completions of `mean_tokens` on average and C at most.

        They are those of one of the parts in which the rollout is sampled. Without waiting
        completions there are C. Where completions wait for slots it is an estimate: all tokens over
        all slots, and at the end what a longest completion has beyond the mean. That the last round
        may not fill the slots is not in it.
        """
        sequences_at_once = self.sequences / self.parts
        if self.slots == sequences_at_once:
            return self.new_tokens
        all_tokens_over_slots = sequences_at_once / self.slots * mean_tokens
        return all_tokens_over_slots + self.new_tokens - mean_tokens


def useful_flops(cfg: Config, work: Workload) -> dict[str, float]:
    """The FLOPs that the model needs for one call of each function, over all devices.

    Nothing is recomputed and nothing is padded. Forward costs 2 N per token and backward 4 N, with
    N the active parameters without the token table; attention costs 4 H h L per token and key
    before it; each predicted token costs 2 V D. `decode` is the whole loop, C tokens of every
    sequence: the prompt's last token, which prefill has passed too, and all of the completion but
    its last.
    """
    layers = layer_flops(cfg.model)
    head = head_flops(cfg.model, cfg.model.vocab_size)
    S = work.prompt_tokens
    C = work.new_tokens
    B = work.sequences

    sequence = (S + C) * layers.per_token + causal_keys(S + C) * layers.per_key + C * head
    score = B / work.mini_batches * sequence
    prompt = S * layers.per_token + causal_keys(S) * layers.per_key
    keys_while_decoding = causal_keys(S + C - 1) - causal_keys(S - 1)
    completion = C * (layers.per_token + head) + keys_while_decoding * layers.per_key
    return {
        "update": 3 * score,
        "score": score,
        "prefill": work.prompts / work.parts * prompt,
        "decode": B / work.parts * completion,
    }
