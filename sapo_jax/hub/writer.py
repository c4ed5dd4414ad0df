"""Writing a Hugging Face model directory: all of it or nothing, one tensor in memory at a time.

The safetensors library writes a file from a dict that holds all of its tensors at once. The format is small enough to
stream: the length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor,
filled up with spaces to a multiple of 8 bytes), the values of one tensor after the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
MAX_BYTES = 4 * 10**9  # of values in a file
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # numpy's name: the name in the header
Shape = tuple[int, ...]


def write_shards(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    arrays: Iterable[np.ndarray],
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write `model.safetensors`, or shards of at most max_bytes of values (a tensor is never split) and their index.

    arrays: the tensors, in the order of `shapes` and of dtype `dtype`. Each is taken when the one before is written.
    Returns the files with values. Raises ValueError where an array is not what `shapes` and `dtype` say.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    source = iter(arrays)
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                array = next(source)
                if array.shape != shapes[name] or array.dtype != dtype:
                    raise ValueError(
                        f"{name}: {array.dtype}{array.shape} where {dtype}{shapes[name]} was announced"
                    )
                np.ascontiguousarray(array).view(np.uint8).tofile(out)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        )
    return [folder / file for file in files]


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """The names in order, cut wherever one more tensor would exceed max_bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: Mapping[str, Shape], dtype: np.dtype) -> bytes:
    header: dict[str, dict[str, str | Sequence[int]]] = {
        "__metadata__": {"format": "pt"}
    }  # as transformers expects
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype.name], "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def new_model_dir(target: str | Path) -> Iterator[Path]:
    """A directory beside `target` to write into; if the block ends well it is forced to disk and becomes `target`.

    Raises FileExistsError, before anything is written, where `target` exists and is not an empty directory.
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
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
