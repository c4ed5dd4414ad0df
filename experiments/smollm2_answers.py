"""A few greedy answers of a converted SmolLM2-135M-Instruct, checked: the weights, tokenizer and template are right.

    python experiments/smollm2_answers.py .cache/smollm2/model

Hardware: two cores, 1.5 GB; half a minute. Expected: every answer contains what it should; else it exits with 1.
"""

from __future__ import annotations

import sys

import jax

from sapo_jax.config import Mesh, Model, read_model_keys
from sapo_jax.data import load_template, load_tokenizer
from sapo_jax.distributed import sharding
from sapo_jax.hub.weights import load_params
from sapo_jax.models import make_policy
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.types import Prompt

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the opposite of hot?": "cold",
    "What color is the sky on a clear day?": "blue",
}


def main(folder: str) -> int:
    cfg = Model(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in read_model_keys(folder).items()}
    )
    policy, tokenizer = make_policy(cfg), load_tokenizer(folder)
    template = load_template("auto", tokenizer)
    params = load_params(folder, policy, sharding.make_mesh(Mesh()))
    prompts = []
    for i, question in enumerate(QUESTIONS):
        pieces = template.pieces([{"role": "user", "content": question}])
        prompts.append(
            Prompt(i, "", tuple(tokenizer.encode_pieces(pieces)), question, "", "exact", "check")
        )
    sampler = Sampler(
        policy, SamplingParams(temperature=0.0), 1, 32, tokenizer.stop_ids, tokenizer.pad_id
    )
    rollout = sampler(params, prompts, jax.random.key(0))
    failures = 0
    for (question, expected), ids, n in zip(
        QUESTIONS.items(), rollout.tokens_BC, rollout.length_B, strict=True
    ):
        answer = tokenizer.decode(ids[:n])
        good = expected.lower() in answer.lower()
        failures += not good
        print(f"{'ok   ' if good else 'WRONG'}  {question}  ->  {answer}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
