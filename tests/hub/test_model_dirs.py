"""Model directories in which transformers decides: defaults of missing keys, keys that contradict
each other, files and tensors beside those of the model, and ids that end a completion.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from sapo_jax.config import Mesh, Model, Yarn, read_model_keys
from sapo_jax.config.pretrained import model_dir_notes
from sapo_jax.data import load_tokenizer
from sapo_jax.distributed import sharding
from sapo_jax.errors import ModelDirError
from sapo_jax.hub.weights import check_weights, load_params
from sapo_jax.hub.writer import INDEX
from sapo_jax.models import make_policy
from tests.models.test_hf_parity import CASES
from tests.references import hf

MESH = sharding.make_mesh(Mesh(), jax.devices()[:1])
SHAPE = {
    "vocab_size": 29,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


def write_config(folder: Path, family: str, changes: dict) -> Path:
    config = {"model_type": family, **SHAPE}
    if family == "qwen3_moe":
        config |= EXPERTS
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# ---------------------------------------------------------------- config.json


READ_ALIKE = {
    "nothing more": {},
    "no heads of keys and values": {"num_key_value_heads": None},
    "rope_theta beside": {"rope_theta": 5e5},
    "yarn on the hub": {"rope_theta": 5e5, "rope_scaling": YARN, "max_position_embeddings": 128},
    "yarn, its type by the old name": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    },
    "yarn without a length": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
        "max_position_embeddings": 128,
    },
    "yarn twice, alike": {
        "rope_parameters": YARN | {"rope_theta": 5e5},
        "rope_scaling": YARN | {"rope_theta": 5e5},
    },
    "an empty section": {"rope_scaling": {}, "rope_parameters": YARN | {"rope_theta": 5e5}},
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("case", READ_ALIKE)
def test_a_config_is_read_as_transformers_reads_it(case, family, tmp_path):
    changes = READ_ALIKE[case]
    if family == "qwen3_moe" and "num_key_value_heads" in changes:
        pytest.skip("transformers refuses null for this family")
    write_config(tmp_path, family, changes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = read_model_keys(tmp_path)
    same_names = (
        "num_key_value_heads", "attention_bias", "rms_norm_eps", "tie_word_embeddings",
        "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    for name in same_names:
        assert ours[name] == getattr(theirs, name), name
    # Qwen3Config and LlamaConfig have head_dim; the model of Qwen3MoeConfig derives it like this.
    assert ours["head_dim"] == getattr(theirs, "head_dim", 32 // 4)
    rope = dict(theirs.rope_parameters)
    assert ours["rope_theta"] == rope.pop("rope_theta")
    rope.pop("type", None)
    if rope.pop("rope_type") == "default":
        assert ours["rope_scaling"] is None
    else:
        assert ours["rope_scaling"] == rope


def test_defaults_that_a_shape_alone_gets(tmp_path):
    write_config(tmp_path, "qwen3", {})
    keys = read_model_keys(tmp_path)
    assert keys["head_dim"] == 128
    assert keys["max_position_embeddings"] == 32768
    write_config(tmp_path, "llama", {})
    keys = read_model_keys(tmp_path)
    assert keys["head_dim"] == 8
    assert keys["max_position_embeddings"] == 2048


REFUSED = {
    "two ropes that differ": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN},
        "rope_parameters and rope_scaling are both there and differ",
    ),
    "two thetas": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta 1000000.0 and rope_parameters.rope_theta 10000.0 contradict each other",
    ),
    "two types": (
        {"rope_scaling": YARN | {"type": "linear"}},
        "rope_scaling.rope_type 'yarn' and rope_scaling.type 'linear' contradict each other",
    ),
    "a factor without a type": (
        {"rope_scaling": {"factor": 2.0}},
        "another rope_type than default",
    ),
    "two lengths": (
        {"original_max_position_embeddings": 32, "rope_scaling": YARN},
        "original_max_position_embeddings 32 and that of rope_scaling, 64, contradict each other",
    ),
    "yarn without a factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    "linear attention": (
        {"layer_types": ["linear_attention", "full_attention"]},
        "layer_types has 'linear_attention'; only full_attention is supported",
    ),
    "too few layer_types": ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    "a reward model": (
        {"architectures": ["Qwen3ForSequenceClassification"]},
        "a model of type qwen3 must be Qwen3ForCausalLM",
    ),
    "a drafter": ({"architectures": ["LlamaForCausalLMEagle3"]}, "must be Qwen3ForCausalLM"),
    "attention in chunks": (
        {"dual_chunk_attention_config": {"chunk_size": 262144}},
        "dual_chunk_attention_config",
    ),
    # Types and ranges, each of which was a traceback, or counted for hours.
    "layer_types 5": ({"layer_types": 5}, "layer_types 5 is not a list"),
    "rope_scaling text": ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is not an object"),
    "rope_scaling list": ({"rope_scaling": [1]}, "rope_scaling [1] is not an object"),
    "rope_theta text": ({"rope_theta": "x"}, "rope_theta 'x' is not a positive number"),
    "10^9 layers": ({"num_hidden_layers": 10**9}, "is not a whole number from 1 to 10000"),
    "a width of text": ({"hidden_size": "32"}, "hidden_size '32' is not a whole number"),
    "true heads": ({"num_attention_heads": True}, "num_attention_heads true is not a whole number"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads 0 is not a whole number"),
    "a yes": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes' is not true or false"),
    "a list as family": ({"model_type": ["qwen3"]}, "is not supported; supported are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_meant_is_refused(case, tmp_path):
    changes, message = REFUSED[case]
    write_config(tmp_path, "qwen3", changes)
    with pytest.raises(ModelDirError) as error:
        read_model_keys(tmp_path)
    assert message in str(error.value)
    assert len(error.value.problems) == 1


REFUSED_EXPERTS = {
    "two numbers": ({"num_local_experts": 8}, "num_experts 4 and num_local_experts 8 contradict"),
    "10^9 experts": ({"num_experts": 10**9}, "num_experts 1000000000 is not a whole number"),
    "too many in all": (
        {"num_experts": 10_000, "num_hidden_layers": 10_000},
        "num_hidden_layers 10000 times num_experts 10000 is more than 300000",
    ),
    "dense layers": ({"mlp_only_layers": [-1]}, "mlp_only_layers [-1] is not a list of layer num"),
}


@pytest.mark.parametrize("case", REFUSED_EXPERTS)
def test_experts_that_cannot_be_meant_are_refused(case, tmp_path):
    changes, message = REFUSED_EXPERTS[case]
    write_config(tmp_path, "qwen3_moe", changes)
    with pytest.raises(ModelDirError) as error:
        read_model_keys(tmp_path)
    assert message in str(error.value)


def test_a_key_that_is_given_twice_and_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "model_type": "llama"}')
    with pytest.raises(ModelDirError, match="the key 'model_type' is given twice"):
        read_model_keys(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelDirError, match="config.json: not a file"):
        read_model_keys(tmp_path)


def test_keys_that_are_not_taken_over_are_named(tmp_path):
    changes = {"attention_dropout": 0.1, "router_aux_loss_coef": 0.001, "auto_map": {}, "zebra": 1}
    write_config(tmp_path, "qwen3_moe", changes)
    dropout, coefficient, unknown = model_dir_notes(tmp_path)
    assert "attention_dropout 0.1 is not taken over" in dropout
    assert "router_aux_loss_coef 0.001 is not taken over" in coefficient
    assert unknown == "config.json: not known and ignored: auto_map, zebra"


@pytest.mark.parametrize("name", CASES)
def test_every_key_that_transformers_writes_is_known(name, tmp_path):
    hf.config(CASES[name]).save_pretrained(tmp_path)
    assert [note for note in model_dir_notes(tmp_path) if "not known" in note] == []
    assert isinstance(read_model_keys(tmp_path), dict)


# ---------------------------------------------------------------- files and tensors


def saved(name: str, folder: Path, seed: int = 5, **kwargs) -> Path:
    hf.model(CASES[name], seed=seed).save_pretrained(folder, **kwargs)
    return folder


def load_case(cfg: Model, folder: Path):
    return load_params(folder, make_policy(cfg), MESH)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    """transformers unties the two then, so its logits would be others than ours."""
    file = saved("qwen3", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1.0
    save_file(tensors | {"lm_head.weight": head}, file, {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, torch.tensor(head))
    with pytest.raises(ModelDirError, match="lm_head.weight differs from model.embed_tokens"):
        check_weights(tmp_path, CASES["qwen3"])
    with pytest.raises(ModelDirError, match="set model.tie_word_embeddings to false"):
        load_case(CASES["qwen3"], tmp_path)
    save_file(tensors | {"lm_head.weight": head[:-1]}, file)
    with pytest.raises(ModelDirError, match="lm_head.weight has another shape than"):
        check_weights(tmp_path, CASES["qwen3"])


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path):
    """transformers reads the single file, others the index."""
    saved("qwen3", tmp_path, seed=6, max_shard_size="10KB")
    assert check_weights(tmp_path, CASES["qwen3"]) == []
    newer = load_file(saved("qwen3", tmp_path / "newer") / "model.safetensors")
    save_file(newer, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    key = "model.norm.weight"
    np.testing.assert_array_equal(theirs.state_dict()[key].numpy(), newer[key])
    with pytest.raises(ModelDirError, match="model.safetensors lies beside .*index.json"):
        load_case(CASES["qwen3"], tmp_path)
    (tmp_path / INDEX).unlink()
    (note,) = check_weights(tmp_path, CASES["qwen3"])
    assert note.startswith("not part of the model and not read: model-00001-of-")
    params = load_case(CASES["qwen3"], tmp_path)
    np.testing.assert_array_equal(params["norm"]["scale"], newer[key])


def test_what_transformers_passes_over_is_passed_over_with_a_note(tmp_path):
    file = saved("llama-mqa", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    params = load_case(CASES["llama-mqa"], tmp_path)
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
        "model.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    save_file(tensors | extras, file, {"format": "pt"})
    adapter = {"base_model.model.lora_A.weight": np.ones(3, np.float32)}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    save_file({"linear.weight": np.ones(3, np.float32)}, tmp_path / "mm_projector.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    unused_files, buffers = check_weights(tmp_path, CASES["llama-mqa"])
    assert unused_files.endswith("not read: adapter_model.safetensors, mm_projector.safetensors")
    assert buffers.startswith("2 tensors rotary_emb.inv_freq or position_ids are not used")
    again = load_case(CASES["llama-mqa"], tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_yarn_beside_is_yarn(tmp_path):
    write_config(tmp_path, "qwen3", {"rope_scaling": YARN, "rope_parameters": None})
    scaling = read_model_keys(tmp_path)["rope_scaling"]
    assert Yarn(**scaling) == Yarn(factor=2.0, original_max_position_embeddings=64)


# ---------------------------------------------------------------- stop ids


def tokenizer_dir(folder: Path, config: dict, generation: dict | None) -> Path:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "a", "b", "<end>", "<stop>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    backend.add_special_tokens(["<end>", "<stop>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    write_config(folder, "qwen3", config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("eos_ids", [[3, 4], 4, None])
def test_ids_that_config_alone_names_end_a_completion(eos_ids, tmp_path):
    tokenizer_dir(tmp_path, {"eos_token_id": eos_ids}, None)
    generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path))
    theirs = generation.eos_token_id
    if theirs is None:
        theirs = []
    elif isinstance(theirs, int):
        theirs = [theirs]
    tokenizer = load_tokenizer(str(tmp_path))
    assert set(tokenizer.stop_ids) == {3, *theirs}
    assert tokenizer.end_id == 3


def test_the_generation_config_comes_before_the_config(tmp_path):
    tokenizer_dir(tmp_path, {"eos_token_id": 4}, {"eos_token_id": 3})
    assert load_tokenizer(str(tmp_path)).stop_ids == (3,)


@pytest.mark.parametrize("bad_id", [10**22, -1, 5, True, "3", 3.0, [[3]], {"a": 3}])
def test_ids_that_are_none_are_named(bad_id, tmp_path):
    tokenizer_dir(tmp_path, {"eos_token_id": bad_id}, None)
    with pytest.raises(ValueError, match=r"config.json: eos_token_id: no token of .* has the id"):
        load_tokenizer(str(tmp_path))
