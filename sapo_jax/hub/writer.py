"""Writing a Hugging Face model directory: all of it or nothing, one tensor in memory at a time.

Why we write safetensors files ourselves: `safetensors.numpy.save_file` takes a dict that holds all
tensors of the file, so the host would have a whole file in memory (4 GB, or all of a smaller model)
beside the parameters, where we hold one tensor; `tests/hub/test_gguf.py` bounds the memory of a
conversion. The library has no writer that takes tensors one by one (its `TensorSpec`s point to data
that is there already). Files are read with the library (`safe_open`).

The format: the length of the header (8 bytes, little-endian); the header (JSON: dtype, shape and
place of every tensor, filled up with spaces to a multiple of 8 bytes); and the values of one tensor
after the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 10**9  # of values in a file
HEADER_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by numpy's name


def write_shards(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    arrays: Iterable[np.ndarray],
    max_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as several shards and their index.

    A shard holds at most max_bytes of values, but a tensor is never split. `arrays` are the tensors
    of `shapes`, in its order and of dtype `dtype`; each is taken when the one before it is written.
    Returns the files with values. Raises ValueError where an array is not as announced.
    """
    num_bytes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _split_into_shards(num_bytes, max_bytes)
    if len(shards) == 1:
        file_names = ["model.safetensors"]
    else:
        count = len(shards)
        file_names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    remaining_arrays = iter(arrays)
    for file_name, names in zip(file_names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                array = next(remaining_arrays)
                if array.shape != shapes[name] or array.dtype != dtype:
                    announced = f"{dtype}{shapes[name]}"
                    raise ValueError(
                        f"{name}: {array.dtype}{array.shape} where {announced} was announced"
                    )
                np.ascontiguousarray(array).view(np.uint8).tofile(file)

    if len(shards) > 1:
        file_of = {}
        for file_name, names in zip(file_names, shards, strict=True):
            file_of |= dict.fromkeys(names, file_name)
        metadata = {"total_size": sum(num_bytes.values())}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": file_of})
    return [folder / file_name for file_name in file_names]


def _split_into_shards(num_bytes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """The tensors in order, cut wherever one more of them would exceed max_bytes."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in num_bytes.items():
        if shards[-1] and shard_bytes + size > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    return shards


def _header(shapes: Mapping[str, Shape], dtype: np.dtype) -> bytes:
    """The bytes of a safetensors file that precede the values."""
    # transformers expects the entry "format" in the metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": HEADER_DTYPES[dtype.name],
            "shape": shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def new_model_dir(target: str | Path) -> Generator[Path]:
    """A directory to write into, which becomes `target` once the `with` block has ended well.

    It lies beside `target`, and is forced to disk before it is renamed. If the block raises,
    nothing is left. Raises FileExistsError, before anything is written, if `target` exists and is
    not an empty directory.
    """
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists; give a directory that is new or empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        folder.rename(target)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as Hugging Face does: UTF-8, indented by 2, with a line end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
