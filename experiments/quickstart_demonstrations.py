"""Makes configs/quickstart_demonstrations.jsonl, what the quickstart's cold start imitates.

    python experiments/quickstart_demonstrations.py        seconds; rewrites the file, byte for byte the same

Four demonstrations for each training problem of configs/quickstart.yaml (the held-out ones are not among them). The
demonstrator is sloppy: half of its answers are off by one or two. Imitation learns the sloppiness with the arithmetic;
RL, which is told only what is right, has to get rid of it.
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
    prompts = (
        load_problems(cfg.data, load_tokenizer(cfg.data.tokenizer)).train["basic_arithmetic"]
        * DRAWS
    )
    chance = random.Random(0)
    errors = [chance.choice(ERRORS) if chance.random() < SLOPPY else 0 for _ in prompts]
    rows = [
        {"prompt": p.question, "answer": str(int(p.answer) + e)}
        for p, e in zip(prompts, errors, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (CONFIGS / "quickstart_demonstrations.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(rows)} demonstrations, {sum(map(bool, errors))} of them wrong")


if __name__ == "__main__":
    main()
