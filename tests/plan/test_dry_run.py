"""The dry run, against numbers worked out by hand."""

import pytest

from sapo_jax.config import PRESETS, Config, Data, Mesh, Model, Rollout, Train, load
from sapo_jax.config.schema import ColdStart, Evaluate, Loss
from sapo_jax.models.size import ParameterCount, parameter_count, routing_bytes
from sapo_jax.plan.dry_run import Flops, Memory, describe, flops, memory

TINY = Model(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4, intermediate_size=16,
    remat="none",
)  # fmt: skip
# per layer: q 64, k 32, v 32, o 64; q_norm, k_norm 8; norms 16; SwiGLU 384 -> 600. Table 10 * 8; final norm 8.


def test_parameters_of_tiny_models():
    assert parameter_count(TINY, 10) == ParameterCount(80 + 2 * 600 + 8, 1288, 80)
    untied = Model(**vars(TINY) | {"tie_word_embeddings": False, "qk_norm": False})
    assert parameter_count(untied, 10) == ParameterCount(160 + 2 * 592 + 8, 1352, 160)
    moe = Model(
        **vars(TINY) | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 2}
    )
    # router 32, expert 48: a layer is 216 + 32 + 4 * 48 = 440, of which 3 * 48 are idle
    assert parameter_count(moe, 10) == ParameterCount(80 + 2 * 440 + 8, 968 - 2 * 144, 80)


@pytest.mark.parametrize(
    ("preset", "total", "active", "without_embedding"),
    [  # Qwen3 model cards; 1.7B and below also to the parameter, as counted on the Hub
        ("qwen3-0.6b", 596_049_920, 596_049_920, 0.44e9),
        ("qwen3-1.7b", 1_720_574_976, 1_720_574_976, 1.4e9),
        ("qwen3-4b", 4_022_468_096, 4_022_468_096, 3.6e9),
        ("qwen3-8b", 8.19e9, 8.19e9, 6.95e9),
        ("qwen3-14b", 14.8e9, 14.8e9, 13.2e9),
        ("qwen3-32b", 32.8e9, 32.8e9, 31.2e9),
        ("qwen3-30b-a3b", 30.5e9, 3.3e9, 29.9e9),
        ("qwen3-235b-a22b", 235e9, 22e9, 234e9),
    ],
)
def test_presets_have_the_published_sizes(preset, total, active, without_embedding):
    count = parameter_count(Model(**PRESETS[preset]), PRESETS[preset]["vocab_size"])
    if isinstance(total, int):
        assert (count.total, count.active) == (total, active)
    assert count.total == pytest.approx(total, rel=0.005)
    assert count.active == pytest.approx(active, rel=0.02)  # published with two digits
    assert count.total - count.embedding == pytest.approx(without_embedding, rel=0.015)
    assert preset in PRESETS and len(PRESETS) == 8


def config(**sections) -> Config:
    """P = 2, G = 2, S = 3, C = 2, T = 5; two mini-batches."""
    defaults = {
        "model": TINY,
        "data": Data(max_prompt_tokens=3, held_out=2),
        "rollout": Rollout(prompts_per_step=2, group_size=2, max_new_tokens=2),
        "train": Train(mini_batches=2, steps=3),
        "evaluate": Evaluate(samples=1),
    }
    return Config(**defaults | sections)


def test_flops_by_hand():
    # 2 N' = 2 * (1288 - 80) = 2416, head 2 V D = 160, per key attended to 4 L H h = 64
    prefill = 2 * (3 * 2416 + 6 * 64)  # keys 1 + 2 + 3
    decode = 4 * (
        2 * (2416 + 160) + (3 + 4) * 64
    )  # the prompt's last token, then one more; they see 3 and 4 keys
    body, keys, head = 20 * 2416, 4 * 15 * 64, 16 * 160
    forward = body + keys + head
    assert flops(config(), 10) == Flops(prefill + decode, forward, 3 * forward + head)
    assert flops(config(), 10).total == prefill + decode + 4 * forward + head

    twice = config(
        train=Train(mini_batches=2, epochs=2, old_logp="sampler"), loss=Loss(kl="k3", kl_coef=0.1)
    )
    assert flops(twice, 10) == Flops(prefill + decode, forward, 2 * (3 * forward + head))

    def with_remat(remat: str) -> float:
        model = Model(**vars(TINY) | {"remat": remat})
        return flops(config(model=model), 10).update

    assert with_remat("dots") == 3 * forward + head + keys  # a short row: its attention is not kept
    assert with_remat("attention") == 4 * forward
    assert with_remat("full") == 4 * forward


def test_rows_that_are_not_short_keep_attention():
    """T = 40. Kept of a token and layer, float32: D 3 times, q, k and v, gate and up, and with them attention's output;
    no scores. A mini-batch is 2 rows."""
    long = {
        "data": Data(max_prompt_tokens=30, held_out=2),
        "rollout": Rollout(prompts_per_step=2, group_size=2, max_new_tokens=10),
    }

    def with_remat(remat: str) -> Config:
        return config(model=Model(**vars(TINY) | {"remat": remat}), **long)

    update = {
        remat: flops(with_remat(remat), 10).update
        for remat in ("none", "dots", "attention", "full")
    }
    body = 4 * 40 * 2416
    keys = 4 * 820 * 64
    assert update["dots"] == update["none"]
    assert (
        update["attention"] - update["none"] == body
        and update["full"] - update["none"] == body + keys
    )
    kept = {remat: memory(with_remat(remat), 10).activations for remat in update}
    layer = 80 * 4 * (32 + 36 + 48)
    assert kept == {
        "none": 2 * layer,
        "dots": 2 * 80 * 4 * (24 + 16 + 32 + 8) + layer,
        "attention": 2 * 80 * 4 * (8 + 8) + layer,
        "full": 2 * 80 * 4 * 8 + layer,
    }


def test_flops_count_active_experts_and_one_head():
    moe = Model(
        **vars(TINY) | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 2}
    )
    assert (
        flops(config(model=moe), 10).scoring == 20 * 2 * (968 - 288 - 80) + 4 * 15 * 64 + 16 * 160
    )
    forward = 20 * 1200 + 4 * 15 * 64 + 16 * 160
    again = 20 * 2 * 2 * (2 * 8 * 2)  # gate and up of one expert a layer
    dots = Model(**vars(moe) | {"remat": "dots"})
    assert flops(config(model=dots), 10).update == 3 * forward + again + 4 * 15 * 64 + 16 * 160
    untied = Model(**vars(TINY) | {"tie_word_embeddings": False})
    assert flops(config(model=untied), 10) == flops(
        config(), 10
    )  # the table is looked up, not multiplied


def test_memory_by_hand():
    m = memory(config(), 10)
    assert (m.parameters, m.moments, m.reference, m.gradients) == (4 * 1288, 8 * 1288, 0, 4 * 1288)
    # a mini-batch is 2 rows of 5; per token and layer (4 D + 3 (H + K) h + 3 F) float32, and 2 heads * 5 keys * 8 bytes
    layer = 10 * (4 * (32 + 36 + 48) + 80)
    assert m.activations == 2 * layer
    assert m.logits == 2 * 4 * 10 * 10
    assert (
        m.kv_cache == 4 * 4 * (2 * 2 * 1 * 4) * 4
    )  # 4 rows, T - 1 slots, k and v of 2 layers, float32
    assert m.decode_weights == 4 * 1288  # the head has a copy of the table
    assert m.update == 4 * 4 * 1288 + 2 * layer + 800 and m.peak == max(m.update, m.rollout)
    assert m.rollout == 3 * 4 * 1288 + 4 * 1288 + 1024


def test_memory_by_remat_dtype_and_batch():
    layer = 10 * (4 * (32 + 36 + 48) + 80)
    results = 10 * 4 * (24 + 16 + 32)

    def with_model(**keys) -> Memory:
        return memory(config(model=Model(**vars(TINY) | keys)), 10)

    assert with_model(remat="dots").activations == 2 * results + layer
    assert with_model(remat="full").activations == 2 * 10 * 4 * 8 + layer
    assert with_model(remat="attention").activations == 2 * 10 * 4 * 8 + layer
    moe = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 2}
    sparse = 10 * (4 * (32 + 16 + 36 + 6) + 80)
    results = 10 * 4 * (24 + 16)  # nothing of experts is kept with `dots`
    assert with_model(**moe).activations == 2 * sparse
    assert with_model(remat="dots", **moe).activations == 2 * results + sparse
    assert with_model(compute_dtype="bfloat16").activations == 2 * 10 * (2 * (32 + 36 + 48) + 60)
    assert with_model(compute_dtype="bfloat16").kv_cache == 512
    assert with_model(compute_dtype="bfloat16").parameters == 4 * 1288
    assert with_model(vocab_chunk=5).logits == 400
    micro = memory(config(train=Train(mini_batches=2, micro_batch=1)), 10)
    assert (
        micro.activations == layer and micro.gradients == 8 * 1288
    )  # half the rows, a second set of gradients
    assert memory(config(cold_start=ColdStart(steps=1, batch_size=4)), 10).activations == 4 * layer
    assert (
        memory(config(evaluate=Evaluate(samples=4)), 10).kv_cache == 2048
    )  # 2 held-out prompts * 4 samples
    assert memory(config(loss=Loss(kl="k3", kl_coef=0.1)), 10).reference == 4 * 1288


def test_experts_to_replay_by_hand(tmp_path):
    """4 sequences of 5 tokens, 3 sparse layers of 2 ids; 256 experts need two bytes, as E itself is an id."""
    sparse = {"num_hidden_layers": 4, "num_experts": 255, "mlp_only_layers": (0,)}

    def moe(**keys) -> Model:
        return Model(**vars(TINY) | sparse | keys)

    assert (routing_bytes(moe()), routing_bytes(moe(num_experts=256)), routing_bytes(TINY)) == (
        6,
        12,
        0,
    )
    assert routing_bytes(Model(**PRESETS["qwen3-30b-a3b"])) == 48 * 8

    def experts(**train):
        m = memory(config(model=moe(), train=Train(mini_batches=2, **train), mesh=Mesh(data=2)), 10)
        bare = memory(config(model=moe(), train=Train(mini_batches=2), mesh=Mesh(data=2)), 10)
        assert (
            m.update - bare.update == m.replayed_experts
            and m.rollout - bare.rollout == m.recorded_experts
        )
        return m.recorded_experts, m.replayed_experts

    assert experts() == (0, 0)
    assert experts(routing_replay="r2") == (0, 2 * 5 * 6 / 2)
    assert experts(routing_replay="r3", routing_on="device") == (4 * 5 * 6 / 2, 4 * 5 * 6 / 2)
    forward = flops(config(model=moe()), 10).scoring
    every = Train(mini_batches=2, routing_replay="r3", live_mismatch_every=4)
    assert flops(config(model=moe(), train=every), 10).scoring == 1.25 * forward

    path = tmp_path / "run.yaml"
    path.write_text("data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n")
    replay = ["model.num_experts=8", "train.routing_replay=r2"]
    line = (
        "#   experts to replay    8 B per token (4 layers x 2 ids of 1 B), 0.001 GiB, on the host\n"
    )
    assert line in describe(load(path, replay), 300)
    assert "experts to replay" not in describe(load(path, replay[:1]), 300)


def test_memory_is_split_over_the_mesh():
    moe = Model(
        **vars(TINY) | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 2}
    )
    assert memory(config(model=moe, mesh=Mesh(expert=2)), 10).parameters == 4 * (
        968 - 384 + 384 / 2
    )
    whole = memory(config(), 10)
    split = memory(config(mesh=Mesh(data=1, fsdp=2)), 10)
    assert split.parameters == whole.parameters / 2
    assert split.activations == whole.activations / 2
    assert split.kv_cache == whole.kv_cache / 2
    tensor = memory(config(mesh=Mesh(tensor=2)), 10)
    assert (
        tensor.activations == 2 * 10 * (4 * (32 + 18 + 24) + 40)
        and tensor.parameters == whole.parameters / 2
    )


def test_describe_is_the_resolved_config_and_its_figures(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n")
    cfg = load(path, ["model.preset=qwen3-0.6b", "train.mini_batches=1", "mesh.fsdp=2"])
    text = describe(cfg, 300)
    (tmp_path / "again.yaml").write_text(text)  # the figures are YAML comments
    assert load(tmp_path / "again.yaml") == cfg
    figures = [" ".join(line.split()) for line in text.splitlines() if line.startswith("#   ")]
    for figure in (
        "# total 596 M",
        "# embedding and head 156 M (vocabulary 151936)",
        "# prompts 32 x 256 = 8.19 k tokens",
        "# completions 32 x 8 x 64 = 16.4 k tokens",
        "# optimiser steps 1 on 256 sequences each",
        "# parameters 1.110 GiB",  # 4 * 596 M / 2
        "# RL steps 100",
        "# optimiser steps 100 (and 0 of cold start)",
        "# completions 25.6 k, at most 1.64 M tokens",
    ):
        assert figure in figures
    assert "fsdp 2, data: all that are left, counted as 1" in text
    assert "# warnings: 2" in text and "a tau sweep would be a no-op" in text
    assert "(vocabulary 300)" in describe(load(path), 300)
