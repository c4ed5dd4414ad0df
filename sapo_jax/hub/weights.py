"""Weights in and out of Hugging Face safetensors files; `table.py` says what goes where.

Loading reads, slice by slice, what each device's shard needs, and writes it into the stacked array
in place: no array is ever whole on the host, nor on one device of several.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from sapo_jax.batch import Params
from sapo_jax.config import Model, read_json_object
from sapo_jax.distributed import sharding
from sapo_jax.errors import ModelDirError
from sapo_jax.hub.safetensors_header import TensorHeader, read_header
from sapo_jax.hub.table import (
    EMBEDDING,
    HEAD,
    HubParam,
    TensorKind,
    dim_sizes,
    hub_params,
    tensor_kinds,
)
from sapo_jax.hub.writer import INDEX
from sapo_jax.models import Policy

SUPPORTED_DTYPES = ("F32", "F16", "BF16")  # as a safetensors header spells them
SINGLE_FILE = "model.safetensors"
# Tensors of older files that are no parameters: both are computed from the configuration.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
_ROWS_COMPARED = 4096  # of the embedding and the head at a time


# ---------------------------------------------------------------- the files


class WeightFiles:
    """The safetensors files of a model directory.

    The constructor reads and checks all headers. It raises ModelDirError with ALL that is wrong:
    files that are missing or damaged, or of which it is not clear which are meant; and tensors that
    are missing, unknown, in two files, or of another shape or dtype than `cfg` asks for. It reads
    no tensor, but for an output head that the files bring although `cfg` ties it to the embedding:
    that must equal the embedding.

    notes: sentences about files and tensors that are there and not used.

    A file that `read` needs is opened and stays open until the end of the `with` block around it:
    what was read of an open file is mapped and so counts as memory of this process.
    """

    def __init__(self, folder: str | Path, cfg: Model):
        self.folder = Path(folder)
        self.sizes = dim_sizes(cfg)
        self.notes: list[str] = []
        self._file_of: dict[str, str] = {}  # the name of the file by the name of the tensor
        self._headers: dict[str, TensorHeader] = {}  # by the name of the tensor
        self._open_files: dict[str, safe_open] = {}
        self._exit_stack = contextlib.ExitStack()  # closes the open files
        with self:
            problems = self._read_headers()
            if not problems:
                problems = self._check_tensors(cfg)
            if not problems and cfg.tie_word_embeddings:
                problems = self._check_tied_head()
        if problems:
            raise ModelDirError(folder, problems)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.clear()
        self._exit_stack.close()

    def _file(self, name: str) -> safe_open:
        if name not in self._open_files:
            file = safe_open(self.folder / name, framework="numpy")
            self._open_files[name] = self._exit_stack.enter_context(file)
        return self._open_files[name]

    def _read_headers(self) -> list[str]:
        """Find out which tensor is in which file. Returns what is wrong with the files."""
        file_names, index, problems = _list_files(self.folder)
        self.notes += _unused_files(self.folder, file_names)
        readable_files = set()
        for file_name in file_names:
            try:
                headers = read_header(self.folder / file_name)
                self._file(file_name)
            except FileNotFoundError:
                problems.append(
                    f"{file_name}: {INDEX} names this file, but it is not there; fetch it again"
                )
                continue
            except (SafetensorError, OSError, ValueError) as error:
                problems.append(
                    f"{file_name}: truncated, or not a safetensors file ({error}); fetch it again"
                )
                continue
            readable_files.add(file_name)
            for name, header in headers.items():
                if name in self._file_of:
                    problems.append(f"{file_name}: tensor {name} is in {self._file_of[name]} too")
                self._file_of[name] = file_name
                self._headers[name] = header
        for name, file_name in index.items():
            if file_name in readable_files and name not in self._file_of:
                problems.append(f"{file_name}: {INDEX} says it holds {name}, but it does not")
        return problems

    def _check_tensors(self, cfg: Model) -> list[str]:
        """Compare the tensors of the files with those of the model. Returns what is wrong."""
        expected = dict(tensor_kinds(cfg))
        problems = [f"tensor {name} is missing" for name in expected if name not in self._file_of]
        ignored = set()
        num_buffers = 0
        if cfg.tie_word_embeddings:
            # Some files hold the tied head, too. `_check_tied_head` compares it.
            ignored = {kind.hub_name for kind in HEAD}
        for name, file_name in self._file_of.items():
            where = f"{file_name}: tensor {name}"
            if name not in expected:
                if BUFFERS.search(name):
                    num_buffers += 1
                elif name not in ignored:
                    problems.append(f"{where} is unknown to this model")
                continue
            header = self._headers[name]
            expected_shape = expected[name].hub_shape(self.sizes)
            if header.shape != expected_shape:
                problems.append(
                    f"{where} has the shape {list(header.shape)}, "
                    f"config.json asks for {list(expected_shape)}"
                )
            if header.dtype not in SUPPORTED_DTYPES:
                problems.append(
                    f"{where} has dtype {header.dtype}; supported are {', '.join(SUPPORTED_DTYPES)}"
                )
        if num_buffers > 0:
            self.notes.append(
                f"{num_buffers} tensors rotary_emb.inv_freq or position_ids are not used; the model"
                " computes them from config.json"
            )
        return problems

    def _check_tied_head(self) -> list[str]:
        """Compare an output head in the files with the embedding that `cfg` ties it to.

        Where they differ, transformers keeps both and unties them, with a warning.
        """
        (head,) = (kind.hub_name for kind in HEAD)
        (embedding,) = (kind.hub_name for kind in EMBEDDING)
        if head not in self._file_of:
            return []
        where = f"{self._file_of[head]}: tensor {head}"
        remedy = (
            "config.json ties the two (tie_word_embeddings); to use the head, set"
            " model.tie_word_embeddings to false"
        )
        if self._headers[head].shape != self._headers[embedding].shape:
            return [f"{where} has another shape than {embedding}, but {remedy}"]
        if self._headers[head].dtype not in SUPPORTED_DTYPES:
            return [f"{where} has dtype {self._headers[head].dtype}, but {remedy}"]
        head_rows = self._file(self._file_of[head]).get_slice(head)
        embedding_rows = self._file(self._file_of[embedding]).get_slice(embedding)
        num_rows = self._headers[head].shape[0]
        for start in range(0, num_rows, _ROWS_COMPARED):
            rows = slice(start, min(start + _ROWS_COMPARED, num_rows))
            head_part = head_rows[rows].astype(np.float32, copy=False)
            embedding_part = embedding_rows[rows].astype(np.float32, copy=False)
            if not np.array_equal(head_part, embedding_part, equal_nan=True):
                return [f"{where} differs from {embedding}, but {remedy}"]
        return []

    def read(self, kind: TensorKind, name: str, cuts: dict[str, slice]) -> np.ndarray:
        """A part of the tensor `name`, as float32 with the dims of our parameter.

        cuts: the slice of each dim that is wanted; a dim that is not named is taken whole.
        Raises ModelDirError if the part holds NaN or infinity, or if the file has changed.
        """
        hub_cuts = []
        part_sizes = dict(self.sizes)
        for outer_dim, *inner_dims in kind.hub_dim_groups():
            # A dim of the hub's like (H h) is cut along its outer dim, in steps of the inner ones.
            cut = cuts.get(outer_dim, slice(None))
            start, stop, _ = cut.indices(self.sizes[outer_dim])
            step = math.prod(self.sizes[dim] for dim in inner_dims)
            hub_cuts.append(slice(start * step, stop * step))
            part_sizes[outer_dim] = stop - start
        file_name = self._file_of[name]
        try:
            part = self._file(file_name).get_slice(name)[tuple(hub_cuts)]
        except (SafetensorError, OSError) as error:
            problem = f"{file_name}: changed while it was read ({error}); fetch the directory again"
            raise ModelDirError(self.folder, [problem]) from error
        part = part.astype(np.float32, copy=False)
        if not np.isfinite(part).all():
            problem = f"{file_name}: tensor {name} holds NaN or infinity; fetch the file again"
            raise ModelDirError(self.folder, [problem])
        return kind.to_param(part, part_sizes)


def _list_files(folder: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """The names of the safetensors files, the index, and what is wrong with either.

    The index is {tensor: file}, or {} if there is no index. Then model.safetensors is the model,
    and if there is none either, all safetensors files of the folder are.
    """
    if not (folder / INDEX).exists():
        if (folder / SINGLE_FILE).exists():
            return [SINGLE_FILE], {}, []
        file_names = sorted(file.name for file in folder.glob("*.safetensors"))
        if not file_names:
            return [], {}, ["there is no *.safetensors file"]
        return file_names, {}, []

    index = read_json_object(folder / INDEX, folder).get("weight_map")
    is_mapping = isinstance(index, dict) and len(index) > 0
    if not is_mapping or not all(isinstance(file_name, str) for file_name in index.values()):
        return [], {}, [f"{INDEX}: weight_map is not a mapping of tensors to files"]
    file_names = sorted(set(index.values()))
    for file_name in file_names:
        if Path(file_name).name != file_name:
            return [], {}, [f"{INDEX}: {file_name!r} is not the name of a file beside it"]
    if (folder / SINGLE_FILE).exists() and SINGLE_FILE not in file_names:
        problem = (
            f"{SINGLE_FILE} lies beside {INDEX}, which names other files: which are the weights?"
            f" (transformers reads {SINGLE_FILE}, others the index.) Remove the one that is stale"
        )
        return [], {}, [problem]
    return file_names, index, []


def _unused_files(folder: Path, file_names: list[str]) -> list[str]:
    """A note about the safetensors files of the folder that are not the model's: adapters, say."""
    there = {file.name for file in folder.glob("*.safetensors")}
    unused = sorted(there - set(file_names))
    if not unused or not file_names:
        return []
    text = ", ".join(unused[:5])
    if len(unused) > 5:
        text += f" and {len(unused) - 5} more"
    return [f"not part of the model and not read: {text}"]


def check_weights(folder: str | Path, cfg: Model) -> list[str]:
    """Sentences about what is there and not used.

    Raises ModelDirError if `load_params` would, for any reason that the files' headers show.
    """
    return WeightFiles(folder, cfg).notes


# ---------------------------------------------------------------- in


def load_params(folder: str | Path, policy: Policy, mesh: jax.sharding.Mesh) -> Params:
    """The parameters in `folder`, float32, each in its shards on the mesh.

    Beyond the parameters themselves, host memory stays below two of the largest tensors (a layer's
    experts count as one), and the mapped pages of one. Raises ModelDirError.
    """
    targets = sharding.shardings(mesh, policy.logical_axes)
    files = WeightFiles(folder, policy.cfg)
    array_of_path = {}
    for param in hub_params(policy.cfg):
        shape = _get(policy.shapes, param.path).shape
        target = _get(targets, param.path)
        if param.stacked:
            array = _load_stacked(files, param, shape, target)
        else:
            array = _load_slice(files, param, 0, shape, target)
        array_of_path[param.path] = array
    return traverse_util.unflatten_dict(array_of_path)


def _get(tree: Any, path: tuple[str | int, ...]) -> Any:
    """The leaf at a path of nested dicts."""
    for key in path:
        tree = tree[key]
    return tree


def _load_stacked(
    files: WeightFiles, param: HubParam, shape: tuple[int, ...], target: NamedSharding
) -> jax.Array:
    """A parameter with a leading dim of layers, which are loaded and put into it one by one."""
    layer_target = NamedSharding(target.mesh, PartitionSpec(*target.spec[1:]))
    # Parameters of the same shape and sharding share these two programs.
    make_zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=target)
    put_layer = jax.jit(
        jax.lax.dynamic_update_index_in_dim,
        static_argnums=3,
        donate_argnums=0,
        out_shardings=target,
    )
    stacked = make_zeros(shape, jnp.float32)
    for i in range(shape[0]):
        layer = _load_slice(files, param, i, shape[1:], layer_target)
        stacked = put_layer(stacked, layer, i, 0)
        # Without this wait the layers to come would be read ahead, into memory.
        stacked.block_until_ready()
    return stacked


def _load_slice(
    files: WeightFiles,
    param: HubParam,
    index: int,
    shape: tuple[int, ...],
    target: NamedSharding,
) -> jax.Array:
    """The index-th layer of a parameter, or all of one that is not stacked."""
    names = param.tensor_names(index)
    dims = param.kind.param_dims.split()

    def read_shard(cuts: tuple[slice, ...] | None) -> np.ndarray:
        assert cuts is not None  # JAX's type allows it; a shard always has an index.
        if param.num_experts == 0:
            return files.read(param.kind, names[0], dict(zip(dims, cuts, strict=True)))
        expert_cut, *inner_cuts = cuts
        cut_of_dim = dict(zip(dims, inner_cuts, strict=True))
        experts = range(*expert_cut.indices(shape[0]))
        shard_shape = [len(range(*c.indices(n))) for c, n in zip(cuts, shape, strict=True)]
        shard = np.empty(shard_shape, np.float32)
        for position, expert in enumerate(experts):
            shard[position] = files.read(param.kind, names[expert], cut_of_dim)
        return shard

    with files:
        return jax.make_array_from_callback(shape, target, read_shard)


# ---------------------------------------------------------------- out


def hub_tensors(params: Params, cfg: Model, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors in Hugging Face's layout, rounded to `dtype`, in the order of `hub_shapes`.

    They are made one after the other, so that one at a time is in memory. Raises ValueError where a
    finite number is beyond the range of `dtype`.
    """
    sizes = dim_sizes(cfg)
    for param in hub_params(cfg):
        array = _get(params, param.path)
        for index in range(param.num_slices):
            if param.stacked:
                part = np.asarray(array[index])
            else:
                part = np.asarray(array)
            tensors = [part]
            if param.num_experts > 0:
                tensors = list(part)
            for name, tensor in zip(param.tensor_names(index), tensors, strict=True):
                with np.errstate(over="ignore"):  # An overflow raises ValueError below.
                    rounded = param.kind.to_hub(tensor, sizes).astype(dtype)
                if np.isfinite(tensor).all() and not np.isfinite(rounded).all():
                    raise ValueError(
                        f"tensor {name} holds numbers beyond the range of {dtype}; "
                        "write float32 instead"
                    )
                yield rounded
