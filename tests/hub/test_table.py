"""The weight table both ways, for random small models."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.config import Mesh, Model
from sapo_jax.distributed import sharding
from sapo_jax.hub.table import dim_sizes, hub_params, hub_shapes, tensor_kinds
from sapo_jax.hub.weights import WeightFiles, hub_tensors, load_params
from sapo_jax.hub.writer import write_shards
from sapo_jax.models import make_policy

FLOAT32 = np.dtype(np.float32)
MESH = sharding.make_mesh(Mesh(), jax.devices()[:1])


@st.composite
def models(draw) -> Model:
    """Dense, sparse and mixed models, with every optional tensor present or absent."""
    num_layers = draw(st.integers(1, 5))
    kv_heads = draw(st.integers(1, 2))
    num_experts = draw(st.sampled_from([0, 0, 2, 3]))
    return Model(
        vocab_size=draw(st.integers(1, 9)),
        hidden_size=draw(st.integers(1, 7)),
        num_hidden_layers=num_layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 6)),
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=num_experts,
        num_experts_per_tok=1,
        moe_intermediate_size=draw(st.integers(1, 5)),
        decoder_sparse_step=draw(st.integers(1, 2)),
        mlp_only_layers=tuple(sorted(draw(st.sets(st.integers(0, num_layers - 1), max_size=2)))),
    )


def random_params(cfg: Model, seed: int):
    """Parameters in which no number is there twice, so that every mistake of order shows."""
    shapes = make_policy(cfg).shapes
    count = sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))
    numbers = iter(np.random.default_rng(seed).permutation(count).astype(np.float32))
    return jax.tree.map(
        lambda shape: np.fromiter(numbers, np.float32, math.prod(shape.shape)).reshape(shape.shape),
        shapes,
    )


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(0, 99))
def test_names_shapes_and_values_of_every_tensor(cfg, seed):
    """Each number of the parameters is in one tensor, whose shape is the announced one."""
    params = random_params(cfg, seed)
    shapes = hub_shapes(cfg)
    tensors = list(hub_tensors(params, cfg, FLOAT32))
    assert len(tensors) == len(shapes) == len(list(tensor_kinds(cfg)))
    assert [tensor.shape for tensor in tensors] == list(shapes.values())
    numbers = np.concatenate([tensor.ravel() for tensor in tensors])
    expected = np.concatenate([array.ravel() for array in jax.tree.leaves(params)])
    np.testing.assert_array_equal(np.sort(numbers), np.sort(expected))

    per_layer = len([name for name in shapes if name.startswith("model.layers.0.")])
    sparse = cfg.sparse_layers[0]
    mlp_tensors = 1 + 3 * cfg.num_experts if sparse else 3
    assert per_layer == 6 + 4 * cfg.attention_bias + 2 * cfg.qk_norm + mlp_tensors
    assert ("lm_head.weight" in shapes) == (not cfg.tie_word_embeddings)


@settings(max_examples=100, deadline=None)
@given(models(), st.data())
def test_a_tensor_there_and_back(cfg, data):
    sizes = dim_sizes(cfg)
    param = data.draw(st.sampled_from(hub_params(cfg)))
    shape = param.kind.hub_shape(sizes)
    tensor = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    ours = param.kind.to_param(tensor, sizes)
    assert ours.shape == tuple(sizes[dim] for dim in param.kind.param_dims.split())
    np.testing.assert_array_equal(param.kind.to_hub(ours, sizes), tensor)


@settings(max_examples=30, deadline=None)
@given(models(), st.integers(0, 99), st.data())
def test_a_part_that_is_read_is_that_part_of_the_whole(cfg, seed, data):
    """Whatever is cut out of a tensor by our dims, `read` finds it in the file."""
    sizes = dim_sizes(cfg)
    with tempfile.TemporaryDirectory() as folder:
        tensors = hub_tensors(random_params(cfg, seed), cfg, FLOAT32)
        write_shards(Path(folder), hub_shapes(cfg), FLOAT32, tensors, max_bytes=400)
        files = WeightFiles(folder, cfg)
        name, kind = data.draw(st.sampled_from(list(tensor_kinds(cfg))))
        # Only the outer dim of a dim like (H h) may be cut: no rule of the sharding table cuts h.
        cuts = {}
        for outer_dim, *_ in kind.hub_dim_groups():
            start = data.draw(st.integers(0, sizes[outer_dim] - 1))
            cuts[outer_dim] = slice(start, data.draw(st.integers(start + 1, sizes[outer_dim])))
        with files:
            whole = files.read(kind, name, {})
            part = files.read(kind, name, cuts)
        index = tuple(cuts.get(dim, slice(None)) for dim in kind.param_dims.split())
        np.testing.assert_array_equal(part, whole[index])


@settings(max_examples=6, deadline=None)
@given(models(), st.integers(0, 99), st.sampled_from([300, 2**40]))
def test_written_and_loaded_again_is_bit_equal(cfg, seed, max_bytes):
    params = random_params(cfg, seed)
    with tempfile.TemporaryDirectory() as folder:
        tensors = hub_tensors(params, cfg, FLOAT32)
        write_shards(Path(folder), hub_shapes(cfg), FLOAT32, tensors, max_bytes)
        loaded = load_params(folder, make_policy(cfg), MESH)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_every_kind_names_the_same_dims_on_both_sides():
    cfg = Model(num_experts=2, attention_bias=True, tie_word_embeddings=False, mlp_only_layers=(0,))
    kinds = {kind for _, kind in tensor_kinds(cfg)}
    assert len(kinds) == 22  # all rows of the table
    for kind in kinds:
        hub_dims = [dim for group in kind.hub_dim_groups() for dim in group]
        assert sorted(hub_dims) == sorted(kind.param_dims.split()), kind
    with pytest.raises(KeyError):  # a size that is not given is not guessed
        next(iter(kinds)).hub_shape({})
