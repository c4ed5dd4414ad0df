"""Host memory of a rollout while its mini-batches wait for their turn, from the arrays themselves.

    python experiments/benchmarks/rollout_memory.py [--completions 1024] [--tokens 1024 4096]

A rollout of completions of the greatest length is made, packed and cut into mini-batches, as in a
step, with invented tokens; the sizes of all arrays that then live are added up. They are linear in
the number of completions, so the last column holds 64 mini-batches of 1,024.
"""

from __future__ import annotations

import argparse

import numpy as np

from sapo_jax.batch import Rollout
from sapo_jax.config import Config, Data, Train
from sapo_jax.config import Rollout as RolloutConfig
from sapo_jax.rollout import Packing, pack_rollout
from sapo_jax.training.experience import (
    GradedRollout,
    RolloutScores,
    group_advantages,
    mini_batches,
)
from sapo_jax.types import Prompt, Verdict

GROUP_SIZE = 16
PROMPT_TOKENS = 256
GOAL = 64 * 1024  # completions


def measured(completions: int, max_new_tokens: int) -> dict[str, int]:
    """Bytes of the arrays of a rollout, by what they are."""
    cfg = Config(
        data=Data(max_prompt_tokens=PROMPT_TOKENS),
        rollout=RolloutConfig(
            prompts_per_step=completions // GROUP_SIZE,
            group_size=GROUP_SIZE,
            max_new_tokens=max_new_tokens,
        ),
        train=Train(mini_batches=1),
    )
    prompts = []
    for index in range(completions // GROUP_SIZE):
        prompts.append(Prompt(index, "", (1,) * PROMPT_TOKENS, "", "", "exact", "none"))
    shape = (completions, max_new_tokens)
    rollout = Rollout(
        tokens_BC=np.ones(shape, np.int32),
        logp_BC=np.zeros(shape, np.float32),
        length_B=np.full(completions, max_new_tokens, np.int32),
        finish_B=np.ones(completions, np.int32),
    )
    graded = GradedRollout(
        prompts=prompts,
        length_B=rollout.length_B,
        finish_B=rollout.finish_B,
        texts=[""] * completions,
        verdicts=[Verdict("ok", float(b % 2)) for b in range(completions)],
    )
    packing = Packing(
        body=1.0,
        key=1.0,
        skips=False,
        max_prompt=PROMPT_TOKENS,
        max_new=max_new_tokens,
        micro_batch=8,
    )
    packed = pack_rollout(prompts, rollout, 0, cfg.train.mini_batches, packing)
    sampler_BT = packed.place(rollout.logp_BC)
    old_BT = np.zeros_like(sampler_BT)
    scores = RolloutScores(sampler_BT, old_BT, old_BT)
    indices = range(len(prompts))
    adv_PG = group_advantages(graded, cfg)
    batches = mini_batches(packed, graded, adv_PG, scores, indices, cfg)
    batch_bytes = 0
    for batch in batches:
        for name in ("mask_BT", "adv_BT", "weight_BT"):
            batch_bytes += getattr(batch, name).nbytes
    rows = [*packed.arrays.values(), packed.sequence_BT, packed.offset_BT]
    sampled = [rollout.tokens_BC, rollout.logp_BC, rollout.length_B, rollout.finish_B]
    return {
        "as sampled": sum(array.nbytes for array in sampled),
        "packed rows": sum(array.nbytes for array in rows),
        "log-probs": sampler_BT.nbytes + old_BT.nbytes,
        "mini-batches": batch_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    arguments = parser.parse_args()
    for max_new_tokens in arguments.tokens:
        sizes = measured(arguments.completions, max_new_tokens)
        total = sum(sizes.values())
        per_token = total / (arguments.completions * max_new_tokens)
        at_goal = total / arguments.completions * GOAL / 2**30
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items())
        print(
            f"{arguments.completions} completions of {max_new_tokens} tokens: {parts}; together "
            f"{total / 2**20:.0f} MiB, {per_token:.1f} B a token; 64 x 1,024: {at_goal:.1f} GiB"
        )


if __name__ == "__main__":
    main()
