"""Weights between Hugging Face safetensors and our parameters: one table, both directions.

The hub keeps a linear map as [out, in] and one tensor per layer and expert; ours are [in, out], with heads as a dim of
their own, and the layers of one kind stacked (see `qwen3`). Loading reads, slice by slice, what each device's shard
needs and writes it into the stacked array in place: no array is ever whole on the host, nor on one device of several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from sapo_jax.batch import Params
from sapo_jax.config import Model, read_json_object
from sapo_jax.distributed import sharding
from sapo_jax.errors import ModelDirError
from sapo_jax.hub.writer import INDEX
from sapo_jax.models import Policy

DTYPES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor. Dims are named as in types.py; `(H h)` is one dim of the hub's that is two of ours."""

    ours: str  # dotted path in the parameters; in a layer, relative to it
    hub: str  # the tensor's name; in a layer, relative to it; {e} stands for the expert's number
    hub_dims: str
    our_dims: str


TOP = (
    Row("embed", "model.embed_tokens.weight", "V D", "V D"),
    Row("norm.scale", "model.norm.weight", "D", "D"),
)
HEAD = (Row("head", "lm_head.weight", "V D", "V D"),)
ATTENTION = (
    Row("attention_norm.scale", "input_layernorm.weight", "D", "D"),
    Row("attention.q", "self_attn.q_proj.weight", "(H h) D", "D H h"),
    Row("attention.k", "self_attn.k_proj.weight", "(K h) D", "D K h"),
    Row("attention.v", "self_attn.v_proj.weight", "(K h) D", "D K h"),
    Row("attention.o", "self_attn.o_proj.weight", "D (H h)", "H h D"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "D", "D"),
)
BIAS = (
    Row("attention.q_bias", "self_attn.q_proj.bias", "(H h)", "H h"),
    Row("attention.k_bias", "self_attn.k_proj.bias", "(K h)", "K h"),
    Row("attention.v_bias", "self_attn.v_proj.bias", "(K h)", "K h"),
    Row("attention.o_bias", "self_attn.o_proj.bias", "D", "D"),
)
QK_NORM = (
    Row("attention.q_norm.scale", "self_attn.q_norm.weight", "h", "h"),
    Row("attention.k_norm.scale", "self_attn.k_norm.weight", "h", "h"),
)
DENSE = (
    Row("mlp.gate", "mlp.gate_proj.weight", "F D", "D F"),
    Row("mlp.up", "mlp.up_proj.weight", "F D", "D F"),
    Row("mlp.down", "mlp.down_proj.weight", "D F", "F D"),
)
SPARSE = (
    Row("mlp.router", "mlp.gate.weight", "E D", "D E"),
    Row("mlp.gate", "mlp.experts.{e}.gate_proj.weight", "f D", "D f"),
    Row("mlp.up", "mlp.experts.{e}.up_proj.weight", "f D", "D f"),
    Row("mlp.down", "mlp.experts.{e}.down_proj.weight", "D f", "f D"),
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays and the tensors it is made of: one, or one per layer, or per layer and expert.

    Its dims are [layer, expert, *row.our_dims], the first two where there are several layers, experts.
    """

    row: Row
    path: tuple[str | int, ...]
    prefixes: tuple[str, ...]  # "" or "model.layers.{i}." of each layer
    experts: int  # 0: the row is not one of experts

    @property
    def stacked(self) -> bool:
        return self.prefixes != ("",)

    def names(self, layer: int) -> list[str]:
        """The tensors of a layer."""
        name = self.prefixes[layer] + self.row.hub
        return [name.format(e=e) for e in range(self.experts)] if self.experts else [name]


def leaves(cfg: Model) -> list[Leaf]:
    """All our arrays, in the order of the hub's tensors."""
    per_layer = ATTENTION + BIAS * cfg.attention_bias + QK_NORM * cfg.qk_norm
    found = [Leaf(row, _path(row), ("",), 0) for row in TOP]
    numbers = itertools.count()
    for run, (sparse, group) in enumerate(itertools.groupby(cfg.sparse_layers)):
        prefixes = tuple(f"model.layers.{next(numbers)}." for _ in group)
        for row in per_layer + (SPARSE if sparse else DENSE):
            experts = cfg.num_experts if "{e}" in row.hub else 0
            found.append(Leaf(row, ("layers", run, *_path(row)), prefixes, experts))
    return found + [Leaf(row, _path(row), ("",), 0) for row in HEAD * (not cfg.tie_word_embeddings)]


def _path(row: Row) -> tuple[str, ...]:
    return tuple(row.ours.split("."))


def sizes(cfg: Model) -> dict[str, int]:
    """The dims by name."""
    return {
        "V": cfg.vocab_size, "D": cfg.hidden_size, "H": cfg.num_attention_heads, "K": cfg.num_key_value_heads,
        "h": cfg.head_dim, "F": cfg.intermediate_size, "f": cfg.moe_intermediate_size, "E": cfg.num_experts,
    }  # fmt: skip


def _groups(hub_dims: str) -> list[list[str]]:
    """ "(H h) D" -> [["H", "h"], ["D"]]"""
    return [match.strip("()").split() for match in re.findall(r"\([^)]*\)|\S+", hub_dims)]


def hub_shape(row: Row, size: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(size[dim] for dim in group) for group in _groups(row.hub_dims))


def to_ours(row: Row, tensor: np.ndarray, size: dict[str, int]) -> np.ndarray:
    """A tensor of the hub's (or a slice of it; `size` is then the slice's) with our dims."""
    dims = [dim for group in _groups(row.hub_dims) for dim in group]
    return tensor.reshape([size[dim] for dim in dims]).transpose(
        [dims.index(dim) for dim in row.our_dims.split()]
    )


def to_hub(row: Row, array: np.ndarray, size: dict[str, int]) -> np.ndarray:
    dims, ours = [dim for group in _groups(row.hub_dims) for dim in group], row.our_dims.split()
    return array.transpose([ours.index(dim) for dim in dims]).reshape(hub_shape(row, size))


# ---------------------------------------------------------------- the files


class Weights:
    """The safetensors files of a model directory. Headers are read, and checked, at once.

    Raises ModelDirError with ALL that is wrong: files that are missing or damaged, and tensors that are missing,
    unknown, given twice, or of another shape or dtype than `cfg` asks for. The tensors themselves are not read yet.
    `read` opens their files until the end of a `with`: what was read of an open file counts as this process's memory.
    """

    def __init__(self, folder: str | Path, cfg: Model):
        self.folder, self.size = Path(folder), sizes(cfg)
        self._stack = contextlib.ExitStack()  # of the files that are open
        self._open: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}  # by tensor
        with self:
            if problems := self._index() or self._compare(cfg):
                raise ModelDirError(folder, problems)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(
                safe_open(self.folder / name, framework="numpy")
            )
        return self._open[name]

    def _index(self) -> list[str]:
        names, indexed, problems = _file_names(self.folder)
        opened = set()
        for name in names:
            try:
                keys = list(self._file(name).keys())
            except FileNotFoundError:
                problems.append(
                    f"{name}: {INDEX} names this file, but it is not there; fetch it again"
                )
                continue
            except (SafetensorError, OSError) as error:
                problems.append(
                    f"{name}: truncated, or not a safetensors file ({error}); fetch it again"
                )
                continue
            opened.add(name)
            for key in keys:
                if key in self._file_of:
                    problems.append(f"{name}: tensor {key} is in {self._file_of[key]} too")
                self._file_of[key] = name
        lost = [
            (key, name)
            for key, name in indexed.items()
            if name in opened and key not in self._file_of
        ]
        return problems + [
            f"{name}: {INDEX} says it holds {key}, but it does not" for key, name in lost
        ]

    def _compare(self, cfg: Model) -> list[str]:
        expected = {
            name: leaf.row
            for leaf in leaves(cfg)
            for i in range(len(leaf.prefixes))
            for name in leaf.names(i)
        }
        problems = [f"tensor {name} is missing" for name in expected if name not in self._file_of]
        optional = (
            {row.hub for row in HEAD} if cfg.tie_word_embeddings else set()
        )  # some files hold the tied head too
        for name, file in self._file_of.items():
            where, row = f"{file}: tensor {name}", expected.get(name)
            if row is None:
                problems += [] if name in optional else [f"{where} is unknown to this model"]
                continue
            slice_ = self._file(file).get_slice(name)
            shape, wanted = tuple(slice_.get_shape()), hub_shape(row, self.size)
            if shape != wanted:
                problems.append(
                    f"{where} has the shape {list(shape)}, config.json asks for {list(wanted)}"
                )
            if slice_.get_dtype() not in DTYPES:
                problems.append(
                    f"{where} has dtype {slice_.get_dtype()}; supported are {', '.join(DTYPES)}"
                )
        return problems

    def read(self, row: Row, name: str, index: dict[str, slice]) -> np.ndarray:
        """The part of a tensor at `index` (a slice by dim; a dim that is not named is taken whole), float32, our dims.

        Raises ModelDirError if it holds a number that is not finite, or if its file is no longer what it was.
        """
        hub_index, size = [], dict(self.size)
        for first, *rest in _groups(row.hub_dims):
            inner = math.prod(self.size[dim] for dim in rest)
            cut = index.get(first, slice(None)).indices(self.size[first])
            size[first] = cut[1] - cut[0]
            hub_index.append(slice(cut[0] * inner, cut[1] * inner))
        file = self._file_of[name]
        try:
            tensor = (
                self._file(file).get_slice(name)[tuple(hub_index)].astype(np.float32, copy=False)
            )
        except (SafetensorError, OSError) as error:
            problem = f"{file}: changed while it was read ({error}); fetch the directory again"
            raise ModelDirError(self.folder, [problem]) from error
        if not np.isfinite(tensor).all():
            raise ModelDirError(
                self.folder, [f"{file}: tensor {name} holds NaN or infinity; fetch the file again"]
            )
        return to_ours(row, tensor, size)


def _file_names(folder: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """The safetensors files, {tensor: file} of the index if there is one, and what is wrong with either."""
    if (folder / INDEX).is_file():
        indexed = read_json_object(folder / INDEX, folder).get("weight_map")
        if (
            not isinstance(indexed, dict)
            or not indexed
            or not all(isinstance(f, str) for f in indexed.values())
        ):
            return [], {}, [f"{INDEX}: weight_map is not a mapping of tensors to files"]
        if strange := sorted({name for name in indexed.values() if Path(name).name != name}):
            return [], {}, [f"{INDEX}: {strange[0]!r} is not the name of a file beside it"]
        return sorted(set(indexed.values())), indexed, []
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    return names, {}, [] if names else ["there is no *.safetensors file"]


def check_weights(folder: str | Path, cfg: Model) -> None:
    """Raise ModelDirError if `load_params` would, for any reason that the files' headers show."""
    Weights(folder, cfg)


# ---------------------------------------------------------------- in


def load_params(folder: str | Path, policy: Policy, mesh: jax.sharding.Mesh) -> Params:
    """The parameters in `folder`, float32, each in its shards on the mesh.

    Host memory beyond the parameters themselves stays below two of the largest tensors (a layer's experts count as
    one), and the pages of one that are mapped. Raises ModelDirError.
    """
    placed, weights = sharding.shardings(mesh, policy.logical_axes), Weights(folder, policy.cfg)
    params: Params = {}
    for leaf in leaves(policy.cfg):
        shape, target = _at(policy.shapes, leaf.path).shape, _at(placed, leaf.path)
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), leaf.path[:-1], params)
        node[leaf.path[-1]] = _load_stack(weights, leaf, shape, target)
    return params


def _at(tree: Params, path: tuple[str | int, ...]):
    return functools.reduce(lambda node, key: node[key], path, tree)


def _load_stack(
    weights: Weights, leaf: Leaf, shape: tuple[int, ...], target: NamedSharding
) -> jax.Array:
    if not leaf.stacked:
        return _load_layer(weights, leaf, 0, shape, target)
    layer_target = NamedSharding(target.mesh, PartitionSpec(*target.spec[1:]))
    whole = jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=target)()
    put = jax.jit(
        jax.lax.dynamic_update_index_in_dim,
        static_argnums=3,
        donate_argnums=0,
        out_shardings=target,
    )
    for i in range(shape[0]):
        whole = put(whole, _load_layer(weights, leaf, i, shape[1:], layer_target), i, 0)
        whole.block_until_ready()  # or else the layers to come would be read ahead, into memory
    return whole


def _load_layer(
    weights: Weights, leaf: Leaf, layer: int, shape: tuple[int, ...], target: NamedSharding
) -> jax.Array:
    names, dims = leaf.names(layer), leaf.row.our_dims.split()

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if not leaf.experts:
            return weights.read(leaf.row, names[0], dict(zip(dims, index, strict=True)))
        cuts = dict(zip(dims, index[1:], strict=True))
        first, last, _ = index[0].indices(shape[0])
        found = np.empty(
            [len(range(*cut.indices(n))) for cut, n in zip(index, shape, strict=True)], np.float32
        )
        for e in range(first, last):
            found[e - first] = weights.read(leaf.row, names[e], cuts)
        return found

    with weights:
        return jax.make_array_from_callback(shape, target, shard)


# ---------------------------------------------------------------- out


def hub_shapes(cfg: Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the hub's layout, in the order of `hub_tensors`."""
    size = sizes(cfg)
    return {
        name: hub_shape(leaf.row, size)
        for leaf in leaves(cfg) for i in range(len(leaf.prefixes)) for name in leaf.names(i)
    }  # fmt: skip


def hub_tensors(params: Params, cfg: Model, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors in the hub's layout, one after the other, rounded to `dtype`.

    Raises ValueError where a finite number is beyond the range of `dtype`.
    """
    size = sizes(cfg)
    for leaf in leaves(cfg):
        array = _at(params, leaf.path)
        for i in range(len(leaf.prefixes)):
            layer = np.asarray(array[i] if leaf.stacked else array)
            for name, part in zip(leaf.names(i), layer if leaf.experts else [layer], strict=True):
                with np.errstate(over="ignore"):  # told below
                    rounded = to_hub(leaf.row, part, size).astype(dtype)
                if np.isfinite(part).all() and not np.isfinite(rounded).all():
                    raise ValueError(
                        f"tensor {name} holds numbers beyond the range of {dtype}; write float32 instead"
                    )
                yield rounded
