"""Checks a few greedy answers of a converted SmolLM2-135M-Instruct.

    python experiments/smollm2_answers.py .cache/smollm2/model     half a minute; two cores, 1.5 GB

If weights, tokenizer and chat template are right, every answer contains what it should. Otherwise
the script exits with 1.
"""

from __future__ import annotations

import sys

import sapo_jax as sj

QUESTIONS = {  # question -> what the answer has to contain
    "What is the capital of France?": "Paris",
    "What is the opposite of hot?": "cold",
    "What color is the sky on a clear day?": "blue",
}


def main(folder: str) -> int:
    policy = sj.open_policy(folder, "rollout.max_new_tokens=32")
    completions = policy.sample(list(QUESTIONS), temperature=0.0)
    failures = 0
    for (question, expected), (answer,) in zip(QUESTIONS.items(), completions, strict=True):
        verdict = "ok   "
        if expected.lower() not in answer.lower():
            verdict = "WRONG"
            failures += 1
        print(f"{verdict}  {question}  ->  {answer}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
