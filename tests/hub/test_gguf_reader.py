"""The one private method of the `gguf` package that we override, and what to do when it is gone."""

from __future__ import annotations

import inspect

import gguf
import pytest

from sapo_jax.hub import gguf_reader
from tests.hub import gguf_files as files

HELP = """
`gguf.GGUFReader` no longer reads through `_get(offset, dtype, count, override_order)`, so nothing
keeps it from reading past the end of a truncated file. What to do:
1. Until it is repaired, keep the older version: `gguf` in the extras of pyproject.toml.
2. In gguf/gguf_reader.py of the new version, find the method through which all of the file is read
   (it slices `self.data`), or a check of lengths that the package may have by now.
3. Override that method in sapo_jax/hub/gguf_reader.py with the same check, or drop the override.
4. tests/hub/test_gguf_errors.py must pass: a file that is cut off at any byte is refused, and
   random damage raises nothing but GGUFError.
"""


def test_the_package_still_has_the_method_that_we_override():
    signature = inspect.signature(gguf.GGUFReader._get)
    names = ["self", "offset", "dtype", "count", "override_order"]
    assert list(signature.parameters) == names, HELP


def test_the_package_still_reads_everything_through_it(tmp_path):
    """Every byte that the reader hands out lies in a range that `_get` was asked for."""
    path = files.model_file(tmp_path / "x.gguf", "llama", files.Kind.Q8_0)
    asked = []

    class Watched(gguf_reader.bounded_reader_class()):
        def _get(self, offset, dtype, count=1, override_order=None):
            array = super()._get(offset, dtype, count, override_order)
            asked.append((int(offset), int(offset) + array.nbytes))
            return array

    reader = Watched(path)
    assert asked, HELP
    read_to_end = {end for _, end in asked}
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        assert (int(tensor.data_offset), end) in asked, HELP
    metadata = [(a, b) for a, b in asked if a < reader.data_offset]
    covered = 0
    for start, end in sorted(metadata):
        assert start <= covered, f"bytes {covered} to {start} of the metadata\n{HELP}"
        covered = max(covered, end)
    assert covered > 0.9 * reader.data_offset, HELP  # up to the padding before the tensors
    assert max(read_to_end) <= path.stat().st_size


def test_what_lies_beyond_the_end_is_refused(tmp_path):
    path = files.model_file(tmp_path / "x.gguf", "llama")
    reader = gguf_reader.bounded_reader_class()(path)
    size = path.stat().st_size
    assert len(reader._get(size - 4, "uint8", 4)) == 4
    for offset, count in ((size - 4, 5), (size, 1), (0, 2**60)):
        with pytest.raises(EOFError, match=f"it ends at byte {size},"):
            reader._get(offset, "uint8", count)
