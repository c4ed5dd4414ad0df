"""Makes the graded task mixture of the claims: four tasks whose answers show their steps.

    python experiments/graded_tasks.py [FOLDER]        seconds; default folder: runs/graded

Each task becomes FOLDER/TASK.jsonl (problems for `configs/graded.yaml`), and all of them
FOLDER/demonstrations.jsonl, which the cold start imitates. The files are the same, byte for byte,
wherever they are made.

    chain      3-8+9+2-1=           -5;4;6;5                      running totals, 5 to 9 terms
    brackets   (3+4)*2-(5-1)=       7*2-(5-1)=14-(5-1)=14-4=10    one operation at a time
    product    47*36=               47*30=1410;47*6=282;1692      partial products
    gcd        gcd(84,36)=          84%36=12;36%12=0;12           Euclid's remainders

A completion has 8 to 70 tokens (bytes), 24 in the mean, and its last number is the answer. So the
ratio of a sequence is a mean over tens of tokens, and not the same thing as the ratio of a token.

The demonstrator is sloppy: each of its steps is off by one or two with probability SLOPPY, and goes
on from the wrong number. Imitation learns the sloppiness with the arithmetic. RL, which is told
only whether the last number is right, has to find out which token was to blame. (Semicolons part
the steps, because `80,492` would be one number.)
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

PROBLEMS = 3000  # of each task; the held-out ones are taken from them
DRAWS = 3  # demonstrations of each problem
SLOPPY = 0.12  # of a step of a demonstration: probability that it is wrong
ERRORS = (-2, -1, 1, 2)

# A task's function draws a problem: (prompt, solve). solve(slip) writes the steps, where
# slip(number) is the number that the writer arrives at.
Slip = Callable[[int], int]
Problem = tuple[str, Callable[[Slip], str]]


def exact(number: int) -> int:
    """A careful writer's slip: none."""
    return number


def added(left: int, sign: str, right: int) -> int:
    """left + right, or left - right."""
    if sign == "+":
        return left + right
    return left - right


def chain(rng: random.Random) -> Problem:
    """A sum and difference of 5 to 9 digits, with its running totals."""
    terms = [rng.randint(1, 9) for _ in range(rng.randint(5, 9))]
    signs = [rng.choice("+-") for _ in terms[1:]]
    prompt = str(terms[0])
    for sign, term in zip(signs, terms[1:], strict=True):
        prompt += f"{sign}{term}"

    def solve(slip: Slip) -> str:
        total = terms[0]
        totals = []
        for sign, term in zip(signs, terms[1:], strict=True):
            total = slip(added(total, sign, term))
            totals.append(str(total))
        return ";".join(totals)

    return f"{prompt}=", solve


def brackets(rng: random.Random) -> Problem:
    """(a+b)*c-(d-e), one operation at a time."""
    a = rng.randint(1, 9)
    b = rng.randint(1, 9)
    c = rng.randint(2, 9)
    d = rng.randint(1, 9)
    e = rng.randint(1, 9)
    first_sign = rng.choice("+-")
    last_sign = rng.choice("+-")

    def solve(slip: Slip) -> str:
        first = slip(added(a, first_sign, b))
        times = slip(first * c)
        last = slip(added(d, last_sign, e))
        tail = f"({d}{last_sign}{e})"
        return f"{first}*{c}-{tail}={times}-{tail}={times}-({last})={slip(times - last)}"

    return f"({a}{first_sign}{b})*{c}-({d}{last_sign}{e})=", solve


def product(rng: random.Random) -> Problem:
    """Two numbers of two digits, by partial products."""
    left = rng.randint(11, 49)
    right = rng.randint(11, 39)
    tens = right // 10 * 10
    ones = right % 10

    def solve(slip: Slip) -> str:
        large = slip(left * tens)
        small = slip(left * ones)
        return f"{left}*{tens}={large};{left}*{ones}={small};{slip(large + small)}"

    return f"{left}*{right}=", solve


def gcd(rng: random.Random) -> Problem:
    """The greatest common divisor of two numbers below 100, by Euclid's algorithm."""
    factor = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 12))
    larger = factor * rng.randint(2, 99 // factor)
    smaller = factor * rng.randint(1, larger // factor)

    def solve(slip: Slip) -> str:
        dividend = larger
        divisor = smaller
        steps = []
        # A slip may lead into a longer chain of remainders, but each of them is below the last.
        while divisor:
            remainder = dividend % divisor
            written = min(max(slip(remainder), 0), divisor - 1)
            steps.append(f"{dividend}%{divisor}={written}")
            dividend = divisor
            divisor = written
        return ";".join([*steps, str(dividend)])

    return f"gcd({larger},{smaller})=", solve


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "chain": chain,
    "brackets": brackets,
    "product": product,
    "gcd": gcd,
}


def last_number(steps: str) -> str:
    """The answer: what stands after the last semicolon or equals sign."""
    return steps.replace("=", ";").rsplit(";", 1)[-1]


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def draw_problems(task: str) -> dict[str, Callable[[Slip], str]]:
    """PROBLEMS different problems of a task, or all there are: prompt -> solve."""
    rng = random.Random(f"graded {task}")
    problems: dict[str, Callable[[Slip], str]] = {}
    for _ in range(20 * PROBLEMS):
        prompt, solve = TASKS[task](rng)
        problems.setdefault(prompt, solve)
        if len(problems) == PROBLEMS:
            break
    return problems


def write_task(task: str, folder: Path) -> list[dict[str, str]]:
    """Writes the task's problems, and returns its demonstrations."""
    rng = random.Random(f"slips of {task}")

    def slip(number: int) -> int:
        if rng.random() < SLOPPY:
            return number + rng.choice(ERRORS)
        return number

    rows = []
    demonstrations = []
    num_wrong = 0
    for prompt, solve in draw_problems(task).items():
        answer = last_number(solve(exact))
        rows.append({"prompt": prompt, "answer": answer, "verifier": "exact"})
        for _ in range(DRAWS):
            steps = solve(slip)
            num_wrong += last_number(steps) != answer
            demonstrations.append({"prompt": prompt, "answer": steps})
    write_lines(folder / f"{task}.jsonl", rows)

    num_drawn = len(demonstrations)
    num_tokens = sum(len(row["answer"]) + 1 for row in demonstrations)  # and the end token
    print(
        f"{task}: {len(rows)} problems; {num_drawn} demonstrations of"
        f" {num_tokens / num_drawn:.1f} tokens, {num_wrong / num_drawn:.0%} end in a wrong answer"
    )
    return demonstrations


def main(arguments: list[str]) -> None:
    folder = Path("runs/graded")
    if arguments:
        folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations = []
    for task in TASKS:
        demonstrations += write_task(task, folder)
    random.Random("graded").shuffle(demonstrations)
    write_lines(folder / "demonstrations.jsonl", demonstrations)


if __name__ == "__main__":
    main(sys.argv[1:])
