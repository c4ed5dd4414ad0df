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
# A mixture of experts sends each token to k of E experts, the most probable ones of its router. A little noise, or a
# little learning, and a token goes elsewhere: its log-prob jumps, and with it the ratio r that GRPO, GSPO and SAPO rest
# on. *Routing replay* fixes the experts of a token once and uses them again:
#
# - **R3** (`train.routing_replay: r3`, arXiv 2510.11370): the sampler records them; scoring and updates replay them.
# - **R2** (`r2`, arXiv 2507.18071, section 5.3): the old-policy scoring pass records, the updates replay.
#
# Only ids are replayed. Gate weights come from the live router, so it still learns. Here: a tiny MoE with random
# weights, 4 layers of 16 experts, 4 per token, computing in bfloat16, whose rounding the sampler (one token at a time)
# and the scorer (whole packed rows) do not share. A minute or two.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from sapo_jax.objectives.advantages import advantages
from sapo_jax.config import PRESETS, Advantage, Config, Model
from sapo_jax.models.size import layer_flops, routing_bytes
from sapo_jax.learner.update import init_state, make_update, policy_loss
from sapo_jax.models import make_policy
from sapo_jax.models.moe import MoE
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import Packing, SamplingParams, Sampler, pack_rollout
from sapo_jax.learner.routing_replay import check_expert_ids, router_metrics, sampled_experts
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.batch import Batch
from sapo_jax.types import Prompt

plt.rcParams.update(
    {"figure.dpi": 80, "font.size": 11, "legend.frameon": False, "axes.titleweight": "bold"}
)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"

model = Model(
    vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, initializer_range=0.15,
    compute_dtype="bfloat16",
)  # fmt: skip
L, E, k, G, C = 4, 16, 4, 8, 24
policy = make_policy(model)
params = jax.jit(policy.init)(jax.random.key(0))
draw = np.random.default_rng(0)
prompts = [
    Prompt(i, "", tuple(draw.integers(2, 64, 12).tolist()), "", "", "exact", "toy")
    for i in range(8)
]

sampler = Sampler(policy, SamplingParams(1.0), G, C, stop_ids=(1,), pad_id=0, record_routing=True)
rollout = sampler(params, prompts, jax.random.key(1))
rows = pack_rollout(
    prompts, rollout, 0, 4, Packing(*layer_flops(model), skips=True, max_prompt=12, max_new=C)
)
real_BT = rows.arrays["segment_ids_BT"] > 0


def batch_of(expert_ids_BTLk=None, **fields):
    unused = np.zeros(real_BT.shape, np.float32)
    return Batch(
        **{
            **rows.arrays,
            "adv_BT": unused,
            "weight_BT": unused,
            **fields,
            "expert_ids_BTLk": expert_ids_BTLk,
        }
    )


score = make_scorer(
    policy, 1.0, micro_batch=0, record_routing=True
)  # log-probs, entropies, and the router's choice
sampled_BTLk = sampled_experts(
    rows, prompts, rollout, model
)  # R3: what the sampler recorded, on packed rows
sampler_logp_BT = rows.place(rollout.logp_BC)
live_logp_BT, _, live_BTLk = map(np.asarray, score(params, batch_of()))
r3_logp_BT, _, _ = map(np.asarray, score(params, batch_of(sampled_BTLk)))


def differing(chosen_BTLk, given_BTLk):
    """Share of the k chosen experts that are not among those given, BTL; NaN where none are given."""
    kept_BTLk = (chosen_BTLk[..., :, None] == given_BTLk[..., None, :]).any(axis=-1)
    given_BTL = real_BT[..., None] & (given_BTLk[..., 0] < E)
    return np.where(given_BTL, 1 - kept_BTLk.mean(axis=-1), np.nan)


difference_BTL = differing(live_BTLk, sampled_BTLk)
shown = 4  # rows
cells = np.concatenate(
    [difference_BTL[b].T for b in range(shown)]
)  # 4 layers of row 0, 4 of row 1, ...
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
routes.set_yticks(
    [4 * b + 1.5 for b in range(shown)], [f"row {b}\nlayers 0-3" for b in range(shown)]
)
for b in range(1, shown):
    routes.axhline(4 * b - 0.5, color="black", linewidth=1)
routes.set(
    title="Same weights: where sampler and scorer sample_token other experts",
    xlabel="token of the packed row",
)
figure.colorbar(
    image, ax=routes, label="share of a token's k experts", ticks=[0, 0.25, 0.5, 0.75, 1]
)
bins = np.geomspace(1e-4, 3, 45)
for (label, gap), colour in zip(gap_N.items(), (ORANGE, BLUE), strict=True):
    gaps.hist(
        gap.clip(1e-4),
        bins,
        histtype="step",
        linewidth=2,
        color=colour,
        label=f"{label}: mean {gap.mean():.4f}",
    )
gaps.set(xscale="log", yscale="log", ylim=(0.7, 2000), xlabel="nats", ylabel="tokens")
gaps.set_title("|log pi of sampler - log pi of scorer|")
gaps.legend(loc="upper left", fontsize=10)
plt.show()

# %% [markdown]
# (White: nothing was recorded, or padding.) Few routes differ, but where one does, the log-prob is off by up to a
# hundred times the rounding error. With the sampler's experts replayed (R3) that tail is gone; what is left is
# bfloat16. In float32 both agree to 1e-6, and no route differs here. A run logs this as `mismatch/mean` and, every
# `train.live_mismatch_every` steps, `mismatch/live_mean`.

# %%
print(
    "share of the routes that differ, by layer: ", np.nanmean(difference_BTL, axis=(0, 1)).round(4)
)
for label, gap in gap_N.items():
    print(
        f"{label:28s} mean {gap.mean():.4f}   99 % {np.quantile(gap, 0.99):.3f}   largest {gap.max():.3f} nats"
    )
live, replayed = gap_N.values()
assert (
    np.nanmean(difference_BTL) > 0
    and replayed.mean() < live.mean()
    and replayed.max() < 0.5 * live.max()
)

# %% [markdown]
# ## What is recorded
#
# The ids alone, in the smallest unsigned integer type that holds E: E itself means "not recorded". That is so on
# padding and on the last token of a completion, which the sampler drew but never passed through the model; nothing
# depends on where it goes. All other ids have to be there and to be k different experts, or an error says which are
# not.

# %%
print("expert ids", sampled_BTLk.shape, sampled_BTLk.dtype, "(rows, tokens, layers, k)")
large = Model(**PRESETS["qwen3-30b-a3b"])
print(
    f"memory per token: {routing_bytes(model)} bytes; of Qwen3-30B-A3B: {routing_bytes(large)} bytes"
)
not_recorded_BT = real_BT & (sampled_BTLk == E).all(axis=(2, 3))
print(
    f"real tokens without ids: {not_recorded_BT.sum()} of {real_BT.sum()}; completions: {len(rollout.length_B)}"
)
assert not_recorded_BT.sum() == len(rollout.length_B)


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
# The scoring pass records, the updates replay. At the same weights that changes nothing, to the bit. Then four updates
# of SAPO on this rollout (a toy reward: the share of even tokens); after each, the whole rollout is scored again, with
# the recorded experts and with live ones.

# %%
recorded_BTLk = check_expert_ids(live_BTLk, rows.arrays, model)
again_BT, _, _ = score(params, batch_of(recorded_BTLk))
np.testing.assert_array_equal(again_BT, live_logp_BT)

reward_PG = np.array([
    (tokens[:n] % 2 == 0).mean() for tokens, n in zip(rollout.tokens_BC, rollout.length_B, strict=True)
], np.float32).reshape(8, G)  # fmt: skip
adv_PG = advantages(reward_PG, np.ones((8, G), bool), Advantage())
whole = batch_of(recorded_BTLk, adv_BT=rows.spread(adv_PG.reshape(-1)), old_logp_BT=live_logp_BT)
cfg = Config(model=model)
LR = 5e-5
update = make_update(
    policy, optax.apply_if_finite(optax.adam(LR), 9), policy_loss(cfg), micro_batch=0
)
state = init_state(jax.tree.map(jnp.array, params), optax.apply_if_finite(optax.adam(LR), 9))

log_ratio, by_layer, logged = {"live routing": [], "R2 replayed": []}, [], []
for part in np.split(np.arange(len(real_BT)), 4):
    mini = jax.tree.map(lambda x, part=part: x[part], whole)
    weight_BT = token_weights(mini.mask_BT, mini.segment_ids_BT, "sequence_mean", C)
    state, aux = update(state, dataclasses.replace(mini, weight_BT=weight_BT))
    logged.append(router_metrics([jax.device_get(aux["routing"])], model))
    live_BT, _, chosen_BTLk = map(np.asarray, score(state.params, batch_of()))
    replay_BT = np.asarray(score(state.params, batch_of(recorded_BTLk))[0])
    by_layer.append(np.nanmean(differing(chosen_BTLk, recorded_BTLk), axis=(0, 1)))
    log_ratio["live routing"].append((live_BT - live_logp_BT)[mask_BT])
    log_ratio["R2 replayed"].append((replay_BT - live_logp_BT)[mask_BT])

figure, (layers, spread, last) = plt.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
updates = np.arange(5)
for layer, colour in enumerate(plt.get_cmap("viridis")(np.linspace(0.05, 0.85, L))):
    layers.plot(
        updates,
        [0, *np.array(by_layer)[:, layer]],
        "o-",
        color=colour,
        linewidth=2,
        label=f"layer {layer}",
    )
layers.set(
    title="Routes that differ from the recorded",
    xlabel="updates since",
    xticks=updates,
    ylim=(0, None),
)
layers.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %")
layers.legend(fontsize=10)
bins = np.linspace(-0.6, 0.6, 49)
for (label, z), colour in zip(log_ratio.items(), (ORANGE, BLUE), strict=True):
    spread.plot(updates, [0, *(x.std() for x in z)], "o-", color=colour, linewidth=2, label=label)
    last.hist(z[-1].clip(-0.6, 0.6), bins, histtype="step", linewidth=2, color=colour, label=label)
spread.set(
    title="Standard deviation of log r",
    xlabel="updates since",
    xticks=updates,
    ylim=(0, None),
    ylabel="nats",
)
spread.legend(fontsize=10)
last.set(title="log r after four updates", xlabel="log r", ylabel="tokens", yscale="log")
last.legend(fontsize=10)
plt.show()

# %% [markdown]
# Routes that flip add to the spread of log r, on tokens whose weights have hardly moved; replay takes that away. (With
# ten times larger steps the weights themselves do most of it, and replay changes little.) A run logs the share of
# routes that differ from inside the update: of its mini-batch's tokens, before the step. In the first update the
# weights are still those that recorded: what differs there is bfloat16, rounding otherwise in another program. In
# float32 it is 0.

# %%
for i, metrics in enumerate(logged, 1):
    print(
        f"update {i}: "
        + "  ".join(f"{name} {x:.4f}" for name, x in metrics.items() if "difference" in name)
    )
assert logged[0]["router/replay_difference_mean"] < by_layer[0].mean() < by_layer[-1].mean()
assert log_ratio["R2 replayed"][-1].std() < log_ratio["live routing"][-1].std()

# %% [markdown]
# ## The router still learns
#
# Given experts S, a token gets y = sum over e in S of g_e SwiGLU_e(x), with g the softmax of the *live* router logits
# over S. So the router has a gradient, through g. Is the layer of the package that, for experts which the router would
# not have chosen? Here is the plain computation: every expert on every token, float32.

# %%
layer_cfg = dataclasses.replace(model, compute_dtype="float32")
graphdef, weights = nnx.split(MoE(layer_cfg, rngs=nnx.Rngs(0)))
x_BTD = jnp.asarray(draw.normal(size=(2, 16, 64)), jnp.float32)
given_BTk = np.argsort(draw.random((2, 16, E)), axis=-1)[..., :k].astype(np.uint8)  # any k of them
towards_BTD = jnp.asarray(draw.normal(size=x_BTD.shape), jnp.float32)


def package(weights):
    y_BTD, routing = nnx.merge(graphdef, weights)(x_BTD, jnp.ones((2, 16), jnp.int32), given_BTk)
    return (y_BTD * towards_BTD).sum(), (y_BTD, routing)


def plain(weights):
    w = nnx.to_pure_dict(weights)
    in_S_BTE = jax.nn.one_hot(given_BTk, E).sum(axis=2) > 0
    g_BTE = jax.nn.softmax(jnp.where(in_S_BTE, x_BTD @ w["router"], -jnp.inf), axis=-1)
    gated = jax.nn.silu(jnp.einsum("btd,edf->btef", x_BTD, w["gate"])) * jnp.einsum(
        "btd,edf->btef", x_BTD, w["up"]
    )
    y_BTD = jnp.einsum("bte,btef,efd->btd", g_BTE, gated, w["down"])
    return (y_BTD * towards_BTD).sum(), y_BTD


(_, (ours_BTD, routing)), ours = jax.jit(jax.value_and_grad(package, has_aux=True))(weights)
(_, theirs_BTD), theirs = jax.jit(jax.value_and_grad(plain, has_aux=True))(weights)
np.testing.assert_allclose(ours_BTD, theirs_BTD, rtol=1e-4, atol=1e-5)
for (name, a), b in zip(
    nnx.to_pure_dict(ours).items(), nnx.to_pure_dict(theirs).values(), strict=True
):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    print(
        f"gradient of {name:7s} norm {np.linalg.norm(a):8.4f}   largest difference {np.abs(a - b).max():.1e}"
    )
share = float(routing.replay.difference / routing.replay.tokens)
print(f"{share:.0%} of the given experts are not the router's own choice")
assert np.linalg.norm(nnx.to_pure_dict(ours)["router"]) > 0.1

# %% [markdown]
# `tests/models/test_given_experts.py` shows the same for whole models against `transformers` with forced experts. What
# to use: `configs/quickstart_moe_{sapo,gspo,grpo_r2,grpo_r3}.yaml` are the four side by side for a tiny MoE.
