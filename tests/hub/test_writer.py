"""Streamed safetensors files, read back by the library."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import load_file

from sapo_jax.hub.writer import write_shards

SHAPES = {"a": (3, 5), "b.weight": (7,), "c": (), "d": (0, 4), "é \"quoted\"": (2, 2, 2), "z": (30,)}  # fmt: skip


def arrays(dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_file(dtype, tmp_path):
    expected = arrays(jnp.dtype(dtype))
    assert write_shards(tmp_path, SHAPES, jnp.dtype(dtype), iter(expected.values()), 10**9) == [
        tmp_path / "model.safetensors"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_shards_are_bounded_and_in_order(tmp_path):
    """Sizes in bytes: 60, 28, 4, 0, 32, 120; at most 96 a file, but for a tensor that is larger by
    itself.
    """
    expected = arrays(np.float32)
    paths = write_shards(tmp_path, SHAPES, np.dtype("float32"), expected.values(), 96)
    assert [path.name for path in paths] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 244}
    for path, names in zip(
        paths, (["a", "b.weight", "c", "d"], ['é "quoted"'], ["z"]), strict=True
    ):
        found = load_file(path)
        assert (
            list(found)
            == names
            == [name for name, file in index["weight_map"].items() if file == path.name]
        )
        for name in names:
            np.testing.assert_array_equal(found[name], expected[name])


def test_an_array_that_was_not_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a: float32\(5, 3\) where float32\(3, 5\) was announced"):
        write_shards(tmp_path, SHAPES, np.dtype("float32"), [np.zeros((5, 3), np.float32)], 96)
    with pytest.raises(ValueError, match="a: float64"):
        write_shards(tmp_path, SHAPES, np.dtype("float32"), [np.zeros((3, 5))], 96)
