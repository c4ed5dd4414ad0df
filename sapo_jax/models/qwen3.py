"""Qwen3, dense and MoE (arXiv 2505.09388): pre-norm blocks of attention and an MLP or experts.

One set of modules serves the sampler and the scorer. The sampler uses it for prefill, and for
decoding in the form of `decoder`, which takes one token per row. That their log-probabilities agree
is tested (tests/rollout/test_agreement.py). `layers` is a list of stacks of blocks, one for each
run of consecutive layers of the same kind: a single one, unless dense and sparse layers mix.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sapo_jax.config.schema import Model
from sapo_jax.distributed.sharding import constrain, sequence_axis
from sapo_jax.models.attention import Attention, KVCache
from sapo_jax.models.layers import MLP, RMSNorm, parameter
from sapo_jax.models.moe import MoE, Routing
from sapo_jax.models.rope import Rotation, rotation_at
from sapo_jax.ops.attention_xla import SAVED_ATTENTION
from sapo_jax.ops.matmul import decode_matmul
from sapo_jax.ops.moe_xla import SAVED_ROUTES

# What the forward pass of a layer keeps for the backward pass, by the config's `model.remat`.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED_ROUTES, SAVED_ATTENTION),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED_ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerRun(NamedTuple):
    """Consecutive layers of the same kind."""

    sparse: bool
    length: int


def layer_runs(cfg: Model) -> list[LayerRun]:
    """The runs of consecutive layers of the same kind, in order."""
    return [
        LayerRun(sparse, length=len(list(group)))
        for sparse, group in itertools.groupby(cfg.sparse_layers)
    ]


def between_layers(x_BTD: Array) -> Array:
    """Splits the tokens over all axes where nothing mixes them: sums of layers, which the backward
    pass keeps, and norms (sequence parallelism, arXiv 2205.05198, section 4.2.2).
    """
    T = x_BTD.shape[1]
    return constrain(x_BTD, "batch", sequence_axis(T, "sequence_between_layers"), None)


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)) or, if sparse, x + MoE(norm(x))."""

    def __init__(self, cfg: Model, sparse: bool, *, rngs: nnx.Rngs):
        D = cfg.hidden_size
        self.attention_norm = RMSNorm(D, cfg.rms_norm_eps)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(D, cfg.rms_norm_eps)
        self.sparse = sparse
        if sparse:
            self.mlp = MoE(cfg, rngs=rngs)
        else:
            self.mlp = MLP(D, cfg.intermediate_size, cfg.initializer_range, rngs=rngs)

    def __call__(
        self,
        x_BTD: Array,
        rotation: Rotation,
        positions_BT: Array,
        segment_ids_BT: Array,
        prefix_ids_BT: Array | None = None,
        replay_BTk: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array], Routing | None]:
        """Returns x BTD, the keys and values BTKh, and the Routing (None for a dense block)."""
        x_BTD = between_layers(x_BTD)
        with jax.named_scope("attention_norm"):
            normed_BTD = self.attention_norm(x_BTD)
        with jax.named_scope("attention"):
            attended_BTD, kv = self.attention(
                normed_BTD, rotation, positions_BT, segment_ids_BT, prefix_ids_BT
            )
        x_BTD = between_layers(x_BTD + attended_BTD)
        with jax.named_scope("mlp_norm"):
            normed_BTD = self.mlp_norm(x_BTD)
        if isinstance(self.mlp, MoE):
            with jax.named_scope("moe"):
                y_BTD, routing = self.mlp(normed_BTD, segment_ids_BT, replay_BTk)
        else:
            with jax.named_scope("mlp"):
                y_BTD = self.mlp(normed_BTD)
            routing = None
        return between_layers(x_BTD + y_BTD), kv, routing

    def decoder(self, dtype: DTypeLike) -> Callable:
        """`__call__` for one more token in each row, in a decode loop.

        Returns a function of x_BD and of what `Attention.decoder` takes. It returns x BD, the
        layer's keys and values, and expert_ids_Bk (None for a dense block).
        """
        decode_attention = self.attention.decoder(dtype)
        decode_mlp: Callable = self.mlp.decoder(dtype)

        def decode_block(
            x_BD: Array,
            rotation: Rotation,
            k_BKhT: Array,
            v_BKTh: Array,
            cache: KVCache,
            live_B: Array,
        ) -> tuple[Array, Array, Array, Array | None]:
            with jax.named_scope("attention_norm"):
                normed_BD = self.attention_norm(x_BD)
            with jax.named_scope("attention"):
                attended_BD, k_BKhT, v_BKTh = decode_attention(
                    normed_BD, rotation, k_BKhT, v_BKTh, cache, live_B
                )
            x_BD = constrain(x_BD + attended_BD, "batch", None)
            with jax.named_scope("mlp_norm"):
                normed_BD = self.mlp_norm(x_BD)
            if self.sparse:
                with jax.named_scope("moe"):
                    y_BD, expert_ids_Bk = decode_mlp(normed_BD)
            else:
                with jax.named_scope("mlp"):
                    y_BD = decode_mlp(normed_BD)
                expert_ids_Bk = None
            x_BD = constrain(x_BD + y_BD, "batch", None)
            return x_BD, k_BKhT, v_BKTh, expert_ids_Bk

        return decode_block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """Result of a pass over rows of tokens.

    The arrays of `kv` have a leading dim for the layers, those of `routing` for the sparse layers.
    """

    hidden_BTD: Array  # after the final norm; `logits` of it predict the NEXT token
    kv: tuple[Array, Array] | None  # LBTKh each
    routing: Routing | None  # None without a sparse layer


class Decoder(NamedTuple):
    """A model as a decode loop uses it, see `Qwen3.decoder`."""

    blocks: list[Callable]  # see `Block.decoder`
    logits: Callable[[Array], Array]  # BD -> BV, float32
    rotations: Rotation  # of each position, [positions, 1, 1, h/2]


class DecodeStep(NamedTuple):
    """Result of a decode step, see `Qwen3.decode`."""

    hidden_BD: Array  # after the final norm
    cache: KVCache
    expert_ids_BLk: Array | None  # None without a sparse layer


class Qwen3(nnx.Module):
    """Token embedding, blocks, a final norm, and an output head, which may be the embedding."""

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        V = cfg.vocab_size
        D = cfg.hidden_size
        std = cfg.initializer_range
        self.cfg = cfg
        self.embed = parameter(rngs, (V, D), ("vocab", "embed"), std)

        def stack(run: LayerRun) -> Block:
            """A block whose every parameter has a leading dim for the layers of the run."""

            def make_block(layer_rngs: nnx.Rngs) -> Block:
                return Block(cfg, run.sparse, rngs=layer_rngs)

            make_stack = nnx.vmap(make_block, in_axes=0, out_axes=0)
            return nnx.split_rngs(splits=run.length)(make_stack)(rngs)

        self.layers = nnx.List([stack(run) for run in layer_runs(cfg)])
        self.norm = RMSNorm(D, cfg.rms_norm_eps)
        if cfg.tie_word_embeddings:
            self.head = None
        else:
            self.head = parameter(rngs, (V, D), ("vocab", "embed"), std)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.cfg.compute_dtype)

    def head_VD(self) -> Array:
        """The output projection, whose rows are tokens, in compute dtype; the embedding if tied."""
        weight = self.embed if self.head is None else self.head
        return weight[...].astype(self.dtype)

    def logits(self, hidden: Array) -> Array:
        """Next-token logits [..., V], float32."""
        with jax.named_scope("head"):
            return jnp.einsum(
                "...d,vd->...v", hidden, self.head_VD(), preferred_element_type=jnp.float32
            )

    def embedded(self, tokens: Array) -> Array:
        """The tokens' rows of the embedding [..., D], in compute dtype."""
        with jax.named_scope("embed"):
            return self.embed[...].astype(self.dtype)[tokens]

    def rotation(self, positions_BT: Array) -> Rotation:
        """Cosine and sine of the rotary angles at these positions."""
        cfg = self.cfg
        return rotation_at(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)

    # ---------------------------------------------------------------- whole rows

    def forward(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segment_ids_BT: Array,
        prefix_ids_BT: Array | None = None,
        *,
        expert_ids_BTLk: Array | None = None,
        want_kv: bool = False,
    ) -> Forward:
        """Passes whole rows through the layers (scoring, updates, prefill).

        Segments and prefixes: see batch.Batch. expert_ids_BTLk: the experts to send each token to
        (see moe.MoE), one set for each sparse layer. Layers are scanned, so that compile time does
        not grow with depth. `remat` of the config decides what the backward pass computes again.
        Raises ValueError if expert_ids_BTLk does not have the shape that the model needs.
        """
        x_BTD = between_layers(self.embedded(tokens_BT))
        rotation = self.rotation(positions_BT)
        replay_of_runs = self._replay_of_runs(tokens_BT.shape, expert_ids_BTLk)
        kvs = []
        routings = []
        for stack, replay_LBTk in zip(self.layers, replay_of_runs, strict=True):
            graphdef, stacked_state = nnx.split(stack)

            # The default binds the graphdef of this stack.
            def one_layer(x_BTD, layer, graphdef=graphdef):
                layer_state, replay_BTk = layer
                block = nnx.merge(graphdef, layer_state)
                x_BTD, kv, routing = block(
                    x_BTD,
                    rotation,
                    positions_BT,
                    segment_ids_BT,
                    prefix_ids_BT,
                    replay_BTk=replay_BTk,
                )
                if not want_kv:
                    kv = None
                return x_BTD, (kv, routing)

            if self.cfg.remat != "none":
                policy = REMAT_POLICIES[self.cfg.remat]
                one_layer = jax.checkpoint(one_layer, policy=policy, prevent_cse=False)
            x_BTD, (kv, routing) = jax.lax.scan(one_layer, x_BTD, (stacked_state, replay_LBTk))
            kvs.append(kv)
            if routing is not None:
                routings.append(routing)
        with jax.named_scope("final_norm"):
            hidden_BTD = self.norm(x_BTD)
        return Forward(
            hidden_BTD=hidden_BTD,
            kv=_joined(kvs) if want_kv else None,
            routing=_joined(routings) if routings else None,
        )

    def _replay_of_runs(
        self, shape_BT: tuple[int, ...], expert_ids_BTLk: Array | None
    ) -> list[Array | None]:
        """For each run of layers its part of the ids, LBTk.

        It is None for dense layers, and without replay.
        """
        runs = layer_runs(self.cfg)
        if expert_ids_BTLk is None:
            return [None] * len(runs)
        expected = (*shape_BT, sum(self.cfg.sparse_layers), self.cfg.num_experts_per_tok)
        if expert_ids_BTLk.shape != expected:
            raise ValueError(
                f"expert_ids_BTLk has the shape {expert_ids_BTLk.shape}, "
                f"this model needs {expected}"
            )
        ids_LBTk = jnp.moveaxis(expert_ids_BTLk, 2, 0)
        replay_of_runs = []
        start = 0
        for run in runs:
            if not run.sparse:
                replay_of_runs.append(None)
                continue
            end = start + run.length
            replay_of_runs.append(ids_LBTk[start:end])
            start = end
        return replay_of_runs

    # ---------------------------------------------------------------- one token per row

    def blocks(self) -> list[Block]:
        """The layers one by one."""
        blocks = []
        for stack, run in zip(self.layers, layer_runs(self.cfg), strict=True):
            graphdef, stacked_state = nnx.split(stack)
            for i in range(run.length):
                layer_state = jax.tree.map(operator.itemgetter(i), stacked_state)
                blocks.append(nnx.merge(graphdef, layer_state))
        return blocks

    def decoder(self, positions: int) -> Decoder:
        """What `decode` needs, at positions below `positions`.

        It is made once before a loop of decode steps. The loop then holds no slice of a stacked
        array, lays out no weight and computes no cosine.
        """
        multiply_head = decode_matmul(
            self.head_VD().T, None, "decode_vocab", batch_axis="decode_tokens", dtype=jnp.float32
        )

        def decode_logits(hidden_BD: Array) -> Array:
            with jax.named_scope("head"):
                return constrain(multiply_head(hidden_BD), "batch", None)

        return Decoder(
            blocks=[block.decoder(self.dtype) for block in self.blocks()],
            logits=decode_logits,
            rotations=self.rotation(jnp.arange(positions)[:, None]),
        )

    def decode(
        self, decoder: Decoder, tokens_B: Array, positions_B: Array, cache: KVCache, live_B: Array
    ) -> DecodeStep:
        """Passes one token per row, and writes its keys and values to the cache.

        They go to the column `cache.cache_len`, or less than a page before it, see KVCache.
        live_B: whether a row matters; what comes out of others may be anything finite.
        """
        x_BD = constrain(self.embedded(tokens_B), "batch", None)
        rotation = Rotation(
            cos=decoder.rotations.cos[positions_B], sin=decoder.rotations.sin[positions_B]
        )
        k_layers = []
        v_layers = []
        expert_ids = []
        for decode_block, k_BKhT, v_BKTh in zip(decoder.blocks, cache.k, cache.v, strict=True):
            x_BD, k_BKhT, v_BKTh, expert_ids_Bk = decode_block(
                x_BD, rotation, k_BKhT, v_BKTh, cache, live_B
            )
            k_layers.append(k_BKhT)
            v_layers.append(v_BKTh)
            if expert_ids_Bk is not None:
                expert_ids.append(expert_ids_Bk)
        cache = dataclasses.replace(
            cache, k=tuple(k_layers), v=tuple(v_layers), cache_len=cache.cache_len + 1
        )
        with jax.named_scope("final_norm"):
            hidden_BD = self.norm(x_BD)
        return DecodeStep(
            hidden_BD=hidden_BD,
            cache=cache,
            expert_ids_BLk=jnp.stack(expert_ids, axis=1) if expert_ids else None,
        )


def _joined(results_of_runs: list[Any]) -> Any:
    """The results of the runs of layers, put together along their leading dim."""
    if len(results_of_runs) == 1:
        return results_of_runs[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results_of_runs)
