"""Files that cannot be converted: every problem is named, and nothing is left behind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from sapo_jax.cli import main
from sapo_jax.errors import GGUFError
from sapo_jax.hub import gguf as module
from sapo_jax.hub.gguf import convert
from tests.hub import gguf_files as files

AT = "tokenizer.ggml."


def problems(file: Path, dtype: str = "float32") -> tuple[str, ...]:
    """What `convert` reports; it must leave the directory of `file` as it was."""
    before = sorted(file.parent.iterdir()) if file.parent.exists() else []
    with pytest.raises(GGUFError) as error:
        convert(file, file.parent / "out", dtype)
    assert (sorted(file.parent.iterdir()) if file.parent.exists() else []) == before
    assert str(file) in str(error.value)
    return error.value.problems


# ---------------------------------------------------------------- the file


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "text").write_text("GGML, not it")
    (tmp_path / "empty").write_bytes(b"")
    assert problems(tmp_path / "text") == (
        "not a GGUF file, truncated or damaged: it does not start with 'GGUF'",
    )
    assert problems(tmp_path / "empty") == problems(tmp_path / "text")
    assert problems(tmp_path / "nowhere") == ("cannot be read: No such file or directory",)
    (tmp_path / "folder").mkdir()
    assert problems(tmp_path / "folder") == ("it is not a file",)
    (tmp_path / "version").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))
    assert "version 9" in problems(tmp_path / "version")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return files.model_file(
        tmp_path_factory.mktemp("whole") / "x.gguf", "llama", files.Kind.Q8_0
    ).read_bytes()


def test_truncated_anywhere(whole, tmp_path):
    """In the header, in the metadata, in the list of tensors, in the values, down to the last byte."""
    last = len(whole.rstrip(b"\0")) - 1  # what follows may be padding
    for n in [4, 5, 8, 23, 24, *np.linspace(24, last, 60, dtype=int)]:
        (tmp_path / "x").write_bytes(whole[:n])
        assert f"it ends at byte {n}," in problems(tmp_path / "x")[0], n


def test_damaged_headers_raise_nothing_else(whole, tmp_path):
    """Random bytes in the metadata and the list of tensors: refused with a message, or not
    noticeable.
    """
    rng = np.random.default_rng(0)
    header = whole.index(b"blk.1.ffn_down.weight") + 100
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        spots = rng.choice([4, 8, 16, 24, 40, *rng.integers(24, header, 3)], 2)
        for spot in spots:
            damaged[spot : spot + 4] = rng.bytes(4)
        (tmp_path / "x").write_bytes(damaged)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            convert(tmp_path / "x", tmp_path / "out")
        except GGUFError:
            refused += 1
            assert not (tmp_path / "out").exists()
    assert refused > 100


def test_other_byte_order_and_parts(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "byte order" in problems(tmp_path / "big")[0]
    part = files.model_file(tmp_path / "part", "llama", split__count=3)
    assert problems(part) == (
        "split.count: one of 3 parts; join them first (llama-gguf-split --merge)",
    )
    adapter = files.model_file(tmp_path / "adapter", "llama", general__type="adapter")
    assert problems(adapter) == ("general.type: 'adapter' is not supported, only 'model'",)


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {"llama.block_count": None}, "llama.block_count: missing"),
        ("llama", {"llama.block_count": 2**31}, "llama.block_count: 2147483648 layers, but there are 20 tensors"),
        ("llama", {"llama.block_count": 2.0}, "llama.block_count: expected a whole number, got 2.0"),
        ("llama", {"llama.embedding_length": 0}, "llama.embedding_length: expected at least 1, got 0"),
        ("llama", {"llama.attention.head_count": [4, 4]}, "llama.attention.head_count: expected a whole number, got [4, 4]"),
        ("llama", {"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base: expected a positive number, got nan"),
        ("llama", {"llama.rope.freq_base": 0.0}, "llama.rope.freq_base: expected a positive number, got 0.0"),
        ("llama", {"llama.vocab_size": 639}, "llama.vocab_size: 639 is not supported, only 640"),
        ("llama", {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: 8 is not supported, only 16"),
        ("llama", {"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type: 'linear' is not supported, only 'none'"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count: this setting (8) is not supported"),
        ("llama", {"llama.logit_scale": 0.5}, "llama.logit_scale: this setting (0.5) is not supported"),
        ("qwen3", {"qwen3.rope.scaling.factor": None}, "qwen3.rope.scaling.factor: missing"),
        ("qwen3", {"qwen3.rope.scaling.attn_factor": 0.5}, "qwen3.rope.scaling.attn_factor: 0.5 is not supported, only 1.0"),
        ("qwen3", {"qwen3.attention.value_length": 8}, "qwen3.attention.value_length: 8 is not supported, only 24"),
        ("qwen3", {f"qwen3.{key}": 23 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}, "qwen3.attention.key_length: 23 is odd; rotary embedding needs pairs"),
        ("qwen3moe", {"qwen3moe.expert_used_count": 7}, "qwen3moe.expert_used_count: 7 of 6 experts cannot be chosen"),
        ("llama", {AT + "model": "llama"}, AT + "model: 'llama' tokenizers are not supported, only 'gpt2' (byte-level BPE)"),
        ("llama", {AT + "pre": "tekken"}, AT + "pre: the rule 'tekken' is not supported, only gpt-2, smollm, qwen2, llama-bpe, default"),
        ("llama", {AT + "pre": None}, AT + "pre: missing"),
        ("llama", {AT + "merges": None}, AT + "merges: missing"),
        ("llama", {AT + "merges": ["a b", "a  b", "a"]}, AT + "merges: 3 do not make a token of two tokens, the first is ('a', 'b')"),
        ("llama", {AT + "token_type": [1] * 639}, AT + "token_type: 639 types for 640 tokens"),
        ("llama", {AT + "token_type": [6] * 640}, AT + "token_type: types [6] do not belong to byte-level BPE"),
        ("llama", {AT + "eos_token_id": None}, AT + "eos_token_id: missing"),
        ("llama", {AT + "eos_token_id": 640}, AT + "eos_token_id: there is no token 640"),
        ("llama", {AT + "padding_token_id": 639}, AT + "padding_token_id: there is no token 639"),
        ("llama", {AT + "eot_token_id": 4000}, AT + "eot_token_id: there is no token 4000"),
        ("llama", {AT + "bos_token_id": None, AT + "add_bos_token": True}, AT + "bos_token_id: missing, but every text starts with it (tokenizer.ggml.add_bos_token)"),
        ("llama", {AT + "add_space_prefix": True}, AT + "add_space_prefix: True is not supported, only False"),
    ],
)  # fmt: skip
def test_one_mistake(architecture, changes, expected, tmp_path):
    assert problems(files.model_file(tmp_path / "x", architecture, **changes)) == (expected,)


def test_a_token_twice(tmp_path):
    tokens = files.tokenizer_fields()[AT + "tokens"]
    file = files.model_file(tmp_path / "x", "llama", **{AT + "tokens": [*tokens[:-1], tokens[-2]]})
    assert problems(file) == (AT + "tokens: 1 of them are there twice",)


def test_unused_tokens(tmp_path):
    """No merge makes one; but they may lie anywhere."""
    tokens, types, merges = (
        files.tokenizer_fields()[AT + key] for key in ("tokens", "token_type", "merges")
    )
    unused = tokens.index(merges[-1].replace(" ", ""))
    types = [5 if i == unused else kind for i, kind in enumerate(types)]
    file = files.model_file(tmp_path / "x", "llama", **{AT + "token_type": types})
    assert problems(file)[0].startswith(AT + "merges: 1 do not make a token of two tokens")
    changes = {AT + "token_type": types, AT + "merges": merges[:-1]}
    convert(files.model_file(tmp_path / "y", "llama", **changes), tmp_path / "out")
    vocab = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert vocab == {token: i for i, token in enumerate(tokens) if types[i] != 5}


def test_an_unsupported_architecture_is_the_only_thing_to_say(tmp_path):
    file = files.write(tmp_path / "x", "gemma3", {}, {})
    assert problems(file) == (
        "general.architecture: 'gemma3' is not supported, only llama, qwen3, qwen3moe",
    )


def test_all_mistakes_in_the_metadata_at_once(tmp_path):
    changes = {
        "llama.context_length": None,
        "llama.embedding_length": "64",
        AT + "pre": "x",
        "llama.attention.alibi": 8.0,
    }
    listed = " ".join(problems(files.model_file(tmp_path / "x", "llama", **changes)))
    assert all(key in listed for key in changes)


# ---------------------------------------------------------------- tensors


def test_all_mistakes_in_the_tensors_at_once(tmp_path):
    cfg = files.MODELS["llama"]
    arrays = files.tensors("llama", cfg, files.hf.model(cfg).state_dict())
    del arrays["blk.1.ffn_up.weight"], arrays["output_norm.weight"]
    arrays["blk.0.attn_q.weight"] = arrays["blk.0.attn_q.weight"][:, :32]
    arrays["blk.0.attn_q.bias"] = np.zeros(64, np.float32)
    arrays["rope_freqs.weight"] = np.ones(8, np.float32)
    arrays["blk.1.attn_v.weight"] = np.zeros((32, 64), np.int8)
    file = files.write(tmp_path / "x", "llama", files.fields("llama"), arrays)
    unsupported = "that is not part of this architecture as it is supported"
    assert set(problems(file)) == {
        "blk.1.ffn_up.weight: missing",
        "output_norm.weight: missing",
        "blk.0.attn_q.weight: its shape is (64, 32); from the metadata it should be (64, 64)",
        f"blk.0.attn_q.bias: a tensor (64,) {unsupported}",
        f"rope_freqs.weight: a tensor (8,) {unsupported}",
        "blk.1.attn_v.weight: values of type I8 cannot be dequantised",
    }


def test_sizes_without_measure_cost_nothing(tmp_path):
    """They are compared with the shapes before anything is made for so many experts."""
    found = problems(
        files.model_file(tmp_path / "x", "qwen3moe", **{"qwen3moe.expert_count": 2**32 - 1})
    )
    assert len(found) == 2 * 4 and all("blk." in line and "(4294967295, " in line for line in found)


def test_values_that_are_not_finite(tmp_path):
    cfg = files.MODELS["qwen3moe"]
    arrays = files.tensors("qwen3moe", cfg, files.hf.model(cfg).state_dict())
    arrays = {name: np.array(x) for name, x in arrays.items()}
    arrays["blk.0.ffn_up_exps.weight"][3, 1, 2] = np.nan
    arrays["blk.1.attn_v.weight"][3, 1] = 1e5
    file = files.write(tmp_path / "x", "qwen3moe", files.fields("qwen3moe"), arrays)
    expert = "blk.0.ffn_up_exps.weight: values of expert 3 that are not finite, or not in "
    assert problems(file) == (expert + "float32",)
    assert problems(file, "float16") == (
        expert + "float16",
        "blk.1.attn_v.weight: values that are not finite, or not in float16",
    )


# ---------------------------------------------------------------- the directory, the package, the
# command


def test_an_existing_directory_is_left_alone(tmp_path):
    file = files.model_file(tmp_path / "x", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(
        FileExistsError, match="already exists; give a directory that is new or empty"
    ):
        convert(file, tmp_path / "out")
    with pytest.raises(FileExistsError, match="already exists"):
        convert(file, file)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    convert(file, tmp_path / "out")  # empty: fine
    convert(file, tmp_path / "deep" / "er" / "out")
    expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    file = files.model_file(tmp_path / "x", "llama")

    def full(folder, *_):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_descriptions", full)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert list(tmp_path.iterdir()) == [file]


def test_without_the_package(tmp_path, monkeypatch, capsys):
    file = files.model_file(tmp_path / "x", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 1
    assert "pip install 'sapo-jax[gguf]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_usage_errors_exit_2(tmp_path, capsys):
    for argv in (
        ["x"],
        ["x", "y", "train.steps=1"],
        ["x", "y", "--dtype", "int8"],
        ["x", "y", "--fast"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *argv])
        assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "--help"])
    assert exit_.value.code == 0
    assert "qwen3moe" in capsys.readouterr().out
