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
#     mean_i mean_t  f(r_it) A_i,     f(r) = 4/tau sigmoid(tau (r - 1)),
#     r = pi(y_t) / pi_old(y_t)
#
# with tau = tau_pos where A > 0 and tau_neg where A < 0. Where GRPO and GSPO cut a token's gradient
# off with a hard clip, f fades it out. This notebook looks at the gate f'(r), at what it does to
# the gradient, r f'(r), at the hard clips beside it, at the log gate, which the paper's theory is
# about, and at what a negative update does to a vocabulary. It runs in seconds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sapo_jax as sj
from sapo_jax.config import GRPO, GSPO, SAPO
from sapo_jax.diagnostics.sequences import sequence_statistics

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "legend.frameon": False,
    }
)
BLUE = "#0072B2"
ORANGE = "#D55E00"
TAUS = (0.5, 1.0, 2.0, 5.0)
COLOUR_OF_TAU = dict(zip(TAUS, plt.get_cmap("viridis")([0.85, 0.6, 0.35, 0.1]), strict=True))


def surrogate(r, tau):
    """f(r)"""
    return 4 / tau / (1 + np.exp(-tau * (r - 1)))


def gate(r, tau):
    """f'(r)"""
    return 1 / np.cosh(tau / 2 * (r - 1)) ** 2


r = np.linspace(0.005, 4, 1500)
figure, (values, gates, weights) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for tau, colour in COLOUR_OF_TAU.items():
    style = {"color": colour, "linewidth": 2}
    values.plot(r, surrogate(r, tau) - 2 / tau, label=rf"$\tau$ = {tau:g}", **style)
    gates.plot(r, gate(r, tau), **style)
    weights.plot(r, r * gate(r, tau), **style)
values.set_title("surrogate  f(r) - f(1)")
gates.set_title("gate  f'(r)")
weights.set_title("gradient weight  r f'(r)")
for axes in (values, gates, weights):
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel("r")
values.legend()
plt.show()

# %% [markdown]
# The gate is f'(r) = sech^2(tau/2 (r - 1)) (Eq. 16): it is 1 at r = 1 for every tau, and closes the
# faster the larger tau is. But the gradient goes through log pi, and dr / d log pi = r. So what
# multiplies A grad log pi is **r f'(r)**, which the paper's Figure 1 leaves out. It is 1 at r = 1
# too, and goes on *rising* there: the soft gate bounds the importance weight r, it does not punish
# every departure from 1. The peak is where tau r tanh(tau/2 (r - 1)) = 1. For tau = 1, a token that
# has become twice as likely weighs half as much again as one that has not moved.

# %%
print(" tau   r at the peak   r f'(r) there   back to 1 at r =")
fine = np.linspace(0.5, 20, 1_000_000)
for tau in (0.5, 1.0, 1.05, 2.0, 5.0):
    weight = fine * gate(fine, tau)
    peak = weight.argmax()
    after_peak = fine[peak:]
    back = after_peak[weight[peak:] < 1][0]
    print(f"{tau:4g} {fine[peak]:13.2f} {weight[peak]:15.3f} {back:16.2f}")
    assert abs(tau * fine[peak] * np.tanh(tau / 2 * (fine[peak] - 1)) - 1) < 1e-4
    if tau == 1.0:
        assert (round(fine[peak], 2), round(weight[peak], 3)) == (2.06, 1.575)

# %% [markdown]
# ## Beside the hard clips
#
# The next figure has the same weight for the package's own objectives, by autodiff: d surrogate / d
# log r, over A. A hard clip keeps the plain importance weight r and drops the token once r has
# gone, past the band, the way A pushes it. On the other side (A < 0 and r large: a token that
# should become less likely and has become more so) it lets r grow without bound.


# %%
def weight_of(cfg, r, adv):
    """r f'(r), or what takes its place, at each r: one sequence of one token each."""
    adv_BT = np.full((len(r), 1), adv, np.float32)
    mask_BT = np.ones((len(r), 1), bool)

    def total(log_ratio_BT):
        objective = sj.objectives.OBJECTIVES[cfg.name]
        surrogate_BT, _ = objective(log_ratio_BT, adv_BT, mask_BT, cfg)
        return surrogate_BT.sum()

    log_ratio_BT = jnp.log(r).astype(jnp.float32)[:, None]
    return np.asarray(jax.grad(total)(log_ratio_BT))[:, 0] / adv


CURVES = (
    (SAPO(), r"SAPO, $\tau$ = 1.0 / 1.05", {"color": BLUE, "linewidth": 2.5}),
    (GRPO(), "GRPO, 0.2 / 0.27", {"color": ORANGE, "linewidth": 2, "linestyle": "--"}),
    (GSPO(), "GSPO, r of the sequence", {"color": "black", "linewidth": 2, "linestyle": ":"}),
)
near = np.linspace(0.013, 3, 400)
figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
for axes, adv, sign in zip(panels, (1.0, -1.0), ("> 0", "< 0"), strict=True):
    for cfg, label, style in CURVES:
        axes.plot(near, weight_of(cfg, near, adv), label=label, **style)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set(title=f"factor on A grad log pi, A {sign}", xlabel="r")
panels[0].legend(loc="upper right")
plt.show()

for adv, tau in ((1.0, SAPO().tau_pos), (-1.0, SAPO().tau_neg)):
    by_formula = near * gate(near, tau)
    np.testing.assert_allclose(weight_of(SAPO(), near, adv), by_formula, rtol=2e-5, atol=1e-6)

# %% [markdown]
# ## The log gate and the real gate
#
# The paper shows that the gates of a sequence's tokens act as one gate of the sequence, under two
# assumptions. **A1**, small steps: r is near 1, so r - 1 is near z = log r, and f'(r) is near the
# *log gate* g(z) = sech^2(tau/2 z). **A2**, little dispersion: z varies little within a sequence i,
# with mean mu_i and variance Var_i. Then
#
#     D_i = | mean_t g(z_it) - g(mu_i) |  <=  sup|g''| / 2 Var_i  =  tau^2/4 Var_i
#
# and SAPO acts on the sequence like a soft GSPO. The bound binds the log gate, always; it does not
# bind the real one.

# %%
rng = np.random.default_rng(0)
B = 3000  # made-up sequences
T = 64  # tokens of each
cfg = SAPO()
spread_B1 = 10 ** rng.uniform(-2.5, 0.3, (B, 1))
mean_B1 = rng.normal(0, 0.3, (B, 1)) * spread_B1
z_BT = (mean_B1 + spread_B1 * rng.standard_t(4, (B, T))).clip(-8, 8).astype(np.float32)
adv_BT = np.ones((B, T), np.float32)
mask_BT = np.ones((B, T), bool)
segment_ids_BT = np.ones((B, T), np.int32)
table = sequence_statistics(z_BT, adv_BT, mask_BT, segment_ids_BT, sj.diagnostics.Gates.of(cfg))
variance = np.asarray(table.variance)[:, 1]  # column 1: the sequence with segment id 1
log_gap = np.asarray(table.gap_log)[:, 1]
real_gap = np.asarray(table.gap_real)[:, 1]

figure, (gates, gaps) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
ratio = np.geomspace(0.05, 8, 400)
for tau in (1.0, 2.0):
    style = {"color": COLOUR_OF_TAU[tau], "linewidth": 2}
    log_gate = 1 / np.cosh(tau / 2 * np.log(ratio)) ** 2
    gates.plot(ratio, gate(ratio, tau), label=rf"real gate f'(r), $\tau$ = {tau:g}", **style)
    gates.plot(ratio, log_gate, "--", label=rf"log gate g(log r), $\tau$ = {tau:g}", **style)
gates.set_xscale("log")
gates.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
gates.minorticks_off()
gates.set(title="A1: alike near r = 1 only", xlabel="r", ylim=(0, 1.45))
gates.legend(ncol=2, fontsize=9, loc="upper center")

dots = {"markersize": 4, "alpha": 0.4}
gaps.loglog(variance, real_gap, ".", color=ORANGE, label="$D_i$ of the real gate", **dots)
gaps.loglog(variance, log_gap, ".", color=BLUE, label="$D_i$ of the log gate", **dots)
line = np.geomspace(variance.min(), variance.max(), 50)
bound = cfg.tau_pos**2 / 4 * line
gaps.loglog(line, bound, color="black", label=r"$\tau^2/4\;\mathrm{Var}_i$")
gaps.set_title("A2: made-up sequences, heavy tails")
gaps.set(xlabel=r"$\mathrm{Var}_i$ of log r", ylabel="$D_i$")
gaps.legend(markerscale=3)
plt.show()

log_gate_breaks = np.asarray(table.breaks_bound(table.gap_log))
real_gate_breaks = np.asarray(table.breaks_bound(table.gap_real))
print("log gate above the bound: ", log_gate_breaks.sum(), "of", B)
print("real gate above the bound:", real_gate_breaks.sum(), "of", B)
assert not log_gate_breaks.any()

# %% [markdown]
# ## What a negative update does to a vocabulary
#
# On the logits z of the position, the gradient of the sampled token's term is (Eq. 9, with SAPO's
# weight)
#
#     d f(r) A / d z_v  =  A r f'(r) (1[v = y] - pi(v))
#
# What the sampled token y gets is taken from all others, or given to them, in proportion to the
# probability they have. Eight tokens make it visible. First, is it what autodiff finds?

# %%
p = np.array([0.30, 0.25, 0.18, 0.12, 0.07, 0.04, 0.03, 0.01])
y = 1  # the sampled token
log_ratio = 0.3  # its log r
logits_V = jnp.log(jnp.array(p))


def gradient_by_autodiff(adv):
    """Through log softmax and the package's own objective."""
    old_logp = jax.nn.log_softmax(logits_V)[y] - log_ratio

    def value(logits_V):
        log_ratio_BT = (jax.nn.log_softmax(logits_V)[y] - old_logp)[None, None]
        adv_BT = jnp.array([[adv]])
        mask_BT = jnp.array([[True]])
        surrogate_BT, _ = sj.objectives.sapo(log_ratio_BT, adv_BT, mask_BT, cfg)
        return surrogate_BT.sum()

    return jax.grad(value)(logits_V)


figure, panels = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", sharey=True)
for axes, adv in zip(panels, (1.0, -1.0), strict=True):
    gradient_V = np.asarray(sj.diagnostics.vocabulary_gradient(logits_V, y, adv, log_ratio, cfg))
    np.testing.assert_allclose(gradient_V, gradient_by_autodiff(adv), rtol=1e-5, atol=1e-7)
    axes.bar(range(8), gradient_V, color=np.where(gradient_V > 0, BLUE, ORANGE))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=f"A = {adv:+.0f}, token {y} was sampled (pi = {p[y]})", xlabel="token v")
panels[0].set_ylabel("gradient on logit v")
plt.show()

# %% [markdown]
# A > 0 raises the one token that was rewarded. A < 0 raises all the others, of which the reward
# said nothing. With Qwen3's 151,936 tokens and a tail of probabilities like 1 / rank^1.2, the push
# of one bad token is spread over hundreds of them. That noise is why the paper closes the gate
# faster for A < 0: tau_neg > tau_pos. (`experiments/vocabulary_gradient.py` varies the steepness of
# the tail.)

# %%
V = 151_936
tail = np.arange(1, V) ** -1.2
for p_y in (0.01, 0.3, 0.9):
    others = (1 - p_y) * tail / tail.sum()
    logits_V = np.log(np.append(p_y, others))
    for adv in (1.0, -1.0):
        gradient_V = sj.diagnostics.vocabulary_gradient(logits_V, 0, adv, 0.0, cfg)
        spread = sj.diagnostics.vocabulary_spread(gradient_V, 0)
        print(
            f"pi(y) = {p_y:4g}, A = {adv:+.0f}: moved {float(spread.moved):.2f}, "
            f"effectively raised {float(spread.raised):6.1f} logits, "
            f"lowered {float(spread.lowered):6.1f}"
        )
