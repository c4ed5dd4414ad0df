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
# # 1. The soft gate
#
# SAPO (arXiv 2511.20347) maximises, over G completions y_i of a prompt (Eqs. 5, 6),
#
#     mean_i mean_t  f(r_it) A_i,     f(r) = 4/tau sigmoid(tau (r - 1)),     r = pi(y_t) / pi_old(y_t)
#
# with tau = tau_pos where A > 0 and tau_neg where A < 0. Where GRPO and GSPO cut a token's gradient off with a hard
# clip, f fades it out. This notebook looks at the gate f'(r), at what it does to the gradient, r f'(r), at the hard
# clips beside it, at the log gate, which the paper's theory is about, and at what a negative update does to a
# vocabulary. It runs in seconds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sapo_jax.config import GRPO, GSPO, SAPO
from sapo_jax.diagnostics import Gates, vocabulary_gradient, vocabulary_spread
from sapo_jax.diagnostics.sequences import sequences
from sapo_jax.objectives import OBJECTIVES

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "font.size": 11,
    }
)
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SHADES = dict(
    zip((0.5, 1.0, 2.0, 5.0), plt.get_cmap("viridis")([0.85, 0.6, 0.35, 0.1]), strict=True)
)

r = np.linspace(0.005, 4, 1500)
surrogate = lambda r, tau: 4 / tau / (1 + np.exp(-tau * (r - 1)))
gate = lambda r, tau: 1 / np.cosh(tau / 2 * (r - 1)) ** 2

figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for tau, colour in SHADES.items():
    panels[0].plot(
        r, surrogate(r, tau) - 2 / tau, color=colour, linewidth=2, label=rf"$\tau$ = {tau:g}"
    )
    panels[1].plot(r, gate(r, tau), color=colour, linewidth=2)
    panels[2].plot(r, r * gate(r, tau), color=colour, linewidth=2)
titles = ("surrogate  f(r) - f(1)", "gate  f'(r)", "gradient weight  r f'(r)")
for axes, title in zip(panels, titles, strict=True):
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set(title=title, xlabel="r")
panels[0].legend()
plt.show()

# %% [markdown]
# The gate is f'(r) = sech^2(tau/2 (r - 1)) (Eq. 16): 1 at r = 1 for every tau, and closed the faster the larger tau is.
# But the gradient goes through log pi, and dr / d log pi = r. So what multiplies A grad log pi is **r f'(r)**, which
# the paper's Figure 1 leaves out. It is 1 at r = 1 too, and goes on *rising* there: the soft gate bounds the importance
# weight r, it does not punish every departure from 1. The peak is where tau r tanh(tau/2 (r - 1)) = 1. For tau = 1, a
# token that has become twice as likely weighs half as much again as one that has not moved.

# %%
print(" tau   r at the peak   r f'(r) there   back to 1 at r =")
for tau in (0.5, 1.0, 1.05, 2.0, 5.0):
    fine = np.linspace(0.5, 20, 1_000_000)
    weight = fine * gate(fine, tau)
    top = weight.argmax()
    back = fine[top:][weight[top:] < 1][0]
    print(f"{tau:4g} {fine[top]:13.2f} {weight[top]:15.3f} {back:16.2f}")
    assert abs(tau * fine[top] * np.tanh(tau / 2 * (fine[top] - 1)) - 1) < 1e-4
    if tau == 1.0:
        assert (round(fine[top], 2), round(weight[top], 3)) == (2.06, 1.575)

# %% [markdown]
# ## Beside the hard clips
#
# The same weight for the package's own objectives, by autodiff: d surrogate / d log r, over A. A hard clip keeps the
# plain importance weight r and drops the token once r has gone, past the band, the way A pushes it. On the other side
# (A < 0 and r large: a token that should become less likely and has become more so) it lets r grow without bound.


# %%
def weight_of(cfg, r, adv):
    """r f'(r), or what takes its place, at each r: one sequence of one token each."""
    shape = (len(r), 1)
    adv_BT, mask_BT = np.full(shape, adv, np.float32), np.ones(shape, bool)
    total = lambda z_BT: OBJECTIVES[cfg.name](z_BT, adv_BT, mask_BT, cfg)[0].sum()
    return np.asarray(jax.grad(total)(jnp.log(r).astype(jnp.float32)[:, None]))[:, 0] / adv


figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
near = np.linspace(0.013, 3, 400)
for axes, adv in zip(panels, (1.0, -1.0), strict=True):
    axes.plot(
        near,
        weight_of(SAPO(), near, adv),
        color=BLUE,
        linewidth=2.5,
        label=r"SAPO, $\tau$ = 1.0 / 1.05",
    )
    axes.plot(
        near,
        weight_of(GRPO(), near, adv),
        "--",
        color=ORANGE,
        linewidth=2,
        label="GRPO, 0.2 / 0.27",
    )
    axes.plot(
        near,
        weight_of(GSPO(), near, adv),
        ":",
        color="black",
        linewidth=2,
        label="GSPO, r of the sequence",
    )
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set(title=f"factor on A grad log pi, A {'> 0' if adv > 0 else '< 0'}", xlabel="r")
panels[0].legend(loc="upper right")
plt.show()

for adv, tau in ((1.0, SAPO().tau_pos), (-1.0, SAPO().tau_neg)):
    np.testing.assert_allclose(
        weight_of(SAPO(), near, adv), near * gate(near, tau), rtol=2e-5, atol=1e-6
    )

# %% [markdown]
# ## The log gate and the real gate
#
# The paper shows that the gates of a sequence's tokens act as one gate of the sequence, under two assumptions. **A1**,
# small steps: r is near 1, so r - 1 is near z = log r, and f'(r) is near the *log gate* g(z) = sech^2(tau/2 z). **A2**,
# little dispersion: z varies little within a sequence i, with mean mu_i and variance Var_i. Then
#
#     D_i = | mean_t g(z_it) - g(mu_i) |  <=  sup|g''| / 2 Var_i  =  tau^2/4 Var_i
#
# and SAPO acts on the sequence like a soft GSPO. The bound binds the log gate, always; not the real one.

# %%
rng = np.random.default_rng(0)
B, T, cfg = 3000, 64, SAPO()
spread_B1 = 10 ** rng.uniform(-2.5, 0.3, (B, 1))
mean_B1 = rng.normal(0, 0.3, (B, 1)) * spread_B1
z_BT = (mean_B1 + spread_B1 * rng.standard_t(4, (B, T))).clip(-8, 8).astype(np.float32)
one_BT = np.ones((B, T), np.int32)
made_up = sequences(z_BT, one_BT.astype(np.float32), one_BT.astype(bool), one_BT, Gates.of(cfg))
variance, log_gap, real_gap = (
    np.asarray(x)[:, 1] for x in (made_up.variance, made_up.gap_log, made_up.gap_real)
)

figure, (gates, gaps) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
ratio = np.geomspace(0.05, 8, 400)
for tau, colour in ((1.0, SHADES[1.0]), (2.0, SHADES[2.0])):
    gates.plot(
        ratio,
        gate(ratio, tau),
        color=colour,
        linewidth=2,
        label=rf"real gate f'(r), $\tau$ = {tau:g}",
    )
    log_gate = 1 / np.cosh(tau / 2 * np.log(ratio)) ** 2
    gates.plot(
        ratio,
        log_gate,
        "--",
        color=colour,
        linewidth=2,
        label=rf"log gate g(log r), $\tau$ = {tau:g}",
    )
gates.set_xscale("log")
gates.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
gates.minorticks_off()
gates.set(title="A1: alike near r = 1 only", xlabel="r", ylim=(0, 1.45))
gates.legend(ncol=2, fontsize=9, loc="upper center")
gaps.loglog(
    variance, real_gap, ".", markersize=4, alpha=0.4, color=ORANGE, label="$D_i$ of the real gate"
)
gaps.loglog(
    variance, log_gap, ".", markersize=4, alpha=0.4, color=BLUE, label="$D_i$ of the log gate"
)
line = np.geomspace(variance.min(), variance.max(), 50)
gaps.loglog(line, cfg.tau_pos**2 / 4 * line, color="black", label=r"$\tau^2/4\;\mathrm{Var}_i$")
gaps.set(
    title="A2: made-up sequences, heavy tails", xlabel=r"$\mathrm{Var}_i$ of log r", ylabel="$D_i$"
)
gaps.legend(markerscale=3)
plt.show()

print(
    "log gate above the bound: ", np.asarray(made_up.breaks_bound(made_up.gap_log)).sum(), "of", B
)
print(
    "real gate above the bound:", np.asarray(made_up.breaks_bound(made_up.gap_real)).sum(), "of", B
)
assert not np.asarray(made_up.breaks_bound(made_up.gap_log)).any()

# %% [markdown]
# ## What a negative update does to a vocabulary
#
# On the logits z of the position, the gradient of the sampled token's term is (Eq. 9, with SAPO's weight)
#
#     d f(r) A / d z_v  =  A r f'(r) (1[v = y] - pi(v))
#
# What the sampled token y gets is taken from all others, or given to them, in proportion to the probability they have.
# Eight tokens make it visible. First, is it what autodiff finds?

# %%
p = np.array([0.30, 0.25, 0.18, 0.12, 0.07, 0.04, 0.03, 0.01])
y, z = 1, 0.3  # the sampled token, and its log r


def by_autodiff(logits, token, adv, log_ratio):
    """Through log softmax and the package's own objective."""
    old = jax.nn.log_softmax(logits)[token] - log_ratio
    value = lambda x: OBJECTIVES["sapo"](
        (jax.nn.log_softmax(x)[token] - old)[None, None],
        jnp.array([[adv]]),
        jnp.array([[True]]),
        cfg,
    )[0].sum()
    return jax.grad(value)(logits)


logits = jnp.log(jnp.array(p))
figure, panels = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", sharey=True)
for axes, adv in zip(panels, (1.0, -1.0), strict=True):
    gradient_V = np.asarray(vocabulary_gradient(logits, y, adv, z, cfg))
    np.testing.assert_allclose(gradient_V, by_autodiff(logits, y, adv, z), rtol=1e-5, atol=1e-7)
    axes.bar(range(8), gradient_V, color=np.where(gradient_V > 0, BLUE, ORANGE))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=f"A = {adv:+.0f}, token {y} was sampled (pi = {p[y]})", xlabel="token v")
panels[0].set_ylabel("gradient on logit v")
plt.show()

# %% [markdown]
# A > 0 raises the one token that was rewarded. A < 0 raises all the others, of which the reward said nothing. With
# Qwen3's 151,936 tokens and a tail of probabilities like 1 / rank^1.2, the push of one bad token is spread over
# hundreds of them. That noise is why the paper closes the gate faster for A < 0: tau_neg > tau_pos.
# (`experiments/vocabulary_gradient.py` varies the steepness of the tail.)

# %%
V = 151_936
others = np.arange(1, V) ** -1.2
for p_y in (0.01, 0.3, 0.9):
    logits_V = np.log(np.append(p_y, (1 - p_y) * others / others.sum()))
    for adv in (1.0, -1.0):
        spread = vocabulary_spread(vocabulary_gradient(logits_V, 0, adv, 0.0, cfg), 0)
        print(
            f"pi(y) = {p_y:4g}, A = {adv:+.0f}: moved {float(spread.moved):.2f}, "
            f"effectively raised {float(spread.raised):6.1f} logits, lowered {float(spread.lowered):6.1f}"
        )
