"""What a policy is made of: shapes, logical axes, initial values; and what can be imported without
JAX."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.config import PRESETS, Model
from sapo_jax.distributed import sharding
from sapo_jax.models import make_policy
from sapo_jax.models.size import parameter_count
from tests.models import tiny

VARIANTS = {
    "dense": {},
    "untied": dict(tie_word_embeddings=False),
    "no-qk-norm": dict(qk_norm=False, num_key_value_heads=1),
    "wide-heads": dict(head_dim=12, num_key_value_heads=4),
    "one-layer": dict(num_hidden_layers=1),
    "mixed": dict(
        num_hidden_layers=5, mlp_only_layers=(3,), decoder_sparse_step=2, attention_bias=True
    ),
}
MODELS = {
    f"{kind}-{name}": dataclasses.replace(cfg, **changes)
    for kind, cfg in tiny.MODELS.items()
    for name, changes in VARIANTS.items()
}


def total(shapes) -> int:
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_real_number(name):
    cfg = MODELS[name]
    shapes = make_policy(cfg).shapes
    count = parameter_count(cfg, cfg.vocab_size)
    assert count.total == total(shapes)
    assert count.embedding == total([shapes["embed"], shapes.get("head", ())])
    idle_share = 1 - cfg.num_experts_per_tok / cfg.num_experts if cfg.num_experts else 0
    sparse = [run["mlp"] for run in shapes["layers"].values() if "router" in run["mlp"]]
    experts = [x for mlp in sparse for key, x in mlp.items() if key != "router"]
    assert count.active == total(shapes) - round(idle_share * total(experts))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_traced_without_memory(preset):
    """A 235 B model is made abstractly: nothing is allocated."""
    cfg = Model(**PRESETS[preset])
    assert total(make_policy(cfg).shapes) == parameter_count(cfg, cfg.vocab_size).total


@pytest.mark.parametrize("name", MODELS)
def test_every_dim_of_every_parameter_has_a_name(name):
    policy = make_policy(MODELS[name])
    known = {*sharding.RULES, "layers", None}
    flat_axes = jax.tree.leaves_with_path(
        policy.logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    flat_shapes = jax.tree.leaves_with_path(policy.shapes)
    for (path, axes), (same_path, x) in zip(flat_axes, flat_shapes, strict=True):
        key = jax.tree_util.keystr(path)
        assert path == same_path and len(axes) == x.ndim and set(axes) <= known, key
        assert (axes[0] == "layers") == ("layers" in key)


def test_initial_values():
    """float32; N(0, initializer_range^2), other numbers in every layer; norms are 1; the key decides."""
    cfg = dataclasses.replace(
        MODELS["moe-untied"],
        hidden_size=64,
        initializer_range=0.05,
        num_hidden_layers=4,
        mlp_only_layers=(0,),
        attention_bias=True,
    )
    policy = make_policy(cfg)
    init = tiny.quick_jit(policy.init)
    params = jax.device_get(init(jax.random.key(3)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, policy.shapes)
    for path, x in jax.tree.leaves_with_path(params):
        key = jax.tree_util.keystr(path)
        assert x.dtype == jnp.float32
        if "bias" in key:
            np.testing.assert_array_equal(x, 0)
            continue
        if "scale" in key:
            np.testing.assert_array_equal(x, 1)
            continue
        assert abs(float(x.std()) / 0.05 - 1) < 5 / np.sqrt(2 * x.size), key
        assert abs(float(x.mean())) < 5 * 0.05 / np.sqrt(x.size), key
        if "layers" in key:
            assert len(x) == 1 or not np.any(x[0] == x[1]), key
    chex.assert_trees_all_equal(params, init(jax.random.key(3)))
    assert not np.any(params["embed"] == np.asarray(init(jax.random.key(4))["embed"]))
    assert not np.any(params["embed"] == params["head"])


@pytest.mark.parametrize("name", ["dense-untied", "moe-dense", "dense-no-qk-norm"])
def test_bind_gives_the_arrays_back_and_leaves_the_template_alone(name):
    policy = make_policy(MODELS[name])
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).standard_normal(x.shape, np.float32), policy.shapes
    )
    other = jax.tree.map(lambda x: x + 1, params)
    model = policy.bind(params)
    second = policy.bind(other)
    np.testing.assert_array_equal(
        model.layers[0].attention.q[...], params["layers"][0]["attention"]["q"]
    )
    np.testing.assert_array_equal(second.embed[...], other["embed"])
    np.testing.assert_array_equal(model.embed[...], params["embed"])
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(policy.state))


def test_a_policy_needs_a_vocabulary():
    with pytest.raises(ValueError, match="model.vocab_size is 0"):
        make_policy(Model())
