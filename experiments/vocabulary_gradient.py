"""Where the push of one sampled token goes in a vocabulary (SAPO paper, Eq. 9).

    python experiments/vocabulary_gradient.py   seconds on any machine

The policy is over Qwen3's 151,936 tokens, its unsampled probabilities fall like 1 / rank^a, and
it is the policy that sampled (r = 1). The probability p_y of the sampled token goes from 0.001 to
0.999, and the tail from flat (a = 0) to steep (a = 3). The script writes
results/vocabulary_gradient.csv and .png: for each p_y, a and sign of A, the logit gradient of the
sampled token, the amount that is moved, the effective number of logits that are raised and
lowered (exp of the entropy), the largest push on a token that was not sampled, and the Euclidean
norm.

Expected: A > 0 concentrates, A < 0 spreads. The same amount |A| (1 - p_y) is moved either way,
less the surer the token. A > 0 raises ONE logit by it. A < 0 spreads it over all 151,935 others,
in proportion to their probabilities: effectively over 2 of them if the tail is steep, over 283
for a = 1.2, over all if it is flat. The reward said nothing of any of them; hence tau_neg >
tau_pos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sapo_jax.analysis.figures import finish
from sapo_jax.config import SAPO
from sapo_jax.diagnostics import vocabulary_gradient, vocabulary_spread
from sapo_jax.io.files import write_csv
from sapo_jax.io.plots import BLUE, GREY, ORANGE

RESULTS = Path(__file__).parent / "results"
V = 151_936
P_Y = 0.3  # the sampled token's probability, where the tail is varied
STEEPNESS = 1.2  # of the tail, where the sampled token's probability is varied
RANKS_SHOWN = 2000  # in the left panel
SIGN_COLOURS = {1.0: BLUE, -1.0: ORANGE}
QUANTITIES = ("sampled", "moved", "raised", "lowered", "largest", "norm")  # of `vocabulary_spread`


def variants() -> list[tuple[float, float, float]]:
    """All cases (p_y, steepness a of the tail, A)."""
    cases = [(p_y, STEEPNESS) for p_y in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)]
    cases += [(P_Y, a) for a in (0.0, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0)]
    return [(p_y, a, adv) for p_y, a in cases for adv in (1.0, -1.0)]


def gradient(p_y: float, a: float, adv: float) -> np.ndarray:
    """The gradient on the logits of V tokens, at r = 1.

    Token 0 is the sampled one; the others share 1 - p_y in proportion to 1 / rank^a.
    """
    tail = np.arange(1, V) ** -a
    others = (1 - p_y) * tail / tail.sum()
    logits_V = np.log(np.append(p_y, others))
    return np.asarray(vocabulary_gradient(logits_V, 0, adv, 0.0, SAPO()))


def rows() -> list[dict[str, Any]]:
    """The rows of the CSV file, one for each variant."""
    table = []
    for p_y, a, adv in variants():
        spread = vocabulary_spread(gradient(p_y, a, adv), 0)
        row = {"p_y": p_y, "a": a, "adv": adv}
        for name in QUANTITIES:
            row[name] = float(getattr(spread, name))
        table.append(row)
    return table


def plot(table: list[dict[str, Any]]) -> Figure:
    """Panels: the gradient on each logit, what is moved over p_y, what is raised over a."""
    figure = Figure(figsize=(15.5, 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    push, moved, raised = figure.subplots(1, 3)
    draw_push(push)
    draw_moved(moved, table)
    draw_raised(raised, table)
    for axes in (push, moved, raised):
        axes.spines["right"].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def draw_push(axes: Axes) -> None:
    ranks = np.arange(1, RANKS_SHOWN + 1)
    for adv, colour in SIGN_COLOURS.items():
        gradient_V = gradient(P_Y, STEEPNESS, adv)
        others = gradient_V[1 : RANKS_SHOWN + 1]
        axes.plot(ranks, others, color=colour, label=f"A = {adv:+.0f}: tokens not sampled")
        axes.plot(
            0.5, gradient_V[0], "o", color=colour, label=f"A = {adv:+.0f}: the sampled one, y"
        )
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 10, 100, 1000], ["y", "1", "10", "100", "1000"])
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_ylim(-3, 3)
    title = f"Gradient on each logit, p_y = {P_Y}, a = {STEEPNESS}"
    finish(axes, title, "rank among the others", "d surrogate / d logit")


def draw_moved(axes: Axes, table: list[dict[str, Any]]) -> None:
    for adv, colour in SIGN_COLOURS.items():
        points = [row for row in table if row["adv"] == adv and row["a"] == STEEPNESS]
        style = "o-" if adv > 0 else "x--"
        p_y = [row["p_y"] for row in points]
        amount = [row["moved"] for row in points]
        axes.plot(p_y, amount, style, color=colour, label=f"A = {adv:+.0f}")
    finish(axes, "Moved between y and all others", "p_y", "|A| (1 - p_y)")


def draw_raised(axes: Axes, table: list[dict[str, Any]]) -> None:
    for adv, colour in SIGN_COLOURS.items():
        points = [row for row in table if row["adv"] == adv and row["p_y"] == P_Y]
        points.sort(key=lambda row: row["a"])
        steepness = [row["a"] for row in points]
        logits = [row["raised"] for row in points]
        axes.plot(steepness, logits, "o-", color=colour, label=f"A = {adv:+.0f}")
    axes.set_yscale("log")
    title = f"Logits that are raised, p_y = {P_Y}"
    finish(axes, title, "steepness a of the tail", "effective number, of 151,936")


def main() -> None:
    table = rows()
    write_csv(RESULTS / "vocabulary_gradient.csv", table)
    plot(table).savefig(RESULTS / "vocabulary_gradient.png", dpi=110, facecolor="white")
    for row in table:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
