"""How long hostile completions take: `python tests/faults/hostile_completions.py [NUMBER]`.

Half of them would take `math` minutes or years to compute; the rest are long texts and nests of
brackets. README.md holds the figures.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

from sapo_jax.rewards import VerifierPool
from sapo_jax.types import Prompt

PIECES = [
    r"\boxed{9^{9^{9}}}",
    r"\boxed{9**9**9}",
    r"\boxed{(x+1)^{5000}}",
    r"\boxed{\prod_{n=1}^{10^6} n}",
    r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n}}",
    r"\boxed{100000!}",
    r"\boxed{((7!)!)!}",
    r"\boxed{\binom{10^9}{5 \cdot 10^8}}",
    r"\boxed{" + "+".join(["1"] * 2000) + "}",
    r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
    r"\boxed{" + r"\sqrt{" * 300 + "2" + "}" * 300 + "}",
    r"\boxed{" + "9" * 20_000 + "}",
    "word " * 20_000 + r"\boxed{41}",
    r"\boxed{" * 100_000,
    "<think>" * 10_000 + r"\boxed{42}",
    "$" * 100_000,
]


def main(number: int) -> None:
    prompt = Prompt(0, "text", (1,), "question", "42", "math", "task")
    items = [(PIECES[i % len(PIECES)], prompt) for i in range(number)]
    with VerifierPool(workers=2) as pool:
        pool.verify([("42", prompt)] * 2)  # the workers start and import SymPy
        start = time.monotonic()
        verdicts = pool.verify(items)
        seconds = time.monotonic() - start
    counts = dict(Counter(verdict.status for verdict in verdicts))
    print(f"{number} completions: {seconds:.1f} s, {1000 * seconds / number:.1f} ms each; {counts}")
    slow = Counter(
        PIECES[i % len(PIECES)][:30] for i in range(number) if verdicts[i].status == "timeout"
    )
    print(f"time-outs: {dict(slow)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
