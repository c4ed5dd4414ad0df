"""What verification costs: `python experiments/benchmarks/verification.py [COMPLETIONS]`.

CPU seconds of the trainer's process and of its workers together, and wall seconds, for a batch of
short completions in groups of eight. The workers have started and imported what they need before.
README.md holds the figures.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sapo_jax.rewards import VerifierPool
from sapo_jax.types import Prompt

GROUP = 8
PLUGIN = '''"""A verifier that costs next to nothing, in a plug-in."""
from sapo_jax.rewards import register

@register("plugin")
def plugin(response, answer, metadata):
    return response == answer
'''
# A verifier, the forms of its answers (filled with a number), and what it is for.
CASES = {
    "exact": "{}",
    "numeric": "{}",
    "plugin": "{}",
    "math": "{}",
    "math, LaTeX": r"\frac{{{}}}{{7}} + x",
}


def cpu_seconds() -> float:
    """Of this process and of the children that run now."""
    ticks = 0
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat_file.read_text()
        except OSError:
            continue  # it has ended
        fields = text.rpartition(")")[2].split()
        parent = int(fields[1])
        if parent == os.getpid() or stat_file.parent.name == str(os.getpid()):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def items_of(case: str, form: str, number: int) -> list[tuple[str, Prompt]]:
    """Completions, half of which are right."""
    items = []
    for i in range(number):
        gold = form.format(i // GROUP)
        answer = form.format(i // GROUP + i % 2)
        verifier = case.partition(",")[0]
        prompt = Prompt(i // GROUP, "text", (1,), "question", gold, verifier, "task")
        items.append((rf"{'word ' * 20}so the answer is \boxed{{{answer}}}", prompt))
    return items


def main(number: int) -> None:
    # /proc counts in hundredths of a second, so that a batch is graded several times over.
    rounds = 10
    with VerifierPool(workers=2, plugins=("cheap_plugin",)) as pool:
        for case, form in CASES.items():
            items = items_of(case, form, number)
            pool.verify(items)
            cpu = cpu_seconds()
            start = time.monotonic()
            for _ in range(rounds):
                pool.verify(items)
            wall = time.monotonic() - start
            cpu = cpu_seconds() - cpu
            print(
                f"{case:12} {number} completions: {cpu / rounds:.4f} CPU seconds,"
                f" {wall / rounds:.4f} s"
            )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cheap_plugin.py").write_text(PLUGIN)
        sys.path.insert(0, folder)
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
