"""The model against Hugging Face's, from the rotary angles up to the gradients of a SAPO loss. float32."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from sapo_jax.batch import Batch
from sapo_jax.config import SAPO, Config, Model, Rollout, Yarn
from sapo_jax.learner.update import policy_loss
from sapo_jax.models import make_policy
from sapo_jax.models.moe import _routing_statistics
from sapo_jax.models.rope import frequencies, rotation_at
from sapo_jax.rollout import pad_sequences
from tests.models.tiny import quick_jit
from tests.references import hf
from tests.references.objectives_torch import mean_over_sequences_of_token_means, sapo_terms

BASE = Model(
    vocab_size=29,
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=28,
    rope_theta=1e4,
    vocab_chunk=12,
)
MOE = dataclasses.replace(BASE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=10)
YARN = Yarn(factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)
CASES = {
    "qwen3": BASE,
    "qwen3-untied-mha-yarn": dataclasses.replace(
        BASE,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        rope_theta=1e6,
        rope_scaling=YARN,
        rms_norm_eps=1e-3,
    ),
    "llama-mqa": dataclasses.replace(
        BASE, qk_norm=False, num_key_value_heads=1, head_dim=10, tie_word_embeddings=False
    ),
    "moe": dataclasses.replace(MOE, tie_word_embeddings=False),
    "qwen3-bias": dataclasses.replace(BASE, attention_bias=True),
    "llama-bias-wide-heads": dataclasses.replace(
        BASE, qk_norm=False, attention_bias=True, head_dim=14
    ),
    "moe-sparse-step": dataclasses.replace(
        MOE, decoder_sparse_step=2, num_hidden_layers=4, attention_bias=True
    ),
    "moe-mlp-only": dataclasses.replace(MOE, mlp_only_layers=(1,), tie_word_embeddings=False),
    "moe-unnormalised-yarn": dataclasses.replace(
        MOE, norm_topk_prob=False, rope_scaling=YARN, num_experts_per_tok=2
    ),
}
STAGES = (
    "embed",
    "attention_norm",
    "q",
    "k",
    "v",
    "attention",
    "mlp_norm",
    "mlp",
    "block",
    "stack",
    "logits",
)
each_case = pytest.mark.parametrize("name", CASES)
LENGTHS = (13, 16, 9)
PROMPT_LENGTHS = (6, 4, 8)
ADVANTAGES = (1.3, -0.7, -1.1)
TAUS = dict(tau_pos=0.8, tau_neg=1.7)


# ---------------------------------------------------------------- rotary angles


@pytest.mark.parametrize(
    ("head_dim", "theta", "yarn"),
    [
        (8, 1e4, None),
        (128, 1e6, None),
        (128, 1e6, Yarn()),
        (
            128,
            1e6,
            Yarn(factor=2.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0),
        ),
        (64, 5e5, Yarn(factor=8.0, attention_factor=1.25)),
        (16, 1e4, Yarn(factor=32.0, original_max_position_embeddings=64)),
        (32, 1e4, Yarn(factor=1.0)),
        # An empty ramp
        (8, 1e4, Yarn(factor=4.0, original_max_position_embeddings=200, beta_fast=1.0)),
    ],
)
def test_rotary_angles(head_dim, theta, yarn):
    cfg = dataclasses.replace(BASE, head_dim=head_dim, rope_theta=theta, rope_scaling=yarn)
    reference = Qwen3RotaryEmbedding(hf.config(cfg))
    inv_freq, factor = frequencies(head_dim, theta, yarn)
    np.testing.assert_allclose(inv_freq, reference.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(reference.attention_scaling, rel=1e-12)

    positions_BT = np.array([[0, 1, 2, 7, 30], [5, 4, 3, 0, 0]], np.int32)
    cos_BTh, sin_BTh = (x.numpy() for x in reference(torch.zeros(1), torch.tensor(positions_BT)))
    ours = quick_jit(lambda positions_BT: rotation_at(positions_BT, head_dim, theta, yarn))(
        positions_BT
    )
    for ours_BT1h, theirs_BTh in ((ours.cos, cos_BTh), (ours.sin, sin_BTh)):
        assert ours_BT1h.dtype == jnp.float32
        ours_BTh = np.tile(np.asarray(ours_BT1h)[:, :, 0], 2)
        np.testing.assert_allclose(ours_BTh, theirs_BTh, atol=1e-5)


# ---------------------------------------------------------------- values, from the bottom up


@functools.cache
def hugging_face(name: str):
    return hf.model(CASES[name], seed=1)


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    sequences = [
        (rng.integers(0, BASE.vocab_size, length).tolist(), prompt_length)
        for length, prompt_length in zip(LENGTHS, PROMPT_LENGTHS, strict=True)
    ]
    return pad_sequences(sequences, pad_id=0)


@functools.cache
def stages(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{stage: (ours, theirs)} on the real tokens; each stage of a block starts from the same input,
    Hugging Face's."""
    theirs = their_stages(name)
    policy = make_policy(CASES[name])
    params = hf.params(hugging_face(name).state_dict(), CASES[name])
    inputs = (theirs[stage] for stage in ("embed", "attention_norm", "mlp_norm"))
    ours = quick_jit(functools.partial(our_stages, policy))(params, *inputs)
    assert ours.keys() == theirs.keys()
    real_BT = rows()["segment_ids_BT"] > 0
    return {stage: (np.asarray(ours[stage])[real_BT], theirs[stage][real_BT]) for stage in theirs}


def studied(cfg: Model) -> int:
    """The layer whose parts are compared: the first with experts, if there is one."""
    return cfg.sparse_layers.index(True) if any(cfg.sparse_layers) else 0


def our_stages(policy, params, x_BTD, normed_BTD, mlp_input_BTD) -> dict[str, jax.Array]:
    names = ("tokens_BT", "positions_BT", "segment_ids_BT", "prefix_ids_BT")
    tokens, positions, segments, prefixes = (rows()[name] for name in names)
    model = policy.bind(params)
    embed_BTD = model.embedded(tokens)
    rotation = model.rotation(positions)
    block = model.blocks()[studied(policy.cfg)]
    q, k, v = block.attention.project(normed_BTD, rotation)
    attended_BTD, _ = block.attention(normed_BTD, rotation, positions, segments, prefixes)
    outputs = {
        "embed": embed_BTD,
        "attention_norm": block.attention_norm(x_BTD),
        "q": q,
        "k": k,
        "v": v,
        "attention": attended_BTD,
        "mlp_norm": block.mlp_norm(x_BTD + attended_BTD),
    }
    if block.sparse:
        outputs["mlp"], routing = block.mlp(mlp_input_BTD, segments)
        outputs["expert_ids"] = routing.expert_ids_BTk
    else:
        outputs["mlp"] = block.mlp(mlp_input_BTD)
    outputs["block"], _, _ = block(x_BTD, rotation, positions, segments, prefixes)
    hidden_BTD = model.forward(tokens, positions, segments, prefixes).hidden_BTD
    outputs["stack"] = hidden_BTD
    outputs["logits"] = model.logits(hidden_BTD)
    return outputs


@torch.no_grad()
def their_stages(name: str) -> dict[str, np.ndarray]:
    model = hugging_face(name)
    cfg = CASES[name]
    tokens, positions, segments = (
        torch.tensor(rows()[n]) for n in ("tokens_BT", "positions_BT", "segment_ids_BT")
    )
    layer = model.model.layers[studied(cfg)]
    B, T = tokens.shape
    x = model.model.embed_tokens(tokens)
    cos, sin = model.model.rotary_emb(x, positions)
    normed = layer.input_layernorm(x)
    attention = layer.self_attn
    no_norm = torch.nn.Identity()
    q, k, v = (getattr(attention, f"{n}_proj")(normed).view(B, T, -1, cfg.head_dim) for n in "qkv")
    q = getattr(attention, "q_norm", no_norm)(q)
    k = getattr(attention, "k_norm", no_norm)(k)
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    causal = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
    causal = causal[None, None].expand(B, 1, T, T)
    attended, _ = attention(normed, position_embeddings=(cos, sin), attention_mask=causal)
    mlp_norm = layer.post_attention_layernorm(x + attended)
    outputs = {
        "embed": x,
        "attention_norm": normed,
        "q": q,
        "k": k,
        "v": v,
        "attention": attended,
        "mlp_norm": mlp_norm,
    }
    if cfg.num_experts:
        outputs["expert_ids"] = layer.mlp.gate(mlp_norm)[2].view(B, T, -1)
    outputs["mlp"] = layer.mlp(mlp_norm)
    outputs["block"] = layer(x, position_embeddings=(cos, sin), attention_mask=causal)
    out = model(tokens, attention_mask=(segments > 0).long(), output_hidden_states=True)
    outputs["stack"] = out.hidden_states[-1]
    outputs["logits"] = out.logits
    return {stage: x.numpy() for stage, x in outputs.items()}


@each_case
@pytest.mark.parametrize("stage", STAGES)
def test_values(name, stage):
    ours, theirs = stages(name)[stage]
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < 1e-5


@each_case
def test_router_choice(name):
    """The k experts, best first. (Their gate weights are in the `mlp` stage.)"""
    if CASES[name].num_experts == 0:
        assert "expert_ids" not in stages(name)
        return
    ours, theirs = stages(name)["expert_ids"]
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)
    every_expert = set(range(CASES[name].num_experts))
    assert set(theirs.flatten()) == every_expert  # each has something to do


@pytest.mark.parametrize(("E", "k"), [(6, 2), (256, 2), (300, 3)])
def test_router_statistics(E, k):
    """The aux loss is Hugging Face's over k (whose loads sum to k); padding does not count; ids have
    a small dtype."""
    logits_BTE = np.random.default_rng(0).normal(0, 2, (3, 7, E)).astype(np.float32)
    segments_BT = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int32)

    @quick_jit
    def routed(logits_BTE):
        prob_BTE = jax.nn.softmax(logits_BTE)
        ids_BTk = jax.lax.top_k(prob_BTE, k)[1]
        return ids_BTk, _routing_statistics(ids_BTk, prob_BTE, segments_BT > 0)

    ids_BTk, routing = jax.device_get(routed(logits_BTE))
    theirs = load_balancing_loss_func(
        (torch.tensor(logits_BTE).reshape(-1, E),), E, k, torch.tensor(segments_BT)
    )
    assert routing.aux_loss == pytest.approx(theirs.item() / k, rel=1e-5)
    counts_E = np.bincount(ids_BTk[segments_BT > 0].flatten(), minlength=E)
    np.testing.assert_allclose(routing.load_E, counts_E / (12 * k), rtol=1e-6)
    # The dtype holds E, "not recorded", too.
    assert routing.expert_ids_BTk.dtype == (np.uint8 if E < 256 else np.uint16)
    np.testing.assert_array_equal(routing.expert_ids_BTk, ids_BTk)


# ---------------------------------------------------------------- gradients


def torch_gradients(name: str, drift: list[np.ndarray]) -> tuple[float, dict, list[np.ndarray]]:
    """Loss and gradients of SAPO on the completions, from the paper's formula; and the old
    log-probs, log pi + drift."""
    model = hugging_face(name)
    tokens = torch.tensor(rows()["tokens_BT"])
    is_token = torch.tensor(rows()["segment_ids_BT"] > 0)
    logp_BTV = model(tokens, attention_mask=is_token).logits.log_softmax(-1)
    logp = []
    for b, (prompt_length, length) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
        t = torch.arange(prompt_length, length)
        logp.append(logp_BTV[b, t - 1, tokens[b, t].long()])
    old_logp = [
        x.detach() + torch.tensor(d, dtype=torch.float32) for x, d in zip(logp, drift, strict=True)
    ]
    terms = sapo_terms(logp, old_logp, list(ADVANTAGES), **TAUS)
    loss = -mean_over_sequences_of_token_means(terms)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    gradients = dict(zip(parameters, gradients, strict=True))
    return loss.item(), hf.params(gradients, CASES[name]), [x.numpy() for x in old_logp]


@each_case
def test_gradients_of_every_parameter(name):
    """Of a SAPO loss whose ratios have drifted. Relative error by norm < 1e-4 for each tensor and
    layer."""
    assert_same_gradients(name)


def assert_same_gradients(name: str, expert_ids_BTLk: np.ndarray | None = None) -> None:
    rng = np.random.default_rng(3)
    drift = [rng.normal(0, 0.5, n - p) for n, p in zip(LENGTHS, PROMPT_LENGTHS, strict=True)]
    value, expected, old_logp = torch_gradients(name, drift)

    token_rows = rows()
    mask_BT = token_rows["mask_BT"]
    old_logp_BT = np.zeros(mask_BT.shape, np.float32)
    old_logp_BT[mask_BT] = np.concatenate(old_logp)
    adv_BT = np.broadcast_to(np.array(ADVANTAGES, np.float32)[:, None], mask_BT.shape)
    completion_length_B1 = mask_BT.sum(axis=1, keepdims=True)
    weight_BT = np.where(mask_BT, 1 / (len(ADVANTAGES) * completion_length_B1), 0)
    weight_BT = weight_BT.astype(np.float32)
    batch = Batch(
        **token_rows,
        adv_BT=adv_BT,
        weight_BT=weight_BT,
        old_logp_BT=old_logp_BT,
        expert_ids_BTLk=expert_ids_BTLk,
    )

    cfg = Config(model=CASES[name], objective=SAPO(**TAUS), rollout=Rollout(temperature=1.0))
    policy = make_policy(cfg.model)
    loss = policy_loss(cfg)
    params = hf.params(hugging_face(name).state_dict(), CASES[name])

    def loss_value(params):
        value, _ = loss(policy.bind(params), batch)
        return value

    ours, gradients = jax.device_get(quick_jit(jax.value_and_grad(loss_value))(params))

    assert ours == pytest.approx(value, abs=1e-5)
    for (path, theirs), gradient in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(gradients), strict=True
    ):
        key = jax.tree_util.keystr(path)
        layers = zip(theirs, gradient, strict=True) if "layers" in key else [(theirs, gradient)]
        for i, (reference, x) in enumerate(layers):
            norm = np.linalg.norm(reference)
            assert norm > 1e-4, f"{key}: no gradient to compare"
            assert np.linalg.norm(x - reference) / norm < 1e-4, f"{key}, layer {i}"
