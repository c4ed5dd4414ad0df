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
# # 4. Routing replay
#
# A mixture of experts sends each token to k of E experts, the most probable ones of its router. A
# little noise, or a little learning, and a token goes elsewhere: its log-prob jumps, and with it
# the ratio r that GRPO, GSPO and SAPO rest on. *Routing replay* fixes the experts of a token once
# and uses them again:
#
# - **R3** (`train.routing_replay: r3`, arXiv 2510.11370): the sampler records them; scoring and
#   updates replay them.
# - **R2** (`r2`, arXiv 2507.18071, section 5.3): the old-policy scoring pass records them, the
#   updates replay them.
#
# Only ids are replayed. Gate weights come from the live router, so it still learns. Here: a tiny
# MoE with random weights, 4 layers of 16 experts, 4 per token, computing in bfloat16, whose
# rounding the sampler (one token at a time) and the scorer (whole packed rows) do not share. A
# minute or two.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import sapo_jax as sj
from sapo_jax.batch import Batch
from sapo_jax.config import PRESETS, Advantage, Config, Model
from sapo_jax.learner.routing_replay import check_expert_ids, router_metrics, sampled_experts
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import init_state, make_update, policy_loss
from sapo_jax.models import make_policy
from sapo_jax.models.moe import MoE
from sapo_jax.models.size import layer_flops, routing_bytes
from sapo_jax.rollout import Packing, Sampler, SamplingParams, pack_rollout
from sapo_jax.types import Prompt

plt.rcParams.update(
    {"figure.dpi": 80, "font.size": 11, "legend.frameon": False, "axes.titleweight": "bold"}
)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE = "#0072B2"
ORANGE = "#D55E00"

L = 4  # layers
E = 16  # experts
k = 4  # experts of a token
P = 8  # prompts
G = 8  # completions of each
C = 24  # tokens of a completion, at most
PROMPT_TOKENS = 12
model = Model(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    num_experts=E,
    num_experts_per_tok=k,
    moe_intermediate_size=32,
    initializer_range=0.15,
    compute_dtype="bfloat16",
)
policy = make_policy(model)
params = jax.jit(policy.init)(jax.random.key(0))
draw = np.random.default_rng(0)
prompts = []
for i in range(P):
    ids = tuple(draw.integers(2, 64, PROMPT_TOKENS).tolist())
    prompts.append(
        Prompt(index=i, text="", ids=ids, question="", answer="", verifier="exact", task="toy")
    )

sampler = Sampler(policy, SamplingParams(1.0), G, C, stop_ids=(1,), pad_id=0, record_routing=True)
rollout = sampler(params, prompts, jax.random.key(1))
body_flops, key_flops = layer_flops(model)
packing = Packing(body=body_flops, key=key_flops, skips=True, max_prompt=PROMPT_TOKENS, max_new=C)
rows = pack_rollout(prompts, rollout, 0, 4, packing)
real_BT = rows.arrays["segment_ids_BT"] > 0


def batch_of(expert_ids_BTLk=None, **fields):
    """The rollout as a batch; None: the routing is live."""
    unused_BT = np.zeros(real_BT.shape, np.float32)
    arrays = {**rows.arrays, "adv_BT": unused_BT, "weight_BT": unused_BT, **fields}
    return Batch(**{**arrays, "expert_ids_BTLk": expert_ids_BTLk})


# Log-probs, and the experts that the router chose.
score = make_scorer(policy, 1.0, micro_batch=0, record_routing=True)
# R3: what the sampler recorded, on packed rows.
sampled_BTLk = sampled_experts(rows, prompts, rollout, model)
sampler_logp_BT = rows.place(rollout.logp_BC)
live_scores = score(params, batch_of())
live_logp_BT = np.asarray(live_scores.logp_BT)
live_BTLk = np.asarray(live_scores.expert_ids_BTLk)
r3_logp_BT = np.asarray(score(params, batch_of(sampled_BTLk)).logp_BT)


def differing(chosen_BTLk, given_BTLk):
    """Share of the k chosen experts that are not among the given ones, BTL; NaN where none are."""
    kept_BTLk = (chosen_BTLk[..., :, None] == given_BTLk[..., None, :]).any(axis=-1)
    given_BTL = real_BT[..., None] & (given_BTLk[..., 0] < E)
    return np.where(given_BTL, 1 - kept_BTLk.mean(axis=-1), np.nan)


difference_BTL = differing(live_BTLk, sampled_BTLk)
shown = 4  # rows
# 4 layers of row 0, 4 of row 1, ...
cells = np.concatenate([difference_BTL[b].T for b in range(shown)])
mask_BT = rows.mask_BT
gap_N = {
    "live routing": np.abs(live_logp_BT - sampler_logp_BT)[mask_BT],
    "R3: the sampler's experts": np.abs(r3_logp_BT - sampler_logp_BT)[mask_BT],
}

figure, (routes, gaps) = plt.subplots(
    1, 2, figsize=(15, 4.6), layout="constrained", width_ratios=[1.5, 1]
)
colours = plt.get_cmap("OrRd").with_extremes(bad="white")
image = routes.imshow(cells, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none")
middles = [4 * b + 1.5 for b in range(shown)]
routes.set_yticks(middles, [f"row {b}\nlayers 0-3" for b in range(shown)])
for b in range(1, shown):
    routes.axhline(4 * b - 0.5, color="black", linewidth=1)
routes.set(
    title="Same weights: where sampler and scorer choose other experts",
    xlabel="token of the packed row",
)
figure.colorbar(
    image, ax=routes, label="share of a token's k experts", ticks=[0, 0.25, 0.5, 0.75, 1]
)
bins = np.geomspace(1e-4, 3, 45)
for (label, gap), colour in zip(gap_N.items(), (ORANGE, BLUE), strict=True):
    style = {"histtype": "step", "linewidth": 2, "color": colour}
    gaps.hist(gap.clip(1e-4), bins, label=f"{label}: mean {gap.mean():.4f}", **style)
gaps.set(xscale="log", yscale="log", ylim=(0.7, 2000), xlabel="nats", ylabel="tokens")
gaps.set_title("|log pi of sampler - log pi of scorer|")
gaps.legend(loc="upper left", fontsize=10)
plt.show()

# %% [markdown]
# (White: nothing was recorded, or padding.) Few routes differ, but where one does, the log-prob
# is off by up to a hundred times the rounding error. With the sampler's experts replayed (R3)
# that tail is gone; what is left is bfloat16. In float32 both agree to 1e-6, and no route differs
# here. A run logs this as `mismatch/mean` and, every `train.live_mismatch_every` steps,
# `mismatch/live_mean`.

# %%
by_layer = np.nanmean(difference_BTL, axis=(0, 1)).round(4)
print("share of the routes that differ, by layer: ", by_layer)
for label, gap in gap_N.items():
    told = f"{label:28s} mean {gap.mean():.4f}   99 % {np.quantile(gap, 0.99):.3f}"
    print(f"{told}   largest {gap.max():.3f} nats")
live, replayed = gap_N.values()
assert np.nanmean(difference_BTL) > 0
assert replayed.mean() < live.mean()
assert replayed.max() < 0.5 * live.max()

# %% [markdown]
# ## What is recorded
#
# The ids alone, in the smallest unsigned integer type that holds E: E itself means "not
# recorded". That is so on padding and on the last token of a completion, which the sampler drew
# but never passed through the model; nothing depends on where it goes. All other ids have to be
# there and to be k different experts, or an error says which are not.

# %%
print("expert ids", sampled_BTLk.shape, sampled_BTLk.dtype, "(rows, tokens, layers, k)")
large = Model(**PRESETS["qwen3-30b-a3b"])
of_large = routing_bytes(large)
print(f"memory per token: {routing_bytes(model)} bytes; of Qwen3-30B-A3B: {of_large} bytes")
not_recorded_BT = real_BT & (sampled_BTLk == E).all(axis=(2, 3))
completions = len(rollout.length_B)
told = f"real tokens without ids: {not_recorded_BT.sum()} of {real_BT.sum()}"
print(f"{told}; completions: {completions}")
assert not_recorded_BT.sum() == completions


def spoiled(place, value):
    ids_BTLk = sampled_BTLk.copy()
    ids_BTLk[place] = value
    return ids_BTLk


for what, ids_BTLk in {
    "wrong shape": sampled_BTLk[:, :, :3],
    "out of range": spoiled((0, 5, 1, 2), 99),
    "missing": spoiled((0, 5), E),
}.items():
    try:
        check_expert_ids(ids_BTLk, rows.arrays, model)
    except ValueError as error:
        print(f"{what:13s} ValueError: {error}")
    else:
        raise AssertionError(f"{what}: not refused")

# %% [markdown]
# ## R2: the ratio changes with the weights alone
#
# The scoring pass records, the updates replay. At the same weights that changes nothing, to the
# bit. Then four updates of SAPO on this rollout (a toy reward: the share of even tokens); after
# each, the whole rollout is scored again, with the recorded experts and with live ones.

# %%
recorded_BTLk = check_expert_ids(live_BTLk, rows.arrays, model)
again_BT = score(params, batch_of(recorded_BTLk)).logp_BT
np.testing.assert_array_equal(again_BT, live_logp_BT)

rewards = []
for tokens_C, length in zip(rollout.tokens_BC, rollout.length_B, strict=True):
    rewards.append((tokens_C[:length] % 2 == 0).mean())
reward_PG = np.array(rewards, np.float32).reshape(P, G)
adv_PG = sj.objectives.advantages(reward_PG, np.ones((P, G), bool), Advantage())
whole = batch_of(recorded_BTLk, adv_BT=rows.spread(adv_PG.reshape(-1)), old_logp_BT=live_logp_BT)
cfg = Config(model=model)
optimizer = optax.apply_if_finite(optax.adam(5e-5), 9)
update = make_update(policy, optimizer, policy_loss(cfg), micro_batch=0)
state = init_state(jax.tree.map(jnp.array, params), optimizer)

log_ratio = {"live routing": [], "R2 replayed": []}
by_layer = []
logged = []
for part in np.split(np.arange(len(real_BT)), 4):
    mini = jax.tree.map(lambda x, part=part: x[part], whole)
    weight_BT = sj.objectives.token_weights(mini.mask_BT, mini.segment_ids_BT, "sequence_mean", C)
    state, aux = update(state, dataclasses.replace(mini, weight_BT=weight_BT))
    logged.append(router_metrics([jax.device_get(aux["routing"])], model))
    live_scores = score(state.params, batch_of())
    live_BT = np.asarray(live_scores.logp_BT)
    chosen_BTLk = np.asarray(live_scores.expert_ids_BTLk)
    replay_BT = np.asarray(score(state.params, batch_of(recorded_BTLk)).logp_BT)
    by_layer.append(np.nanmean(differing(chosen_BTLk, recorded_BTLk), axis=(0, 1)))
    log_ratio["live routing"].append((live_BT - live_logp_BT)[mask_BT])
    log_ratio["R2 replayed"].append((replay_BT - live_logp_BT)[mask_BT])

figure, (layers, spread, last) = plt.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
updates = np.arange(5)
for layer, colour in enumerate(plt.get_cmap("viridis")(np.linspace(0.05, 0.85, L))):
    shares = [0, *np.array(by_layer)[:, layer]]
    layers.plot(updates, shares, "o-", color=colour, linewidth=2, label=f"layer {layer}")
layers.set_title("Routes that differ from the recorded")
layers.set(xlabel="updates since", xticks=updates, ylim=(0, None))
layers.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %")
layers.legend(fontsize=10)
bins = np.linspace(-0.6, 0.6, 49)
for (label, z), colour in zip(log_ratio.items(), (ORANGE, BLUE), strict=True):
    style = {"color": colour, "linewidth": 2, "label": label}
    deviations = [0, *(z_N.std() for z_N in z)]
    spread.plot(updates, deviations, "o-", **style)
    last.hist(z[-1].clip(-0.6, 0.6), bins, histtype="step", **style)
spread.set_title("Standard deviation of log r")
spread.set(xlabel="updates since", xticks=updates, ylim=(0, None), ylabel="nats")
spread.legend(fontsize=10)
last.set(title="log r after four updates", xlabel="log r", ylabel="tokens", yscale="log")
last.legend(fontsize=10)
plt.show()

# %% [markdown]
# Routes that flip add to the spread of log r, on tokens whose weights have hardly moved; replay
# takes that away. (With ten times larger steps the weights themselves do most of it, and replay
# changes little.) A run logs the share of routes that differ from inside the update: of its
# mini-batch's tokens, before the step. In the first update the weights are still those that
# recorded: what differs there is bfloat16, rounding otherwise in another program. In float32 it
# is 0.

# %%
for i, metrics in enumerate(logged, 1):
    told = [f"{name} {value:.4f}" for name, value in metrics.items() if "difference" in name]
    print(f"update {i}: {'  '.join(told)}")
assert logged[0]["router/replay_difference_mean"] < by_layer[0].mean() < by_layer[-1].mean()
assert log_ratio["R2 replayed"][-1].std() < log_ratio["live routing"][-1].std()

# %% [markdown]
# ## The router still learns
#
# Given experts S, a token gets y = sum over e in S of g_e SwiGLU_e(x), with g the softmax of the
# *live* router logits over S. So the router has a gradient, through g. Is the layer of the
# package that, for experts which the router would not have chosen? Here is the plain computation:
# every expert on every token, float32.

# %%
layer_cfg = dataclasses.replace(model, compute_dtype="float32")
graphdef, weights = nnx.split(MoE(layer_cfg, rngs=nnx.Rngs(0)))
x_BTD = jnp.asarray(draw.normal(size=(2, 16, 64)), jnp.float32)
given_BTk = np.argsort(draw.random((2, 16, E)), axis=-1)[..., :k].astype(np.uint8)  # any k
towards_BTD = jnp.asarray(draw.normal(size=x_BTD.shape), jnp.float32)


def package(weights):
    y_BTD, routing = nnx.merge(graphdef, weights)(x_BTD, jnp.ones((2, 16), jnp.int32), given_BTk)
    return (y_BTD * towards_BTD).sum(), (y_BTD, routing)


def plain(weights):
    w = nnx.to_pure_dict(weights)
    in_S_BTE = jax.nn.one_hot(given_BTk, E).sum(axis=2) > 0
    g_BTE = jax.nn.softmax(jnp.where(in_S_BTE, x_BTD @ w["router"], -jnp.inf), axis=-1)
    gate_BTEF = jnp.einsum("btd,edf->btef", x_BTD, w["gate"])
    up_BTEF = jnp.einsum("btd,edf->btef", x_BTD, w["up"])
    hidden_BTEF = jax.nn.silu(gate_BTEF) * up_BTEF
    y_BTD = jnp.einsum("bte,btef,efd->btd", g_BTE, hidden_BTEF, w["down"])
    return (y_BTD * towards_BTD).sum(), y_BTD


(_, (ours_BTD, routing)), ours = jax.jit(jax.value_and_grad(package, has_aux=True))(weights)
(_, theirs_BTD), theirs = jax.jit(jax.value_and_grad(plain, has_aux=True))(weights)
np.testing.assert_allclose(ours_BTD, theirs_BTD, rtol=1e-4, atol=1e-5)
ours = nnx.to_pure_dict(ours)
theirs = nnx.to_pure_dict(theirs)
assert ours.keys() == theirs.keys()
for name, a in ours.items():
    b = theirs[name]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    difference = np.abs(a - b).max()
    print(
        f"gradient of {name:7s} norm {np.linalg.norm(a):8.4f}   largest difference {difference:.1e}"
    )
share = float(routing.replay.difference / routing.replay.tokens)
print(f"{share:.0%} of the given experts are not the router's own choice")
assert np.linalg.norm(ours["router"]) > 0.1

# %% [markdown]
# `tests/models/test_given_experts.py` shows the same for whole models against `transformers` with
# forced experts. What to use: `configs/quickstart_moe_{sapo,gspo,grpo_r2,grpo_r3}.yaml` are the
# four side by side for a tiny MoE.
