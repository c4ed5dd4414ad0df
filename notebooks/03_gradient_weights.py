# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Gradient weights of a real run
#
# Every RL run of this project writes `diagnostics.jsonl`: sums of gate and gradient weight by sign
# of A and side of r, histograms of log r, per-sequence statistics; about 10 kB per step. This
# notebook reads one. Set the environment variable `SAPO_RUN` to the folder of your run, or `RUN`
# below. Otherwise it takes a committed one: SAPO on the tiny mixture of experts with 16 updates a
# rollout, of `python experiments/quadrants.py`. Its completions are short (2 to 6 tokens) and its
# steps are large, so that the gate has something to do. The numbers of a large model differ; the
# plots are read alike.
#
# ## Where the update comes from
#
# The trained tokens split into four quadrants: the sign of A, and the side of r. A pushes the
# ratio up where A > 0 and down where A < 0. So two quadrants push on, away from r = 1, and in two
# the token is pulled back. A hard clip closes the first two beyond its band and leaves the others
# open; a soft gate fades all four. Gate, weight w and gradient here are those of the objective that
# the run trained with.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import sapo_jax as sj
from sapo_jax.analysis import figures, quadrant_figures, quadrants
from sapo_jax.analysis.phases import phases, show

ROOT = Path(sj.__file__).parents[1]  # of the repository
COMMITTED = ROOT / "experiments" / "results" / "quadrants_runs" / "N16"
RUN = os.environ.get("SAPO_RUN", COMMITTED)

plt.rcParams.update({"figure.dpi": 80, "font.size": 11, "legend.frameon": False})
BLUE = figures.BLUE
ORANGE = figures.ORANGE

run = sj.analysis.read_run_evidence(RUN)
assert run.has_quadrants, "the run is of a version without quadrants; train it anew"
evidence = run.pooled()  # of all steps together
gates = run.gates

figure, panels = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
quadrant_figures.ratio_over_training(panels[0, 0], run, "pos")
quadrant_figures.ratio_over_training(panels[0, 1], run, "neg")
for axes, ending, title in (
    (panels[1, 0], "grad_share", "Share of the gradient norms"),
    (panels[1, 1], "grad_weight_mean", "Mean weight w on A grad log pi"),
):
    quadrant_figures.quadrant_panel(axes, run, ending, title)
handles, labels = panels[1, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# Above: where the ratios are, with GRPO's band in grey. Below: what part of the gradient each
# quadrant has, and how heavy its tokens weigh on average. In the first of the N updates of a
# rollout r is 1 up to rounding, and its tokens lie on either side by chance.
#
# The same as a table. Each number is a column of `sj.read_diagnostics(RUN)` too, such as
# `quadrant/neg_below/grad_share`, with a value for every RL step.

# %%
print(quadrants.show(run))
columns = sj.read_diagnostics(RUN)
name = "quadrant/neg_below/outside_fraction"
print()
print(name, "at the first and the last step:", *np.round(columns[name][[0, -1]], 3))

# %% [markdown]
# ## Which tokens drift
#
# Maps of r where A < 0: by the part of the completion that a token is in, and by the probability
# that the old policy gave it. A column adds up to 100 %. Tokens that were rare have the widest
# spread. On the right is what a sequence mask of delta would take: the share of the sequences with
# A < 0 whose mean log r is below -delta.

# %%
figure, panels = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
quadrant_figures.position_map(panels[0], evidence.quadrants, "neg", gates.grpo)
quadrant_figures.probability_map(panels[1], evidence.quadrants, "neg", gates.grpo)
quadrant_figures.mask_panel(panels[2], run, phases(run))
plt.show()

# %% [markdown]
# ## Ratio and gate

# %%
figure, panels = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained")
for axes, sign in zip(panels, ("pos", "neg"), strict=True):
    title = f"Where the tokens are, and what they weigh: {figures.NAMES[sign]}"
    figures.ratio_panel(axes, evidence, gates, sign, title)
plt.show()

# %% [markdown]
# Grey: the density of r over all tokens of the run (logarithmic). Blue: the gate f'(r) =
# sech^2(tau/2 (r - 1)) (Eq. 16). Orange: r f'(r), the factor on A grad log pi. The spike at 1 is
# in part by construction: the first of the N updates of a rollout has r = 1 on every token.
#
# ## The weights, over training
#
# Quantiles of r f'(r) at each RL step: the bands hold the middle 50, 90 and 98 % of the tokens.
# The gate falls when r goes up *or* down; the weight follows r below 1, and above 1 it rises to
# its peak (1.575 for tau = 1).

# %%
BANDS = ((0, 6, 0.15, "98 %"), (1, 5, 0.25, "90 %"), (2, 4, 0.5, "50 %"))
SIGNS = (("pos", gates.tau_pos, BLUE), ("neg", gates.tau_neg, ORANGE))
r = np.linspace(0.01, 20, 20_000)
quantiles = [sj.diagnostics.ratio_quantiles(e, gates)["grad_weight"] for e in run.evidence]
figure, panels = plt.subplots(1, 2, figsize=(14, 4), layout="constrained", sharey=True)
for axes, (sign, tau, colour) in zip(panels, SIGNS, strict=True):
    with_tokens = [i for i, q in enumerate(quantiles) if q[sign]]
    steps = [run.steps[i] for i in with_tokens]
    q = np.array([quantiles[i][sign] for i in with_tokens]).T
    for low, high, alpha, label in BANDS:
        style = {"color": colour, "alpha": alpha, "linewidth": 0}
        axes.fill_between(steps, q[low], q[high], label=label, **style)
    axes.plot(steps, q[3], color="black", linewidth=1.2, label="median")
    largest = (r / np.cosh(tau / 2 * (r - 1)) ** 2).max()
    dotted = {"color": "black", "linewidth": 1, "linestyle": ":"}
    axes.axhline(largest, label="most that can be", **dotted)
    axes.spines["right"].set_visible(False)
    title = f"r f'(r) of the tokens, {figures.NAMES[sign]}"
    figures.finish(axes, title, "RL step", "gradient weight")
    axes.legend(loc="lower right", ncol=3, fontsize=9)
    axes.set_ylim(0, 1.7)
plt.show()

# %% [markdown]
# ## Drift within a step
#
# A rollout is used for N updates. The policy moves away from the one that sampled, update by
# update: mean |log r| (A1) in each of them.

# %%
updates_of_a_step = len(run.drift[-1])
drift = np.array([d for d in run.drift if len(d) == updates_of_a_step])
updates = np.arange(1, drift.shape[1] + 1)
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
thirds = np.array_split(drift, min(3, len(drift)))
shades = plt.get_cmap("viridis")((0.05, 0.45, 0.8))
for part, label, colour in zip(thirds, ("early", "middle", "late"), shades, strict=False):
    mean = part.mean(axis=0)
    axes.plot(updates, mean, "o-", color=colour, linewidth=2, label=f"{label} third of the run")
    low = part.min(axis=0)
    high = part.max(axis=0)
    axes.fill_between(updates, low, high, color=colour, alpha=0.12, linewidth=0)
axes.set_xticks(updates)
figures.finish(axes, "Mean |log r| in each update of a rollout", "update", "nats per token")
axes.spines["right"].set_visible(False)
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## What a hard clip would have thrown away
#
# Of the summed norms of the gradient on the logits, weight |A| r f'(r) ||e_y - pi||, which part
# sits on tokens whose gradient GRPO's clip (on the token's ratio) or GSPO's (on the sequence's)
# would set to zero? And over how many tokens is the update spread: the effective fraction (sum
# w)^2 / (n sum w^2) of the weights w = r f'(r) is 1 if all weigh alike.

# %%
figure, (shares, effective) = plt.subplots(1, 2, figsize=(14, 4), layout="constrained")
clipped = {
    "grad_share/grpo_clipped": "GRPO would clip",
    "grad_share/gspo_clipped": "GSPO would clip",
}
spread = {"effective_tokens/pos_fraction": "A > 0", "effective_tokens/neg_fraction": "A < 0"}
for axes, curves, title in (
    (shares, clipped, "Gradient that hard clipping throws away"),
    (effective, spread, "Effective tokens"),
):
    for (name, label), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
        axes.plot(run.steps, run.column(name), color=colour, linewidth=2, label=label)
    figures.finish(axes, title, "RL step", "")
    axes.spines["right"].set_visible(False)
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.4g} %")
    axes.legend()
shares.set_ylim(bottom=0)
plt.show()

# %% [markdown]
# ## A1 and A2
#
# A1: r near 1. A2: log r varies little within a sequence i, Var_i is small. Then the gates of its
# tokens act as one gate of the sequence: D_i = |mean_t g(z_it) - g(mu_i)| <= tau^2/4 Var_i for
# the log gate g(z) = sech^2(tau/2 z), z = log r. No sequence may break that. For the real gate
# f'(r) it is a rule of thumb.

# %%
figure, (ratio, variance, bound) = plt.subplots(1, 3, figsize=(16, 4.4), layout="constrained")
figures.ratio_histogram(ratio, evidence, gates)
figures.variance_histogram(variance, evidence)
figures.bound_panel(bound, run.samples(), gates)
plt.show()

breaches = int(sum(run.column("a2/breaches")))
sequences = evidence.sequences.count.sum()
print("sequences whose log gate breaks the bound:", breaches, "of", sequences)
assert breaches == 0

# %% [markdown]
# Below Var_i of about 0.01 the points lie *on* the line: there the gate is a parabola, and the
# bound is an equality. So what matters is how small Var_i is, not whether the bound holds. All of
# it in numbers, as `sapo-jax analyze RUN` prints them:

# %%
print(show(run))
