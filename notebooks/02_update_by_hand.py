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
# # 2. One update by hand
#
# One prompt, `2 + 3 =`, four completions of it, one optimiser step. Everything between the
# policy's logits and the new parameters is done here in numpy, without autodiff, and printed; the
# package's objective, loss and learner have to agree with it, or an assert fails. The policy is a
# Qwen3 of 600 parameters with random weights. The completions count as samples of an older
# policy, so the ratios r = pi / pi_old are not 1. It runs in seconds.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colors

import sapo_jax as sj
from sapo_jax.batch import Batch
from sapo_jax.config import SAPO, Advantage, Config, Model, Optimizer, Rollout
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import init_state, make_optimizer, make_update, policy_loss
from sapo_jax.models import make_policy
from sapo_jax.rollout import pad_sequences

plt.rcParams.update({"figure.dpi": 80, "font.size": 11, "axes.titleweight": "bold"})

WORDS = ("<pad>", "<end>", "2", "3", "4", "5", "+", "=")
PROMPT = ("2", "+", "3", "=")
COMPLETIONS = (("5", "<end>"), ("4", "<end>"), ("2", "3", "<end>"), ("3", "+", "2", "<end>"))
REWARD = np.array([1.0, 0.0, 0.0, 0.0], np.float32)  # only the first one is right

cfg = Config(
    model=Model(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=12,
        tie_word_embeddings=False,
        initializer_range=0.5,
    ),
    objective=SAPO(tau_pos=1.0, tau_neg=1.05),
    rollout=Rollout(temperature=0.8),
    optimizer=Optimizer(
        learning_rate=0.01, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.1, max_grad_norm=0.5
    ),
)
policy = make_policy(cfg.model)
init = jax.jit(policy.init)
old_params = init(jax.random.key(0))
noise = init(jax.random.key(1))
# The policy has moved since it sampled.
params = jax.tree.map(lambda x, n: x + 0.1 * n, old_params, noise)

ids = [[WORDS.index(word) for word in (*PROMPT, *completion)] for completion in COMPLETIONS]
# One sequence per row; T is 16.
rows = pad_sequences([(row, len(PROMPT)) for row in ids], pad_id=0)
mask_BT = rows["mask_BT"]  # True on the completions
adv_P4 = sj.objectives.advantages(REWARD[None], np.ones((1, 4), bool), Advantage())
batch = Batch(
    **rows,
    adv_BT=np.broadcast_to(adv_P4.T, mask_BT.shape).astype(np.float32),
    weight_BT=sj.objectives.token_weights(mask_BT, rows["segment_ids_BT"], "sequence_mean", 4),
)
score = make_scorer(policy, cfg.rollout.temperature, micro_batch=0)
old_logp_BT = np.asarray(score(old_params, batch).logp_BT)
logp_BT = np.asarray(score(params, batch).logp_BT)
log_ratio_BT = logp_BT - old_logp_BT
surrogate_BT, diagnostics = sj.objectives.sapo(log_ratio_BT, batch.adv_BT, mask_BT, cfg.objective)
push_BT = batch.adv_BT * np.asarray(diagnostics["grad_weight"])

completion = slice(len(PROMPT), len(PROMPT) + 4)  # columns of the longest one
push_B4 = push_BT[:, completion]
ratio_B4 = np.exp(log_ratio_BT)[:, completion]
figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
shown_B4 = np.where(mask_BT[:, completion], push_B4, np.nan)
image = axes.imshow(shown_B4, cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto")
for b, words in enumerate(COMPLETIONS):
    for t, word in enumerate(words):
        style = {"ha": "center", "color": "white" if abs(push_B4[b, t]) > 1.5 else "black"}
        axes.text(t, b, word, va="bottom", fontsize=15, fontweight="bold", **style)
        axes.text(t, b + 0.08, f"r = {ratio_B4[b, t]:.2f}", va="top", **style)
axes.set_yticks(range(4), [f"{' '.join(PROMPT)}\nA = {a:+.2f}" for a in adv_P4[0]])
axes.set_xticks(range(4), [f"token {t}" for t in range(1, 5)])
axes.tick_params(length=0)
axes.set_title("Which way, and how hard, this update pushes each token")
for side in axes.spines.values():
    side.set_visible(False)
figure.colorbar(image, ax=axes, label="A r f'(r)")
plt.show()

# %% [markdown]
# ## Log-probs and ratios
#
# The body of the model gives a hidden state h for each position; the state *before* a token
# predicts it. The logits are head h / temperature, and log pi(y) = z_y - log sum_v exp z_v. That
# is the last thing taken from the package until the comparison: from here on, numpy in float64,
# one line per completion token.

# %%
sequence_N, column_N = np.nonzero(mask_BT)  # of the 11 completion tokens
token_N = rows["tokens_BT"][sequence_N, column_N]


@jax.jit
def hidden_states(params):
    """After the final norm, at the position before each of the 11 tokens, ND."""
    model = policy.bind(params)
    out = model.forward(
        rows["tokens_BT"], rows["positions_BT"], rows["segment_ids_BT"], rows["prefix_ids_BT"]
    )
    return out.hidden_BTD[sequence_N, column_N - 1]


def log_softmax(z_NV):
    z_NV = z_NV - z_NV.max(axis=1, keepdims=True)
    return z_NV - np.log(np.exp(z_NV).sum(axis=1, keepdims=True))


def by_hand(params):
    """The hidden states ND and the log-probs of all words NV."""
    hidden_ND = np.asarray(hidden_states(params), np.float64)
    head_VD = np.asarray(params["head"], np.float64)
    return hidden_ND, log_softmax(hidden_ND @ head_VD.T / cfg.rollout.temperature)


hidden_ND, logp_NV = by_hand(params)
_, old_logp_NV = by_hand(old_params)
N = len(token_N)
logp_N = logp_NV[np.arange(N), token_N]
old_logp_N = old_logp_NV[np.arange(N), token_N]
ratio_N = np.exp(logp_N - old_logp_N)

print("sequence  token    log pi   log pi_old     r")
for n in range(N):
    numbers = f"{logp_N[n]:8.4f} {old_logp_N[n]:10.4f} {ratio_N[n]:9.4f}"
    print(f"   y{sequence_N[n] + 1}     {WORDS[token_N[n]]:6s} {numbers}")

# %% [markdown]
# ## Advantages and weights
#
# A = (R - mean) / (std + eps) within the group; every token of a completion has the completion's
# A. The weight of a token is 1 / (4 |y_i|), so that the loss is the mean over sequences of the
# mean over their tokens (Eq. 5).

# %%
adv_4 = (REWARD - REWARD.mean()) / (REWARD.std() + cfg.advantage.eps)
length_4 = np.bincount(sequence_N)
adv_N = adv_4[sequence_N].astype(np.float64)
weight_N = 1 / (4 * length_4[sequence_N])
for b in range(4):
    told = f"y{b + 1}: R = {REWARD[b]:.0f}   A = {adv_4[b]:+.4f}   |y| = {length_4[b]}"
    print(f"{told}   weight = {1 / (4 * length_4[b]):.5f}")

# %% [markdown]
# ## Gate, gradient weight, loss
#
# f(r) = 4/tau sigmoid(tau (r - 1)), gate f'(r) = sech^2(tau/2 (r - 1)) (Eqs. 6, 16); loss = - sum
# of weight f(r) A.

# %%
tau_N = np.where(adv_N > 0, cfg.objective.tau_pos, cfg.objective.tau_neg)
f_N = 4 / tau_N / (1 + np.exp(-tau_N * (ratio_N - 1)))
gate_N = 1 / np.cosh(tau_N / 2 * (ratio_N - 1)) ** 2
grad_weight_N = ratio_N * gate_N
loss = -np.sum(weight_N * f_N * adv_N)

print("sequence  token    tau     f(r)    f'(r)   r f'(r)   weight f(r) A")
for n in range(N):
    print(
        f"   y{sequence_N[n] + 1}     {WORDS[token_N[n]]:6s} {tau_N[n]:5.2f} {f_N[n]:8.4f}"
        f" {gate_N[n]:8.4f} {grad_weight_N[n]:8.4f} {weight_N[n] * f_N[n] * adv_N[n]:12.5f}"
    )
constant = -np.sum(weight_N * 2 / tau_N * adv_N)
print(f"\nloss = {loss:.6f}, of which {constant:.6f} is the constant f(1) = 2/tau")

# %% [markdown]
# ## The gradient
#
# On the logits (before they are divided by the temperature) of the position of token t,
#
#     d loss / d z_v = - weight A r f'(r) (1[v = y] - pi(v)) / temperature
#
# (Eq. 9 with SAPO's weight). On the output head it is the sum over positions of that times h.

# %%
coefficient_N = weight_N * adv_N * grad_weight_N / cfg.rollout.temperature
logits_gradient_NV = -coefficient_N[:, None] * (np.eye(8)[token_N] - np.exp(logp_NV))
head_gradient_VD = logits_gradient_NV.T @ hidden_ND

figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
# Linear near 0, logarithmic beyond.
scale = colors.AsinhNorm(linear_width=0.02, vmin=-0.4, vmax=0.4)
axes.imshow(-logits_gradient_NV, cmap="RdBu", norm=scale, aspect="auto")
for n, v in np.ndindex(N, 8):
    value = -logits_gradient_NV[n, v]
    colour = "white" if abs(value) > 0.1 else "black"
    axes.text(v, n, f"{value:.3f}", ha="center", va="center", fontsize=9, color=colour)
    if v == token_N[n]:
        axes.add_patch(
            plt.Rectangle((v - 0.5, n - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
        )
axes.set_xticks(range(8), WORDS)
axes.set_yticks(range(N), [f"y{sequence_N[n] + 1}   {WORDS[token_N[n]]}" for n in range(N)])
axes.set(
    title="Descent on each logit: - d loss / d z (the token itself is boxed)", xlabel="logit of"
)
plt.show()
print("gradient on the head, one row per word:")
for word, row in zip(WORDS, head_gradient_VD, strict=True):
    print(f"  {word:6s}", " ".join(f"{x:8.4f}" for x in row))

# %% [markdown]
# The whole gradient, of every parameter, is this one on the logits carried back through the
# model. (Backpropagation itself is jax's: there is nothing of SAPO in it.)


# %%
def logits_of(params):
    return hidden_states(params) @ params["head"].T


@jax.jit
def carry_back(params, gradient_NV):
    """The gradient on all parameters, of one on the logits."""
    _, pull_back = jax.vjp(logits_of, params)
    return pull_back(gradient_NV)[0]


gradient = carry_back(params, jnp.asarray(logits_gradient_NV, jnp.float32))
norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
print(f"gradient norm {norm:.6f}, clipped to {cfg.optimizer.max_grad_norm}")

# %% [markdown]
# ## The optimiser step
#
# AdamW's first step after clipping by the global norm: with g the clipped gradient, m = (1 - b1)
# g and v = (1 - b2) g^2, corrected for their start at 0, are g and g^2 themselves. So a matrix p
# becomes p - rate (g / (|g| + eps) + decay p).

# %%
opt = cfg.optimizer
g_VD = head_gradient_VD * min(1, opt.max_grad_norm / norm)
head_VD = np.asarray(params["head"], np.float64)
step_VD = g_VD / (np.abs(g_VD) + opt.eps) + opt.weight_decay * head_VD
new_head_VD = head_VD - opt.learning_rate * step_VD
largest = np.abs(new_head_VD - head_VD).max()
print(f"the head moves by {largest:.4f} at most (rate {opt.learning_rate})")

# %% [markdown]
# ## And the package?
#
# Scorer, advantages, weights, objective; loss and gradient by autodiff of the learner's own loss;
# then the learner's update, jitted, with its AdamW.

# %%
batch_with_old = dataclasses.replace(batch, old_logp_BT=old_logp_BT)
at = (sequence_N, column_N)


def same(by_hand, by_package):
    np.testing.assert_allclose(by_hand, by_package, rtol=2e-5, atol=1e-6)


same(logp_N, logp_BT[at])
same(old_logp_N, old_logp_BT[at])
same(adv_4, adv_P4[0])
same(weight_N, batch.weight_BT[at])
same(f_N * adv_N, np.asarray(surrogate_BT)[at])
same(gate_N, np.asarray(diagnostics["gate"])[at])
same(grad_weight_N, np.asarray(diagnostics["grad_weight"])[at])

loss_fn = policy_loss(cfg)


@jax.jit
@jax.value_and_grad
def autodiff(params):
    loss, _ = loss_fn(policy.bind(params), batch_with_old)
    return loss


their_loss, their_gradient = autodiff(params)
same(loss, their_loss)
same(head_gradient_VD, their_gradient["head"])
jax.tree.map(same, gradient, their_gradient)

tx = make_optimizer(cfg.optimizer, total_steps=10)
# Two micro-batches of two sequences give the same.
update = make_update(policy, tx, loss_fn, micro_batch=2)
state, aux = update(init_state(jax.tree.map(jnp.array, params), tx), batch_with_old)
same(loss, aux["loss"])
same(norm, aux["grad_norm"])
same(new_head_VD, state.params["head"])

print(f"loss           by hand {loss:.7f}   autodiff {their_loss:.7f}   learner {aux['loss']:.7f}")
print(f"gradient norm  by hand {norm:.7f}   learner  {aux['grad_norm']:.7f}")
differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, their_gradient)
worst = max(jax.tree.leaves(differences))
worst_head = np.abs(new_head_VD - np.asarray(state.params["head"])).max()
print(
    f"largest difference of a gradient entry {worst:.1e}, "
    f"of a head entry after the step {worst_head:.1e}"
)

# %% [markdown]
# What became of the four? A gradient step on shared parameters does not obey each completion for
# itself: those that have tokens in common move each other.

# %%
after_BT = np.asarray(score(state.params, batch).logp_BT)
gains = []
for b in range(4):
    before = logp_BT[b][mask_BT[b]].sum()
    after = after_BT[b][mask_BT[b]].sum()
    gains.append(after - before)
    print(f"y{b + 1} (R = {REWARD[b]:.0f}):  log pi(y) {before:8.3f} -> {after:8.3f}")
assert gains[0] > max(gains[1:])
