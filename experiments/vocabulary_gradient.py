"""Where the push of one sampled token goes in a vocabulary (SAPO paper, Eq. 9): A > 0 concentrates, A < 0 spreads.

    python experiments/vocabulary_gradient.py   seconds on any machine

A policy over Qwen3's 151,936 tokens whose unsampled probabilities fall like 1 / rank^a, at r = 1, for sampled tokens
of probability p_y from 0.001 to 0.999 and tails from flat (a = 0) to steep (a = 3). Writes
results/vocabulary_gradient.csv and .png: for each p_y, a and sign of A, the logit gradient of the sampled token (what
is moved), the effective number of logits that are raised and lowered (exp of the entropy), the largest push on a token
that was not sampled, the Euclidean norm.

Expected: the same amount |A| (1 - p_y) is moved either way, less the surer the token. A > 0 raises ONE logit by it;
A < 0 spreads it over all 151,935 others, in proportion to their probabilities: effectively 2 of them if the tail is
steep, 283 for a = 1.2, all if it is flat. The reward said nothing of any of them; hence tau_neg > tau_pos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sapo_jax.analysis.figures import finish
from sapo_jax.config import SAPO
from sapo_jax.diagnostics import vocabulary_gradient, vocabulary_spread
from sapo_jax.io.files import write_csv
from sapo_jax.io.plots import BLUE, GREY, ORANGE

RESULTS = Path(__file__).parent / "results"
V = 151_936
P_Y, ZIPF = 0.3, 1.2  # where the other one is varied
SHOWN = 2000  # ranks in the left panel


def variants() -> list[tuple[float, float, float]]:
    """(p_y, steepness a of the tail, A)"""
    cases = [(p, ZIPF) for p in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)]
    cases += [(P_Y, a) for a in (0.0, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0)]
    return [(p, a, adv) for p, a in cases for adv in (1.0, -1.0)]


def gradient(p_y: float, a: float, adv: float) -> np.ndarray:
    """On the logits of V tokens: token 0 is the sampled one, the others share 1 - p_y like 1 / rank^a."""
    others = np.arange(1, V) ** -a
    logits = np.log(np.append(p_y, (1 - p_y) * others / others.sum()))
    return np.asarray(vocabulary_gradient(logits, 0, adv, 0.0, SAPO()))


def rows() -> list[dict]:
    found = []
    for p_y, a, adv in variants():
        spread = vocabulary_spread(gradient(p_y, a, adv), 0)
        names = ("sampled", "moved", "raised", "lowered", "largest", "norm")
        found.append(
            {"p_y": p_y, "a": a, "adv": adv}
            | {name: float(getattr(spread, name)) for name in names}
        )
    return found


def plot(found: list[dict]) -> Figure:
    figure = Figure(figsize=(15.5, 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    push, moved, raised = figure.subplots(1, 3)
    ranks = np.arange(SHOWN + 1)
    for adv, colour in ((1.0, BLUE), (-1.0, ORANGE)):
        g = gradient(P_Y, ZIPF, adv)[: SHOWN + 1]
        push.plot(ranks[1:], g[1:], color=colour, label=f"A = {adv:+.0f}: tokens not sampled")
        push.plot(0.5, g[0], "o", color=colour, label=f"A = {adv:+.0f}: the sampled one, y")
        mine = [row for row in found if row["adv"] == adv]
        by_p = [(row["p_y"], row["moved"]) for row in mine if row["a"] == ZIPF]
        by_a = sorted((row["a"], row["raised"]) for row in mine if row["p_y"] == P_Y)
        moved.plot(
            *zip(*by_p, strict=True),
            "o-" if adv > 0 else "x--",
            color=colour,
            label=f"A = {adv:+.0f}",
        )
        raised.plot(*zip(*by_a, strict=True), "o-", color=colour, label=f"A = {adv:+.0f}")
    push.set_xscale("log")
    push.set_yscale("symlog", linthresh=1e-5)
    push.axhline(0, color=GREY, linewidth=0.6)
    push.set_xticks([0.5, 1, 10, 100, 1000], ["y", "1", "10", "100", "1000"])
    push.minorticks_off()
    raised.set_yscale("log")
    push.set_ylim(-3, 3)
    finish(
        push,
        f"Gradient on each logit, p_y = {P_Y}, a = {ZIPF}",
        "rank among the others",
        "d surrogate / d logit",
    )
    finish(moved, "Moved between y and all others", "p_y", "|A| (1 - p_y)")
    finish(
        raised,
        f"Logits that are raised, p_y = {P_Y}",
        "steepness a of the tail",
        "effective number, of 151,936",
    )
    for axes in (push, moved, raised):
        axes.spines["right"].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    found = rows()
    write_csv(RESULTS / "vocabulary_gradient.csv", found)
    plot(found).savefig(RESULTS / "vocabulary_gradient.png", dpi=110, facecolor="white")
    for row in found:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
