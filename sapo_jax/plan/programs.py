"""The package's own jitted functions, lowered from shapes alone.

Nothing is allocated and nothing runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.batch import Batch, Params
from sapo_jax.config import Config
from sapo_jax.distributed import sharding
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.state import abstract_params, abstract_state
from sapo_jax.learner.update import make_optimizer, make_update, policy_loss, state_shardings
from sapo_jax.models import Policy, make_policy
from sapo_jax.ops.attention import cache_page_size
from sapo_jax.ops.attention_xla import BLOCK
from sapo_jax.plan.decode_trips import decode_trips
from sapo_jax.plan.loops import OpenTrips
from sapo_jax.plan.units import GiB
from sapo_jax.plan.workload import Workload
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.rollout.cache_width import cache_widths
from sapo_jax.rollout.decode import decode
from sapo_jax.rollout.packing import bucket
from sapo_jax.rollout.sampler import fill_slots, prefill

NO_STOP = (-1,)  # no token ends a completion: all have their full length
PAD_ID = 0
SAMPLING = ("prefill", "decode")  # the functions that each replica runs by itself
FUNCTIONS = ("update", "score", *SAMPLING)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with: trees of ShapeDtypeStructs."""

    function: Any  # made by jax.jit
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions of a run on a mesh, to be lowered.

    The mesh is in scope for tracing alone: nothing can run on the devices of a topology.
    """

    cfg: Config
    mesh: jax.sharding.Mesh

    @property
    def work(self) -> Workload:
        """The shapes of an RL iteration."""
        return Workload.of(self.cfg)

    @functools.cached_property
    def policy(self) -> Policy:
        """The model without parameters."""
        return make_policy(self.cfg.model)

    @functools.cached_property
    def params(self) -> Params:
        """The abstract parameters, laid out over the mesh."""
        return abstract_params(self.policy, self.mesh)

    @property
    def moment_bytes(self) -> int:
        """Bytes of AdamW's two moments on one device."""
        return 2 * sum(_local_bytes(leaf) for leaf in jax.tree.leaves(self.params))

    # ------------------------------------------------------------ which devices run a function

    def running(self, name: str) -> Programs:
        """The programs of those devices that run this function together, as runs have it.

        Scoring and updates run on the whole mesh. A rollout runs on each replica by itself.
        """
        return self.replica if name in SAMPLING else self

    @functools.cached_property
    def replica(self) -> Programs:
        """The programs of one replica of the parameters, with its part of the prompts and slots."""
        rollout = self.cfg.rollout
        num_replicas = len(self.mesh.devices)
        part = dataclasses.replace(
            rollout,
            prompts_per_step=rollout.prompts_in_flight // num_replicas,
            prompts_at_once=0,
            slots=math.ceil(rollout.slots / num_replicas),
        )
        cfg = dataclasses.replace(self.cfg, rollout=part)
        return Programs(cfg, sharding.replicas(self.mesh)[0])

    # ------------------------------------------------------------ what a plan asks for

    def program(self, name: str) -> Program:
        """The program of one of FUNCTIONS."""
        if name == "update":
            return self._update()
        if name == "score":
            return self._score()
        if name == "prefill":
            return self._prefill()
        if name == "decode":
            return self._decode()
        raise ValueError(f"there is no function {name!r}")

    def lower(self, name: str) -> jax.stages.Lowered:
        """Raises ValueError where the arrays do not divide over the mesh."""
        program = self.program(name)
        platform = self.mesh.devices.flat[0].platform
        with jax.set_mesh(self.mesh):
            traced = program.function.trace(*program.arguments)
            return traced.lower(lowering_platforms=(platform,))

    def largest_arguments(self, name: str, n: int = 5) -> list[str]:
        """The function's largest arguments on one device: size, global shape, path."""
        leaves = jax.tree.leaves_with_path(self.program(name).arguments)
        largest = sorted(leaves, key=lambda item: -_local_bytes(item[1]))[:n]
        lines = []
        for path, leaf in largest:
            size = f"{_local_bytes(leaf) / GiB:.3f} GiB"
            shape = f"{leaf.dtype}{list(leaf.shape)}"
            lines.append(f"{size}  {shape}  argument{jax.tree_util.keystr(path)}")
        return lines

    def open_trips(self, name: str) -> OpenTrips:
        """How often those loops of the function run that end on data.

        Except in decoding, these are the loops of attention in blocks (not on TPU); they are
        counted as if all blocks were visible.
        """
        if name == "decode":
            return decode_trips(self.work, self.page).open_loops()
        if name == "prefill":
            tokens = bucket(self.work.prompt_tokens)
        else:
            tokens = self.work.row_tokens
        return math.ceil(tokens / BLOCK)

    @property
    def live_cache_fraction(self) -> float:
        """The share of the KV cache's columns that hold keys of a live row.

        It is the average over a rollout whose completions all have C tokens.
        """
        work = self.work
        some_wait = work.sequences > work.slots
        prompt_columns = bucket(work.prompt_tokens)
        columns = cache_widths(prompt_columns, work.new_tokens, some_wait, self.page)[-1]
        live_columns = work.prompt_tokens + (work.new_tokens + self.page) / 2
        return min(1.0, live_columns / columns)

    @property
    def page(self) -> int:
        """Columns of the KV cache that decoding fetches at a time, on this mesh."""
        model = self.cfg.model
        with jax.set_mesh(self.mesh):
            return cache_page_size(model.head_dim, jnp.dtype(model.compute_dtype))

    # ------------------------------------------------------------ the functions

    def _update(self) -> Program:
        """The optimiser step on a mini-batch, as learner.update makes it."""
        cfg = self.cfg
        total_steps = cfg.train.steps * cfg.train.mini_batches * cfg.train.epochs
        optimizer = make_optimizer(cfg.optimizer, total_steps)
        placed = state_shardings(self.policy, optimizer, self.mesh)
        update = make_update(
            self.policy, optimizer, policy_loss(cfg), cfg.train.micro_batch, placed
        )
        state = abstract_state(self.policy, optimizer, self.mesh)
        batch = self._mini_batch(
            with_old_logp=True, with_experts=cfg.train.routing_replay != "none"
        )
        return Program(update, (state, batch))

    def _score(self) -> Program:
        """The scoring pass of the old policy on a mini-batch, as learner.scoring makes it."""
        cfg = self.cfg
        scorer = make_scorer(
            self.policy,
            cfg.rollout.temperature,
            cfg.train.micro_batch,
            record_routing=cfg.train.routing_replay == "r2",
        )
        batch = self._mini_batch(with_old_logp=False, with_experts=cfg.train.routing_replay == "r3")
        return Program(scorer, (self.params, batch))

    def _mini_batch(self, *, with_old_logp: bool, with_experts: bool) -> Batch:
        """A mini-batch, abstract, split over the mesh. What the old policy makes is optional."""
        work = self.work
        model = self.cfg.model
        loss = self.cfg.loss
        T = work.row_tokens
        M = work.picked
        sparse_layers = sum(model.sparse_layers)

        def rows_of(dtype: Any, *shape: int) -> Any:
            return _split_over_batch(self.mesh, dtype, work.rows, *shape)

        int_BT = rows_of(jnp.int32, T)
        float_BT = rows_of(jnp.float32, T)
        int_BM = rows_of(jnp.int32, M)
        id_dtype = np.min_scalar_type(model.num_experts)
        ids_BTLk = rows_of(id_dtype, T, sparse_layers, model.num_experts_per_tok)

        optional = {}
        if with_old_logp:
            optional["old_logp_BT"] = float_BT
        if with_old_logp and loss.kl_coef > 0:
            optional["ref_logp_BT"] = float_BT
        if with_old_logp and loss.correction != "none":
            optional["correction_BT"] = float_BT
        if with_old_logp and loss.sequence_mask is not None:
            optional["sampler_logp_BT"] = float_BT
        if with_experts:
            optional["expert_ids_BTLk"] = ids_BTLk
        return Batch(
            tokens_BT=int_BT,
            positions_BT=int_BT,
            segment_ids_BT=int_BT,
            prefix_ids_BT=int_BT,
            mask_BT=rows_of(jnp.bool_, T),
            picked_BM=int_BM,
            source_BM=int_BM,
            adv_BT=float_BT,
            weight_BT=float_BT,
            **optional,
        )

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The run's sampler, but that no token ends a completion."""
        rollout = self.cfg.rollout
        return Sampler(
            policy=self.policy,
            sampling=SamplingParams(
                rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p
            ),
            group_size=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=NO_STOP,
            pad_id=PAD_ID,
            record_routing=self.cfg.train.routing_replay == "r3",
            slots=rollout.slots,
        )

    def _prompts(self) -> tuple[Any, ...]:
        """What `prefill` takes beside the parameters.

        That is: tokens, lengths and indices of prompts, limits of completions, and a random key.
        """
        work = self.work
        P = work.prompts
        S = bucket(work.prompt_tokens)
        tokens_PS = _split_over_batch(self.mesh, jnp.int32, P, S)
        length_P = _split_over_batch(self.mesh, jnp.int32, P)
        index_P = _split_over_batch(self.mesh, jnp.uint32, P)
        limit_N = _split_over_batch(self.mesh, jnp.int32, work.sequences)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return tokens_PS, length_P, index_P, limit_N, key

    def _prefill(self) -> Program:
        """Each prompt passes the model once."""

        def run(params, *prompts):
            return prefill(self.sampler, self.policy.bind(params), *prompts)

        return Program(jax.jit(run), (self.params, *self._prompts()))

    def _decode(self) -> Program:
        """The decode loop over all completions of the mesh, from what prefill leaves."""
        sampler = self.sampler

        def requests_of(params, *prompts):
            requests, _ = prefill(sampler, self.policy.bind(params), *prompts)
            return requests

        def run(params, requests):
            slots = fill_slots(sampler, requests)
            done = decode(
                self.policy.bind(params), requests, slots, sampler.sampling, NO_STOP, narrow=False
            )
            # The cache is not among the results: it ends with the loop.
            return done.tokens_NC, done.logp_NC, done.length_N, done.expert_ids_NCLk

        shapes = jax.eval_shape(requests_of, self.params, *self._prompts())
        batch_sharding = sharding.batch_sharding(self.mesh)
        cache_sharding = sharding.shardings(self.mesh, ("batch", "kv_heads", None, None))

        def split_rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if x.ndim == 0:
                return jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding)

        def split_heads(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cache_sharding)

        requests = jax.tree.map(split_rows, shapes)
        cache = dataclasses.replace(
            requests.cache,
            k=tuple(split_heads(layer) for layer in requests.cache.k),
            v=tuple(split_heads(layer) for layer in requests.cache.v),
        )
        return Program(jax.jit(run), (self.params, dataclasses.replace(requests, cache=cache)))


def _split_over_batch(mesh: jax.sharding.Mesh, dtype: Any, rows: int, *shape: int) -> Any:
    """A ShapeDtypeStruct that stands for an array whose leading dim, the rows, the mesh splits."""
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.batch_sharding(mesh))


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    shape = x.shape
    if x.sharding is not None:
        shape = x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize
