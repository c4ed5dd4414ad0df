"""Makes configs/quickstart_demonstrations.jsonl, which the quickstart's cold start imitates.

    python experiments/quickstart_demonstrations.py     seconds; the file is byte for byte the same

There are four demonstrations for each training problem of configs/quickstart.yaml (the held-out
problems are not among them). The demonstrator is sloppy: half of its answers are off by one or two.
Imitation learns the sloppiness together with the arithmetic. RL, which is told only what is right,
has to get rid of it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from sapo_jax.config import load
from sapo_jax.data import load_problems, load_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
DRAWS = 4  # demonstrations of each problem
SLOPPY = 0.5  # share of wrong answers
ERRORS = (-2, -1, 1, 2)


def main() -> None:
    cfg = load(CONFIGS / "quickstart.yaml", ["cold_start.demonstrations=null"])
    problems = load_problems(cfg.data, load_tokenizer(cfg.data.tokenizer))
    prompts = problems.train["basic_arithmetic"] * DRAWS

    random_numbers = random.Random(0)
    lines = []
    wrong = 0
    for prompt in prompts:
        answer = int(prompt.answer)
        if random_numbers.random() < SLOPPY:
            answer += random_numbers.choice(ERRORS)
            wrong += 1
        lines.append(json.dumps({"prompt": prompt.question, "answer": str(answer)}) + "\n")

    (CONFIGS / "quickstart_demonstrations.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} demonstrations, {wrong} of them wrong")


if __name__ == "__main__":
    main()
