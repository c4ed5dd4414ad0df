"""The header of a safetensors file, checked before the library sees the file.

A file is 8 bytes with the length of the header, the header (a JSON object: for each tensor its
dtype, its shape, and where its bytes begin and end), and the bytes. What comes from the internet
may be anything. The library takes a key that is given twice, and a new version of it may end the
process where an old one raised; so everything that the header says is checked here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the library's limit

BITS_OF_DTYPE = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes, counted from the end of the header
    end: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """{name: header} of the tensors in a file.

    Raises FileNotFoundError, OSError, and ValueError for whatever is wrong with the header.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        file_size = path.stat().st_size
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise ValueError(f"it has {len(length_bytes)} bytes, a header alone has more")
        (header_size,) = struct.unpack("<Q", length_bytes)
        if header_size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {header_size} bytes is more than {MAX_HEADER_BYTES}")
        if 8 + header_size > file_size:
            raise ValueError(f"a header of {header_size} bytes in a file of {file_size}")
        header_bytes = file.read(header_size)
    try:
        header = json.loads(header_bytes.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("the header is nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")  # noqa: TRY004
    _check_metadata(header.pop("__metadata__", None))
    tensors = {name: _read_tensor(name, entry) for name, entry in header.items()}
    _check_places(tensors, file_size - 8 - header_size)
    return tensors


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the header gives {_short(name)} twice")
        values[name] = value
    return values


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) > 80:
        text = f"{text[:77]}..."
    return text


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a mapping of text to text")


def _read_tensor(name: str, entry: Any) -> TensorHeader:
    """The entry of a tensor. Raises ValueError where it is not as it should be."""
    where = f"tensor {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} has not exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        raise ValueError(f"{where} has the unknown dtype {_short(dtype)}")
    shape = entry["shape"]
    if not _are_sizes(shape):
        raise ValueError(f"{where} has the shape {_short(shape)}")
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has the data_offsets {_short(offsets)}")
    header = TensorHeader(dtype, tuple(shape), offsets[0], offsets[1])
    num_bits = math.prod(shape) * BITS_OF_DTYPE[dtype]
    if num_bits != 8 * (header.end - header.start):
        raise ValueError(
            f"{where} of shape {_short(shape)} and dtype {dtype} cannot have"
            f" {header.end - header.start} bytes"
        )
    return header


def _are_sizes(value: Any) -> bool:
    """Whether this is a list of at most 16 whole numbers that are not negative."""
    if not isinstance(value, list) or len(value) > 16:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_places(tensors: dict[str, TensorHeader], num_bytes: int) -> None:
    """The tensors must lie one after the other and fill the file, without gaps or overlaps."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise ValueError(
                f"tensor {_short(name)} begins at byte {tensor.start},"
                f" the one before it ends at {position}"
            )
        position = tensor.end
    if position != num_bytes:
        raise ValueError(f"the header speaks of {position} bytes, the file has {num_bytes}")
