"""Writing a Hugging Face model directory: all of it or nothing, its tensors in files of bounded size."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 2 * 2**30  # also the host memory that writing takes
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@contextlib.contextmanager
def new_model_dir(folder: str | Path) -> Iterator[Path]:
    """A temporary directory beside `folder` to write into; it becomes `folder` if the block ends well, else it goes.

    Raises FileExistsError, before anything is written, where `folder` exists and is not an empty directory.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty; remove it, or name another directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the tensors, rounded to `dtype`, to model.safetensors; to several files with an index if they are large.

    Raises ValueError where a finite number is beyond the range of `dtype`.
    """
    files: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total, size = 0, 0

    def flush() -> None:
        part = folder / f"{len(files)}.part"
        save_file(pending, part, metadata={"format": "pt"})
        part.chmod(0o666 & ~_umask())  # the library makes it private
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        rounded = np.ascontiguousarray(_rounded(name, tensor, dtype))
        if pending and size + rounded.nbytes > max_file_bytes:
            flush()
            size = 0
        pending[name] = rounded
        size, total = size + rounded.nbytes, total + rounded.nbytes
    flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _rounded(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below
        rounded = tensor.astype(DTYPES[dtype])
    if dtype == "float16" and not np.isfinite(rounded).all() and np.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds numbers beyond the range of float16; write bfloat16 or float32")
    return rounded


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
