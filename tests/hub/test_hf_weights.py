"""Weights to and from Hugging Face directories: bit-equal both ways, on any mesh, and every damage
told by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from sapo_jax.config import ConfigError, Mesh, Model, Yarn, load, read_model_keys, to_hugging_face
from sapo_jax.distributed import sharding
from sapo_jax.errors import ModelDirError
from sapo_jax.hub.table import hub_shapes
from sapo_jax.hub.weights import WeightFiles, check_weights, hub_tensors, load_params
from sapo_jax.hub.writer import INDEX, new_model_dir, write_json, write_shards
from sapo_jax.models import make_policy
from tests.models.test_hf_parity import CASES
from tests.references import hf

each_case = pytest.mark.parametrize("name", CASES)
MESH = sharding.make_mesh(Mesh(), jax.devices()[:1])


@functools.cache
def hugging_face(name: str):
    return hf.model(CASES[name], seed=5)


def saved(name: str, folder: Path, **kwargs) -> Path:
    hugging_face(name).save_pretrained(folder, **kwargs)
    return folder


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def load_case(name: str, folder: Path):
    return load_params(folder, make_policy(CASES[name]), MESH)


# ---------------------------------------------------------------- config.json


@each_case
def test_the_config_is_read_as_it_was_meant(name, tmp_path):
    """transformers 5's layout, and the hub's, which we write."""
    cfg = CASES[name]
    hf.config(cfg).save_pretrained(tmp_path)
    (tmp_path / "ours").mkdir()
    write_json(tmp_path / "ours" / "config.json", to_hugging_face(cfg))
    for folder in (tmp_path, tmp_path / "ours"):
        keys = read_model_keys(folder)
        scaling = keys.pop("rope_scaling")
        assert (None if scaling is None else Yarn(**scaling)) == cfg.rope_scaling
        for key, value in keys.items():
            ours = getattr(cfg, key)
            assert value == (list(ours) if isinstance(ours, tuple) else ours), key


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path):
    write_json(tmp_path / "config.json", {
        "model_type": "llama", "vocab_size": 7, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 8,
    })  # fmt: skip
    keys = read_model_keys(tmp_path)
    expected = {
        "num_key_value_heads": 4,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        "qk_norm": False,
    }
    assert {key: keys[key] for key in expected} == expected


BAD_CONFIGS = {
    "no model_type": (
        {"model_type": None},
        ["model_type null is not supported; supported are qwen3, qwen3_moe, llama"],
    ),
    "unknown family": ({"model_type": "gpt2"}, ["model_type 'gpt2' is not supported"]),
    "several": (
        {"vocab_size": None, "hidden_act": "gelu", "use_sliding_window": True},
        [
            "vocab_size is missing",
            "hidden_act 'gelu' is not supported",
            "use_sliding_window true is not supported",
        ],
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "sliding layers": ({"layer_types": ["sliding_attention"]}, ["sliding_attention"]),
    "llama3 rope": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
        ["'llama3' is not supported"],
    ),
    "odd yarn": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}},
        ["mscale"],
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_we_cannot_honour_is_refused(case, tmp_path):
    changes, messages = BAD_CONFIGS[case]
    hf.config(CASES["qwen3"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelDirError) as error:
        read_model_keys(tmp_path)
    assert all(message in str(error.value) for message in messages)
    assert len(error.value.problems) == len(messages)


def test_experts_without_qk_norm_have_no_family():
    with pytest.raises(ValueError, match="without qk_norm"):
        to_hugging_face(dataclasses.replace(CASES["moe"], qk_norm=False))


def test_model_path_brings_shape_tokenizer_and_template(tmp_path):
    """Keys beside `path` win; a directory that cannot be used is one problem, told with the key."""
    saved("qwen3-untied-mha-yarn", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(
        "{}"
    )  # it is not read to load a configuration
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    path = tmp_path / "run.yaml"
    task = "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}"
    path.write_text(
        f"model: {{path: {tmp_path}/model, remat: full, rms_norm_eps: 1.0e-5}}\n{task}\n"
    )
    cfg = load(path)
    case = CASES["qwen3-untied-mha-yarn"]
    assert cfg.model == dataclasses.replace(
        case,
        path=f"{tmp_path}/model",
        remat="full",
        rms_norm_eps=1e-5,
        vocab_chunk=Model().vocab_chunk,
    )
    assert (cfg.data.tokenizer, cfg.data.chat_template) == (f"{tmp_path}/model", "auto")
    assert (
        load(
            path,
            [f"model.path={tmp_path}/model", "data.tokenizer=byte", "data.chat_template=plain"],
        ).data.tokenizer
        == "byte"
    )
    path.write_text(f"model: {{path: nowhere}}\n{task}\n")
    assert (
        load(path, [f"model.path={tmp_path}/model"]).model.vocab_size == case.vocab_size
    )  # overruled: never read
    with pytest.raises(ConfigError) as error:
        load(path, [f"model.path={tmp_path}/nowhere", "train.stepz=3"])
    assert (
        "model.path: " in str(error.value)
        and "no config.json" in str(error.value)
        and "stepz" in str(error.value)
    )


# ---------------------------------------------------------------- in and out


@each_case
def test_loading_gives_the_tensors_bit_for_bit(name, tmp_path):
    params = load_case(name, saved(name, tmp_path))
    expected = hf.params(hugging_face(name).state_dict(), CASES[name])
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    def as_expected(array, shape):
        return array.dtype == np.float32 and array.shape == shape.shape

    assert jax.tree.all(jax.tree.map(as_expected, params, make_policy(CASES[name]).shapes))


@each_case
@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_round_trip_is_bit_equal(name, shard_size, tmp_path):
    """Their directory -> our parameters -> our directory: the same tensors, which transformers
    loads.
    """
    original = saved(name, tmp_path / "theirs", max_shard_size=shard_size)
    assert (original / INDEX).exists() == (shard_size == "10KB")
    params = load_case(name, original)
    float32 = np.dtype(np.float32)
    max_bytes = 2**40 if shard_size == "5GB" else 10_000
    with new_model_dir(tmp_path / "ours") as folder:
        tensors = hub_tensors(params, CASES[name], float32)
        write_shards(folder, hub_shapes(CASES[name]), float32, tensors, max_bytes)
        write_json(folder / "config.json", to_hugging_face(CASES[name]))
    again = load_case(name, tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    ours = all_tensors(tmp_path / "ours")
    theirs = all_tensors(original)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, **eager)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        np.testing.assert_array_equal(model(tokens).logits, hugging_face(name)(tokens).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_survives_the_round_trip(dtype, tmp_path):
    """Loaded into float32 exactly, written back exactly; numbers beyond the range of float16 are
    refused.
    """
    model = hf.model(CASES["moe"], seed=5).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    params = load_case("moe", tmp_path / "theirs")
    with new_model_dir(tmp_path / "ours") as folder:
        tensors = hub_tensors(params, CASES["moe"], jnp.dtype(dtype))
        write_shards(folder, hub_shapes(CASES["moe"]), jnp.dtype(dtype), tensors)
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype == np.dtype(ours[key].dtype)
        np.testing.assert_array_equal(ours[key].astype(np.float32), theirs[key].astype(np.float32))
    if dtype == "float16":
        params["norm"]["scale"] = params["norm"]["scale"] * 1e6
        with pytest.raises(ValueError, match="tensor model.norm.weight .* range of float16"):
            list(hub_tensors(params, CASES["moe"], np.dtype(np.float16)))


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_model_dir(tmp_path / "a" / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"), new_model_dir(tmp_path / "full"):
        raise AssertionError("never entered")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- damage


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_no_file_stays_mapped_after_a_tensor_is_placed(tmp_path, monkeypatch):
    """Else all weights that were read would be resident, beside the parameters."""
    folder = saved("qwen3", tmp_path / "model")
    before = []

    def mapped():
        return str(folder) in Path("/proc/self/maps").read_text()

    read = WeightFiles.read

    def watched(self, *args):
        before.append(mapped())
        found = read(self, *args)
        assert mapped()
        return found

    monkeypatch.setattr(WeightFiles, "read", watched)
    load_case("qwen3", folder)
    assert len(before) > 10 and not any(before)


def test_a_file_that_vanishes_while_it_is_read_is_told(tmp_path, monkeypatch):
    folder = saved("qwen3", tmp_path / "model")
    (file,) = folder.glob("*.safetensors")
    read = WeightFiles.read

    def last(self, kind, name, cuts):
        if name == "model.norm.weight":  # the second; the file is closed before it
            file.unlink()
        return read(self, kind, name, cuts)

    monkeypatch.setattr(WeightFiles, "read", last)
    with pytest.raises(ModelDirError, match="model.safetensors: changed while it was read"):
        load_case("qwen3", folder)


def damaged(folder: Path, change) -> list[str]:
    """The problems found once `change(tensors)` has been applied to the one file of the MoE case."""
    tensors = load_file(saved("moe", folder) / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelDirError) as error:
        check_weights(folder, CASES["moe"])
    with pytest.raises(ModelDirError):
        load_case("moe", folder)
    return error.value.problems


def test_all_wrong_tensors_are_told_together(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.9.input_layernorm.weight"] = np.ones(20, np.float32)
        tensors["model.norm.weight"] = np.ones(21, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)

    problems = damaged(tmp_path, change)
    assert sorted(problems) == sorted([
        "tensor model.layers.1.mlp.experts.3.up_proj.weight is missing",
        "model.safetensors: tensor model.layers.9.input_layernorm.weight is unknown to this model",
        "model.safetensors: tensor model.norm.weight has the shape [21], config.json asks for [20]",
        "model.safetensors: tensor lm_head.weight has dtype I32; supported are F32, F16, BF16",
    ])  # fmt: skip


def test_a_number_that_is_not_finite_is_told(tmp_path):
    tensors = load_file(saved("moe", tmp_path) / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelDirError,
        match="model.safetensors: tensor model.layers.2.self_attn.o_proj.weight holds NaN",
    ):
        load_case("moe", tmp_path)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(ModelDirError, match="there is no .*safetensors"):
        check_weights(tmp_path, CASES["moe"])
    saved("moe", tmp_path, max_shard_size="10KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-7])
    files[3].write_bytes(b"\x00" * 100)
    with pytest.raises(ModelDirError) as error:
        check_weights(tmp_path, CASES["moe"])
    starts = [
        f"{files[1].name}: {INDEX} names this file, but it is not there",
        f"{files[2].name}: truncated",
        f"{files[3].name}: truncated",
    ]
    assert len(error.value.problems) == 3
    assert all(
        problem.startswith(start)
        for problem, start in zip(error.value.problems, starts, strict=True)
    )


def test_an_index_that_lies(tmp_path):
    saved("moe", tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][first])
    extra = load_file(tmp_path / other) | {
        first: load_file(tmp_path / index["weight_map"][first])[first]
    }
    save_file(extra, tmp_path / other)
    index["weight_map"]["model.layers.0.ghost"] = other
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelDirError) as error:
        check_weights(tmp_path, CASES["moe"])
    assert any(f"tensor {first} is in " in problem for problem in error.value.problems)
    assert (
        f"{other}: {INDEX} says it holds model.layers.0.ghost, but it does not"
        in error.value.problems
    )
    index["weight_map"][first] = "../elsewhere.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelDirError, match="not the name of a file beside it"):
        check_weights(tmp_path, CASES["moe"])
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ModelDirError, match="not a JSON file"):
        check_weights(tmp_path, CASES["moe"])


def test_a_tied_head_in_the_file_is_passed_over(tmp_path):
    saved("qwen3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
        tmp_path / "model.safetensors",
    )
    jax.tree.map(np.testing.assert_array_equal, load_case("qwen3", tmp_path),
                 hf.params(hugging_face("qwen3").state_dict(), CASES["qwen3"]))  # fmt: skip
