"""Hostile model directories: whatever is done to a file, it loads or there is one ValueError.

All cases of a kind run in one process of their own, which has a time limit: a panic of a Rust
library, a signal, a hang or an exception that is not written for people would show. The mutations
are seeded, and the same in every run; `json_mutations` and `byte_mutations` say what their kinds are.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 240  # for all cases of a kind; they take a few seconds on an idle machine
CASES_OF_BYTES = 150

# What replaces a value of a JSON file: every type, the edges of the ranges, sizes that overflow,
# half of a surrogate pair, and nesting.
VALUES: list[Any] = [
    None, True, 0, -1, 2**31, 2**32, 2**63, 2**64, 10**22, 1.5, 1e308, "", "x", "\x00", "\ud800",
    "é" * 50, [], {}, [1, 2], ["a"], {"a": 1},
]  # fmt: skip
REMOVED = object()


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of a JSON value and of all below it; of a list, of its first three items."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    if isinstance(value, list):
        for i in range(min(len(value), 3)):
            yield from paths(value[i], (*path, i))


def changed(value: Any, path: tuple, new: Any) -> Any:
    """The value with another one, or none, at a path."""
    if not path:
        return new
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if new is REMOVED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return value


def json_mutations(value: Any) -> Iterator[bytes]:
    """One value replaced by each of VALUES, or removed; and texts that are no such value at all."""
    for path in paths(value):
        for new in [*VALUES, REMOVED]:
            if path or new is not REMOVED:
                yield json.dumps(changed(value, path, new)).encode()
    text = json.dumps(value)
    yield b""
    yield b"{"
    yield b"\xff\xfe{}"
    yield b"[" * 100_000
    yield b'{"a":' * 100_000
    yield text[: len(text) // 2].encode()
    first = next(iter(value))
    repeated = f"{{{json.dumps(first)}: {json.dumps(value[first])}, {text[1:]}"
    yield repeated.encode()


def byte_mutations(data: bytes, seed: int, cases: int = CASES_OF_BYTES) -> Iterator[bytes]:
    """The file cut off, bytes flipped, 8 bytes set to an edge of the integers, a part doubled."""
    rng = random.Random(seed)
    edges = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
    for case in range(cases):
        damaged = bytearray(data)
        at = rng.randrange(len(data))
        if case % 4 == 0:
            damaged = damaged[:at]
        elif case % 4 == 1:
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
        elif case % 4 == 2:
            damaged[at : at + 8] = struct.pack("<Q", rng.choice(edges))
        else:
            damaged[at:at] = damaged[at : at + rng.randint(1, 100)]
        yield bytes(damaged)


# ---------------------------------------------------------------- in the process of its own


def safetensors_cases() -> tuple[Iterator[bytes], Callable[[Path], object], str]:
    import numpy as np
    from safetensors.numpy import save

    from sapo_jax.config import Model
    from sapo_jax.hub.table import hub_shapes
    from sapo_jax.hub.weights import check_weights

    cfg = Model(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, intermediate_size=3,
    )  # fmt: skip
    data = save({name: np.ones(shape, np.float32) for name, shape in hub_shapes(cfg).items()})
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    few = dict(list(header.items())[:2])

    def mutations() -> Iterator[bytes]:
        yield data
        for text in json_mutations(few):
            yield struct.pack("<Q", len(text)) + text + data[8 + length :]
        for wrong_length in (0, 1, length - 1, length + 1, 10**8 + 1, 2**63, 2**64 - 1):
            yield struct.pack("<Q", wrong_length) + data[8:]
        yield from byte_mutations(data, seed=1)

    return mutations(), lambda folder: check_weights(folder, cfg), "model.safetensors"


def tokenizer_cases() -> tuple[Iterator[bytes], Callable[[Path], object], str]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from sapo_jax.data import load_tokenizer

    vocabulary = {token: i for i, token in enumerate(["<unk>", "a", "b", "ab", "</s>"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+"), "isolated")
    bpe.decoder = decoders.ByteLevel()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
    unigram.normalizer = normalizers.Replace("x", "y")
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    specs = []
    for backend in (bpe, unigram):
        backend.add_special_tokens(["</s>"])
        specs.append(json.loads(backend.to_str()))

    def mutations() -> Iterator[bytes]:
        for spec in specs:
            yield json.dumps(spec).encode()
            yield from json_mutations(spec)
        # The two parts that the library trusts: both panicked.
        for table in ("", "AAAA", "A" * 400, "//8AAAA=", "ALQCAACEAAAAAACAAQAAgMz8", 5, None):
            normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
            yield json.dumps(specs[0] | {"normalizer": normalizer}).encode()
        yield json.dumps(changed(specs[0], ("model", "continuing_subword_prefix"), "éé")).encode()

    def load(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        tokenizer = load_tokenizer(str(folder))
        tokenizer.decode(tokenizer.encode("ab a é </s>"))

    return mutations(), load, "tokenizer.json"


def config_cases() -> tuple[Iterator[bytes], Callable[[Path], object], str]:
    from sapo_jax.config import read_model_keys
    from sapo_jax.config.pretrained import model_dir_notes

    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 29,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1],
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1e4,
        "layer_types": ["full_attention", "full_attention"], "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "attention_dropout": 0.0,
    }  # fmt: skip

    def load(folder: Path) -> None:
        model_dir_notes(folder)
        read_model_keys(folder)

    return json_mutations(config), load, "config.json"


def gguf_cases() -> tuple[Iterator[bytes], Callable[[Path], object], str]:
    import tempfile

    from sapo_jax.hub import convert
    from tests.hub import gguf_files as files

    with tempfile.TemporaryDirectory() as temporary:
        path = files.model_file(Path(temporary) / "x.gguf", "llama", files.Kind.F32)
        data = path.read_bytes()
    numbers = iter(range(10**6))

    def load(folder: Path) -> None:
        convert(folder / "model.gguf", folder / f"converted{next(numbers)}")

    return byte_mutations(data, seed=2, cases=40), load, "model.gguf"


def yaml_cases() -> tuple[Iterator[bytes], Callable[[Path], object], str]:
    from sapo_jax.config.yaml_core import parse_yaml

    text = b"""# A comment
model: &m {path: "a\\u00e9b", sizes: [1, 2.5e-3, ~, true], <<: {x: 1}}
again: *m
text: |
  several
  lines
tagged: !!int "3"
"""

    def mutations() -> Iterator[bytes]:
        yield from byte_mutations(text, seed=3)
        for piece in (b"[", b"{a: ", b"- ", b"? ", b"!!map ", b"&a ", b"*a ", b"<<: "):
            yield piece * 3000
        for tag in (b"int", b"float", b"bool", b"null", b"binary", b"timestamp", b"set", b"omap"):
            for value in (b"x", b"''", b"[]", b"{}", b"[x]", b"9" * 5000):
                yield b"a: !!" + tag + b" " + value
        for escape in (b"\\ud800", b"\\U00110000", b"\\UFFFFFFFF", b"\\x", b"\\u12"):
            yield b'a: "' + escape + b'"'

    def load(folder: Path) -> None:
        parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"))

    return mutations(), load, "run.yaml"


def parquet_cases() -> tuple[Iterator[bytes], Callable[[Path], object], str]:
    """Bytes anywhere in the file, and bytes of its footer, which says what the others mean."""
    import io

    import pyarrow
    import pyarrow.parquet

    from sapo_jax.data import read_problems

    rows = [{"prompt": f"question {i}", "answer": str(i)} for i in range(50)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    data = buffer.getvalue()
    (footer_length,) = struct.unpack("<I", data[-8:-4])

    def mutations() -> Iterator[bytes]:
        yield data
        yield from byte_mutations(data, seed=0, cases=300)
        for seed in range(300):
            rng = random.Random(seed)
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 6)):
                damaged[len(data) - 9 - rng.randrange(footer_length)] = rng.randrange(256)
            yield bytes(damaged)

    def load(folder: Path) -> object:
        path = str(folder / "rows.parquet")
        try:
            return read_problems(path, "exact", ("exact",))
        except ValueError as error:
            assert path in str(error), f"an error that names no file: {error}"
            raise

    return mutations(), load, "rows.parquet"


KINDS = {
    "parquet": parquet_cases,
    "safetensors": safetensors_cases,
    "tokenizer": tokenizer_cases,
    "config": config_cases,
    "gguf": gguf_cases,
    "yaml": yaml_cases,
}


def run_cases(kind: str, folder: Path) -> None:
    """Load every case; print how many loaded and how many were refused. An exception that is not a
    ValueError ends the process with a traceback that names the case's file.
    """
    mutations, load, file_name = KINDS[kind]()
    loaded = 0
    refused = 0
    for data in mutations:
        (folder / file_name).write_bytes(data)
        try:
            load(folder)
            loaded += 1
        except ValueError as error:
            assert str(error), "an error without a message"
            refused += 1
    print(json.dumps({"loaded": loaded, "refused": refused}))


# ---------------------------------------------------------------- the tests

# At least so many cases of each kind must be refused; the undamaged file must load.
LEAST_REFUSED = {
    "parquet": 400,
    "safetensors": 300,
    "tokenizer": 500,
    "config": 300,
    "gguf": 25,
    "yaml": 60,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_one_error(kind, tmp_path):
    code = f"from tests.faults import test_model_dir_fuzz as fuzz; from pathlib import Path; \
fuzz.run_cases({kind!r}, Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    tail = done.stderr[-3000:]
    assert done.returncode == 0, f"exit {done.returncode}, {sorted(tmp_path.iterdir())}\n{tail}"
    assert "panicked" not in done.stderr, tail
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] >= LEAST_REFUSED[kind], counts
    assert counts["loaded"] >= 1, counts
