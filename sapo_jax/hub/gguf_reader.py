"""Reading a GGUF file: THE one place that depends on internals of the `gguf` package.

`gguf.GGUFReader` takes what it finds before the end of the file, whatever length the file
announces: a truncated string is a shorter string, and an array of 2^60 numbers in a damaged file is
a loop of 2^60 steps. So `_get`, through which it reads everything but which it calls internal, is
overridden to refuse what lies beyond the end. `tests/hub/test_gguf_reader.py` says what to do when
a new version of the package reads in another way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.errors import GGUFError

# What the package raises for files that are not as they should be.
_DAMAGE = (EOFError, IndexError, KeyError, OverflowError, RecursionError, ValueError)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the metadata fields of a file, both by name.

    The first are `gguf.ReaderTensor`s, whose values are mapped into memory and not yet dequantised;
    the second `gguf.ReaderField`s. Raises GGUFError if the package is not installed, or if the file
    cannot be read, is damaged, or has the other byte order.
    """
    try:
        reader_class = bounded_reader_class()
    except ImportError as error:
        problem = "reading it needs the gguf package: pip install 'sapo-jax[gguf]'"
        raise GGUFError(path, [problem]) from error
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise GGUFError(path, ["it is not a file"])
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise EOFError("it does not start with 'GGUF'")
        reader = reader_class(path)
    except OSError as error:
        raise GGUFError(path, [f"cannot be read: {error.strerror}"]) from error
    except _DAMAGE as error:
        problem = f"not a GGUF file, truncated or damaged: {error}"
        raise GGUFError(path, [problem]) from error
    if reader.byte_order != "I":  # the package's letter for the byte order of this machine
        problem = "its byte order is not that of this machine; gguf-convert-endian changes it"
        raise GGUFError(path, [problem])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return tensors, dict(reader.fields)


def bounded_reader_class() -> type:
    """`gguf.GGUFReader`, but it raises EOFError for whatever lies beyond the end of the file."""
    import gguf

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise EOFError(f"it ends at byte {len(self.data)}, in the middle of something")
            return super()._get(offset, dtype, count, override_order)

    return BoundedReader
