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
# # Gradient weights of SAPO
#
# SAPO (arXiv 2511.20347) multiplies the gradient of every token by a soft gate of its ratio r = pi / pi_old, where GRPO
# and GSPO cut it off with a hard clip. This notebook looks at
#
# 1. the gate f'(r) and the weight r f'(r) that it gives to A grad log pi,
# 2. the gate beside the hard clips,
# 3. where the push on one token goes in the vocabulary, for A > 0 and A < 0,
# 4. when the gates of a sequence's tokens act as one gate of the sequence (assumptions A1 and A2), on made-up ratios,
# 5. the same on real training runs, of two tiny policies or of yours.
#
# It runs in a few seconds. `make notebooks` runs it anew and stores the outputs.

# %%
import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sapo_jax.config import GRPO, GSPO, SAPO
from sapo_jax.diagnostics import Gates, vocabulary_gradient, vocabulary_spread
from sapo_jax.diagnostics.sequences import sequences
from sapo_jax.objectives import OBJECTIVES

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments" / "results").is_dir())
plt.rcParams.update({"figure.figsize": (9, 3.4), "figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.25})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## 1. The gate and the weight
#
# The surrogate of a token is f(r) A with f(r) = 4/tau sigmoid(tau (r - 1)). Its derivative, the gate, is
# f'(r) = sech^2(tau/2 (r - 1)): 1 at r = 1 for every tau, and the faster down to 0 the larger tau is.
#
# But the gradient goes through log pi, and d r / d log pi = r. So what multiplies A grad log pi is **r f'(r)**. It is 1
# at r = 1 too, and it goes on *rising* there: the soft gate bounds the importance weight r, it does not punish every
# departure from 1.

# %%
r = np.linspace(0.01, 5, 2000)


def surrogate(r, tau):
    return 4 / tau / (1 + np.exp(-tau * (r - 1)))


def gate(r, tau):
    return 1 / np.cosh(tau / 2 * (r - 1)) ** 2


figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
for tau in (0.5, 1.0, 2.0, 5.0):
    panels[0].plot(r, surrogate(r, tau) - 2 / tau, label=f"tau = {tau:g}")
    panels[1].plot(r, gate(r, tau))
    panels[2].plot(r, r * gate(r, tau))
for axes, title in zip(panels, ("f(r) - f(1)", "f'(r)", "r f'(r)"), strict=True):
    axes.set(title=title, xlabel="r")
panels[0].legend()
plt.show()

# %% [markdown]
# Where is the peak of r f'(r)? Setting its derivative to zero gives tau r tanh(tau/2 (r - 1)) = 1. For tau = 1 a token
# that has become twice as likely weighs *half as much again* as one that has not moved.

# %%
print(" tau   r at the peak   r f'(r) there   back to 1 at r =")
for tau in (0.5, 1.0, 1.05, 2.0, 5.0):
    fine = np.linspace(0.5, 20, 1_000_000)
    weight = fine * gate(fine, tau)
    peak = weight.argmax()
    back = fine[peak:][weight[peak:] < 1][0]
    print(f"{tau:4g} {fine[peak]:13.2f} {weight[peak]:15.3f} {back:16.2f}")
    if tau == 1.0:
        assert (round(fine[peak], 2), round(weight[peak], 3)) == (2.06, 1.575)

# %% [markdown]
# ## 2. Soft gate and hard clips
#
# The same weight for the project's own objectives, by autodiff: d surrogate / d log r, over A. A hard clip keeps the
# plain importance weight r and drops the token once r has gone, past the band, the way A pushes it. On the other side
# (A < 0 and r large: a token that should become less likely and has become more so) it lets r grow without bound.


# %%
def weight_of(cfg, r, adv):
    """r f'(r), or what takes its place, at each r: one sequence of one token each."""
    shape = (len(r), 1)
    adv_BT, mask_BT = np.full(shape, adv, np.float32), np.ones(shape, bool)
    total = lambda z_BT: OBJECTIVES[cfg.name](z_BT, adv_BT, mask_BT, cfg)[0].sum()
    return np.asarray(jax.grad(total)(jnp.log(r).astype(jnp.float32)[:, None]))[:, 0] / adv


figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
near = np.linspace(0.013, 3, 400)
for axes, adv in zip(panels, (1.0, -1.0), strict=True):
    axes.plot(near, weight_of(SAPO(), near, adv), label="SAPO, tau 1.0 / 1.05")
    axes.plot(near, weight_of(GRPO(), near, adv), "--", label="GRPO, 0.2 / 0.27")
    axes.plot(near, weight_of(GSPO(), near, adv), ":", color="black", label="GSPO, 3e-4 / 4e-4 (r of the sequence)")
    axes.set(title=f"weight on A grad log pi, A = {adv:+.0f}", xlabel="r")
panels[0].legend()
plt.show()

# %% [markdown]
# ## 3. Where the push goes in the vocabulary
#
# On the logits z of the position, the gradient is A r f'(r) (1[v = y] - p_v): what the sampled token y gets is taken
# from all others, or given to them, in proportion to the probability that they have. Eight tokens make it visible.

# %%
p = np.array([0.30, 0.25, 0.18, 0.12, 0.07, 0.04, 0.03, 0.01])
figure, panels = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained", sharey=True)
for axes, adv in zip(panels, (1.0, -1.0), strict=True):
    gradient_V = np.asarray(vocabulary_gradient(np.log(p), 1, adv, 0.0, SAPO()))
    axes.bar(range(8), gradient_V, color=np.where(gradient_V > 0, "#0072B2", "#D55E00"))
    axes.set(title=f"A = {adv:+.0f}, token 1 was sampled (p = 0.25)", xlabel="token", ylabel="d surrogate / d logit")
plt.show()

# %% [markdown]
# A > 0 raises the one token that was rewarded. A < 0 raises all the others, of which the reward said nothing. With
# Qwen3's 151,936 tokens and a tail of probabilities like 1 / rank^1.2, the push of one bad token is spread over
# hundreds of them. That noise is why the paper closes the gate faster for A < 0 (tau_neg > tau_pos).

# %%
V = 151_936
others = np.arange(1, V) ** -1.2
for p_y in (0.01, 0.3, 0.9):
    logits_V = np.log(np.append(p_y, (1 - p_y) * others / others.sum()))
    for adv in (1.0, -1.0):
        spread = vocabulary_spread(vocabulary_gradient(logits_V, 0, adv, 0.0, SAPO()), 0)
        print(
            f"p_y = {p_y:4g}, A = {adv:+.0f}: moved {float(spread.moved):.2f}, "
            f"effectively raised {float(spread.raised):6.1f} logits, lowered {float(spread.lowered):6.1f}"
        )

# %% [markdown]
# ## 4. When token gates act as one gate of the sequence
#
# **A1** (small steps): r is near 1, so r - 1 is near z = log r, and the gate is near the *log gate*
# g(z) = sech^2(tau/2 z). **A2** (little dispersion): z varies little within a sequence i, with mean mu_i and variance
# Var_i. Then the mean gate of the tokens is near the gate at the mean:
#
#     D_i = | mean_t g(z_it) - g(mu_i) |  <=  sup|g''| / 2 * Var_i  =  tau^2/4 Var_i
#
# and SAPO acts on the sequence like a soft GSPO. The bound holds for the log gate, always. For the real gate it is a
# rule of thumb: with D_i of f'(r), measured against f'(exp mu_i), sequences with r well above 1 go past it.

# %%
rng = np.random.default_rng(0)
B, T = 3000, 64
spread_B1 = 10 ** rng.uniform(-2.5, 0.3, (B, 1))
mean_B1 = rng.normal(0, 0.3, (B, 1)) * spread_B1
z_BT = (mean_B1 + spread_B1 * rng.standard_t(4, (B, T))).clip(-8, 8).astype(np.float32)
one_BT = np.ones((B, T), np.int32)
made_up = sequences(z_BT, one_BT.astype(np.float32), one_BT.astype(bool), one_BT, Gates.of(SAPO()))
variance, log_gap, real_gap = (np.asarray(x)[:, 1] for x in (made_up.variance, made_up.gap_log, made_up.gap_real))
tau = SAPO().tau_pos


def against_bound(axes, variance, log_gap, real_gap, tau, title):
    axes.loglog(variance, real_gap, ".", markersize=3, alpha=0.4, color="#D55E00", label="D_i of the real gate")
    axes.loglog(variance, log_gap, ".", markersize=3, alpha=0.4, color="#0072B2", label="D_i of the log gate")
    line = np.geomspace(variance.min(), variance.max(), 50)
    axes.loglog(line, tau**2 / 4 * line, color="black", linewidth=1, label="tau^2/4 Var_i")
    axes.set(title=title, xlabel="Var_i of log r", ylabel="D_i")
    axes.legend(markerscale=4)


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
against_bound(axes, variance, log_gap, real_gap, tau, "Made-up sequences of 64 tokens, heavy tails")
plt.show()
print("log gate above the bound: ", np.asarray(made_up.breaks_bound(made_up.gap_log)).sum(), "of", B)
print("real gate above the bound:", np.asarray(made_up.breaks_bound(made_up.gap_real)).sum(), "of", B)
assert not np.asarray(made_up.breaks_bound(made_up.gap_log)).any()

# %% [markdown]
# ## 5. On real runs
#
# Every RL run of this project writes these statistics to `diagnostics.jsonl`. Put the folder of yours into `RUN`; else
# the committed results of two TINY policies (0.1 M parameters; completions of 2 to 6 tokens; large steps) serve, from
# `experiments/figure2_ratios.py` and `figure3_dispersion.py`. They show the shape of the evidence, not the numbers of a
# large model.

# %%
RUN = None  # e.g. "runs/quickstart"


def rows(name):
    with (ROOT / "experiments" / "results" / name).open() as file:
        return list(csv.DictReader(file))


def sequences_by_run():
    """Var_i and both D_i of sampled sequences that have moved, by run."""
    if RUN is not None:
        from sapo_jax.analyze import read_diagnostics

        samples = {Path(RUN).name: read_diagnostics(RUN).samples()}
    else:
        table = rows("figure3_sequences.csv")
        columns = ("variance", "gap_log", "gap_real")
        samples = {
            run: {c: np.array([float(row[c]) for row in table if row["run"] == run]) for c in columns}
            for run in dict.fromkeys(row["run"] for row in table)
        }
    moved = {run: s["variance"] > 1e-9 for run, s in samples.items()}  # not those of a rollout's first update
    return {run: tuple(s[c][moved[run]] for c in ("variance", "gap_log", "gap_real")) for run, s in samples.items()}


by_run = sequences_by_run()
figure, panels = plt.subplots(1, len(by_run), figsize=(5.5 * len(by_run), 4), layout="constrained", squeeze=False)
for axes, (run, columns) in zip(panels[0], by_run.items(), strict=True):
    against_bound(axes, *columns, SAPO().tau_neg, f"{run}: {len(columns[0])} sampled sequences")
plt.show()

# %% [markdown]
# Below Var_i of about 0.01 the points lie *on* the line: there the gate is a parabola, and the bound is an equality. So
# what matters is how small Var_i is, not whether the bound holds. And A1: how much of the policy's drift falls outside
# the band where a hard clip would drop it, and how much of the gradient?

# %%
if RUN is None:
    print(f"{'':42s}{'tiny dense':>12s}{'tiny MoE':>12s}")
    phases = {(row["run"], row["statistic"]): float(row["whole"]) for row in rows("assumptions_phases.csv")}
    for statistic in (
        "|log r|, 99 %", "tokens within GRPO's band", "Var_i, median", "Var_i, mean", "D_i of the log gate, mean",
        "D_i of the real gate, mean", "log gate: sequences above it (must be 0)", "effective tokens, A > 0",
        "effective tokens, A < 0", "gradient that GRPO would clip", "gradient that GSPO would clip",
    ):  # fmt: skip
        print(f"{statistic:42s}" + "".join(f"{phases[run, statistic]:12.4g}" for run in by_run))
else:
    from sapo_jax.analyze import read_diagnostics, show

    print(show(read_diagnostics(RUN)))

# %% [markdown]
# Of the gradient norm that SAPO keeps in the tiny runs, GRPO's clip would have thrown away 7 to 9 %, and GSPO's more
# than a third: with such large steps most sequences leave a band of 4e-4. The soft gate keeps nearly all tokens at
# work: the effective fraction (sum w)^2 / (n sum w^2) of the weights w = r f'(r) is 98 to 99 %.
