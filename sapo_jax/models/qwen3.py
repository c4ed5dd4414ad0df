"""Qwen3, dense and MoE (arXiv 2505.09388): one block, attention + (MLP or MoE), pre-norm, stacked over layers.

One set of modules serves the sampler (prefill, and `decoder`, their form for one token per row) and the scorer; that
their log-probabilities agree is tested (tests/rollout/test_agreement.py). `layers` is a
list of stacks, one per run of consecutive layers of the same kind: a single one, unless dense and sparse layers mix.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sapo_jax.batch import Array
from sapo_jax.config.schema import Model
from sapo_jax.distributed.sharding import constrain, sequence
from sapo_jax.models.attention import Attention, KVCache
from sapo_jax.models.layers import MLP, RMSNorm, parameter
from sapo_jax.models.moe import MoE, Routing
from sapo_jax.models.rope import rotations
from sapo_jax.ops.attention_xla import ATTENTION
from sapo_jax.ops.matmul import decode_matmul
from sapo_jax.ops.moe_xla import SORTED

REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SORTED, ATTENTION),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def layer_runs(cfg: Model) -> list[tuple[bool, int]]:
    """(sparse, number of layers) of each run of consecutive layers of the same kind."""
    return [(sparse, len(list(group))) for sparse, group in itertools.groupby(cfg.sparse_layers)]


def between_layers(x_BTD: Array) -> Array:
    """Tokens are split over all axes where nothing mixes them: sums of layers, which backward keeps, and norms
    (sequence parallelism, arXiv 2205.05198, section 4.2.2)."""
    return constrain(x_BTD, "batch", sequence(x_BTD.shape[1], "between"), None)


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)) or, if sparse, x + MoE(norm(x))."""

    def __init__(self, cfg: Model, sparse: bool, *, rngs: nnx.Rngs):
        D = cfg.hidden_size
        self.attention_norm = RMSNorm(D, cfg.rms_norm_eps)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(D, cfg.rms_norm_eps)
        self.sparse = sparse
        self.mlp = (
            MoE(cfg, rngs=rngs)
            if sparse
            else MLP(D, cfg.intermediate_size, cfg.initializer_range, rngs=rngs)
        )

    def __call__(
        self, x_BTD, rotations, positions_BT, segment_ids_BT, prefix_ids_BT=None, replay_BTk=None
    ):
        """Returns x BTD, keys and values BTKh, and the Routing (None for a dense block)."""
        x_BTD = between_layers(x_BTD)
        y = self.attention_norm(x_BTD)
        y, kv = self.attention(y, rotations, positions_BT, segment_ids_BT, prefix_ids_BT)
        x_BTD = between_layers(x_BTD + y)
        y = self.mlp_norm(x_BTD)
        y, routing = self.mlp(y, segment_ids_BT, replay_BTk) if self.sparse else (self.mlp(y), None)
        return between_layers(x_BTD + y), kv, routing

    def decoder(self, dtype) -> Callable:
        """`__call__` for one more token in each row: a function of x_BD and of what `Attention.decoder` takes that
        returns x BD, the layer's keys and values, and expert_ids_Bk (None for a dense block)."""
        attend, mlp = self.attention.decoder(dtype), self.mlp.decoder(dtype)

        def block(x_BD, *cached):
            y_BD, k_BKhT, v_BKTh = attend(self.attention_norm(x_BD), *cached)
            x_BD = constrain(x_BD + y_BD, "batch", None)
            y = mlp(self.mlp_norm(x_BD))
            y_BD, ids_Bk = y if self.sparse else (y, None)
            return constrain(x_BD + y_BD, "batch", None), k_BKhT, v_BKTh, ids_Bk

        return block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """Result of a pass over token rows. Arrays of `kv` have a leading dim L, those of `routing` the sparse layers."""

    hidden_BTD: Array  # after the final norm; `logits` of it predict the NEXT token
    kv: tuple[Array, Array] | None  # LBTKh each
    routing: Routing | None  # None without a sparse layer


class Decoder(NamedTuple):
    """A model as a decode loop uses it, see `Qwen3.decoder`."""

    blocks: list[Callable]
    logits: Callable[[Array], Array]  # BD -> BV, float32
    rotations: tuple[Array, Array]  # cos, sin of each position, [positions, 1, 1, h/2]


class Qwen3(nnx.Module):
    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        V, D, std = cfg.vocab_size, cfg.hidden_size, cfg.initializer_range
        self.cfg = cfg
        self.embed = parameter(rngs, (V, D), ("vocab", "embed"), std)

        def stack(sparse: bool, length: int) -> Block:
            """A block whose every parameter has a leading dim of `length` layers."""
            make = nnx.vmap(
                lambda layer_rngs: Block(cfg, sparse, rngs=layer_rngs), in_axes=0, out_axes=0
            )
            return nnx.split_rngs(splits=length)(make)(rngs)

        self.layers = nnx.List([stack(sparse, length) for sparse, length in layer_runs(cfg)])
        self.norm = RMSNorm(D, cfg.rms_norm_eps)
        self.head = (
            None if cfg.tie_word_embeddings else parameter(rngs, (V, D), ("vocab", "embed"), std)
        )

    @property
    def dtype(self):
        return jnp.dtype(self.cfg.compute_dtype)

    def head_VD(self) -> Array:
        """The output projection, rows are tokens; the embedding itself when tied. In compute dtype."""
        return (self.embed if self.head is None else self.head)[...].astype(self.dtype)

    def logits(self, hidden: Array) -> Array:
        """Next-token logits [..., V], float32."""
        return jnp.einsum(
            "...d,vd->...v", hidden, self.head_VD(), preferred_element_type=jnp.float32
        )

    def _start(self, tokens_BT: Array, positions_BT: Array):
        x_BTD = between_layers(self.embed[...].astype(self.dtype)[tokens_BT])
        return x_BTD, rotations(
            positions_BT, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling
        )

    def forward(
        self,
        tokens_BT,
        positions_BT,
        segment_ids_BT,
        prefix_ids_BT=None,
        *,
        expert_ids_BTLk=None,
        want_kv=False,
    ) -> Forward:
        """Pass whole rows through the layers (scoring, updates, prefill). Segments and prefixes: see types.Batch.

        expert_ids_BTLk: the experts to send each token to (see moe.MoE), one set for each sparse layer.
        Layers are scanned: compile time does not grow with depth. `remat` of the config decides what backward redoes.
        """
        x_BTD, rotation = self._start(tokens_BT, positions_BT)
        kvs, routings = [], []
        for run, replay_LBTk in zip(
            self.layers, self._replay(tokens_BT.shape, expert_ids_BTLk), strict=True
        ):
            graphdef, stacked = nnx.split(run)

            def one_layer(x, layer, graphdef=graphdef):
                layer_state, replay_BTk = layer
                block = nnx.merge(graphdef, layer_state)
                x, kv, routing = block(
                    x, rotation, positions_BT, segment_ids_BT, prefix_ids_BT, replay_BTk=replay_BTk
                )
                return x, (kv if want_kv else None, routing)

            if self.cfg.remat != "none":
                one_layer = jax.checkpoint(
                    one_layer, policy=REMAT[self.cfg.remat], prevent_cse=False
                )
            x_BTD, (kv, routing) = jax.lax.scan(one_layer, x_BTD, (stacked, replay_LBTk))
            kvs.append(kv)
            routings += [] if routing is None else [routing]
        return Forward(
            self.norm(x_BTD),
            _joined(kvs) if want_kv else None,
            _joined(routings) if routings else None,
        )

    def _replay(
        self, shape_BT: tuple[int, int], expert_ids_BTLk: Array | None
    ) -> list[Array | None]:
        """For each run of layers its part of the ids, LBTk; None for dense layers, and without replay."""
        runs = layer_runs(self.cfg)
        if expert_ids_BTLk is None:
            return [None] * len(runs)
        expected = (*shape_BT, sum(self.cfg.sparse_layers), self.cfg.num_experts_per_tok)
        if expert_ids_BTLk.shape != expected:
            raise ValueError(
                f"expert_ids_BTLk has the shape {expert_ids_BTLk.shape}, this model needs {expected}"
            )
        ids_LBTk, parts, start = jnp.moveaxis(expert_ids_BTLk, 2, 0), [], 0
        for sparse, length in runs:
            parts.append(ids_LBTk[start : start + length] if sparse else None)
            start += length * sparse
        return parts

    def blocks(self) -> list[Block]:
        """The layers one by one."""
        blocks = []
        for run, (_, length) in zip(self.layers, layer_runs(self.cfg), strict=True):
            graphdef, stacked = nnx.split(run)
            blocks += [
                nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked))
                for i in range(length)
            ]
        return blocks

    def decoder(self, positions: int) -> Decoder:
        """For `decode` at positions below this. Made once before a loop of it, which then holds no slice of a stacked
        array, lays out no weight and computes no cosine."""
        head = decode_matmul(
            self.head_VD().T, None, "decode_vocab", rows="decode_tokens", dtype=jnp.float32
        )
        table = jnp.arange(positions)[:, None]
        return Decoder(
            [block.decoder(self.dtype) for block in self.blocks()],
            lambda hidden_BD: constrain(head(hidden_BD), "batch", None),
            rotations(table, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling),
        )

    def decode(
        self, decoder: Decoder, tokens_B: Array, positions_B: Array, cache: KVCache, live_B: Array
    ):
        """Pass one token per row, writing its keys and values to column `cache.cache_len` (or before it: KVCache).

        live_B: whether a row matters; what comes out of others may be anything finite.
        Returns the hidden state BD, the new cache, and expert_ids_BLk (None when dense).
        """
        x_BD = constrain(self.embed[...].astype(self.dtype)[tokens_B], "batch", None)
        rotation, kvs, ids = tuple(table[positions_B] for table in decoder.rotations), [], []
        for block, k_BKhT, v_BKTh in zip(decoder.blocks, cache.k, cache.v, strict=True):
            x_BD, *kv, ids_Bk = block(x_BD, rotation, k_BKhT, v_BKTh, cache, live_B)
            kvs.append(kv)
            ids += [] if ids_Bk is None else [ids_Bk]
        k, v = (tuple(x) for x in zip(*kvs, strict=True))
        cache = dataclasses.replace(cache, k=k, v=v, cache_len=cache.cache_len + 1)
        return self.norm(x_BD), cache, jnp.stack(ids, axis=1) if ids else None


def _joined(stacks: list):
    """The results of the runs of layers, put together along their leading dim."""
    return stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
