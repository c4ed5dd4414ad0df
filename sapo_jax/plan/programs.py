"""The package's own jitted functions, lowered from shapes alone: nothing is allocated, nothing runs."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from sapo_jax.batch import Batch
from sapo_jax.config import Config
from sapo_jax.distributed import sharding
from sapo_jax.errors import PlanError
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import (
    init_state,
    make_optimizer,
    make_update,
    policy_loss,
    state_shardings,
)
from sapo_jax.models import Policy, make_policy
from sapo_jax.ops import attention as kernels
from sapo_jax.ops.attention_xla import BLOCK
from sapo_jax.plan.chips import GiB
from sapo_jax.plan.costs import Loop, OpenTrips
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.rollout.cache_width import growth, widths
from sapo_jax.rollout.decode import decode, phases
from sapo_jax.rollout.packing import FEWEST_PICKED, bucket
from sapo_jax.rollout.sampler import fill_slots, prefill

NO_STOP = (-1,)  # no token ends a completion: all have their full length
SAMPLING = "prefill", "decode"
FUNCTIONS = "update", "score", *SAMPLING


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes of one RL iteration when every prompt and completion has its largest length, in rows of one sequence, or
    of row_tokens."""

    prompts: int  # P
    sequences: int  # B = P * G
    slots: int  # R, completions that are written at a time
    prompt_tokens: int  # S
    new_tokens: int  # C
    row_tokens: int  # T
    picked: int  # M
    rows: int  # of a mini-batch
    mini_batches: int

    @classmethod
    def of(cls, cfg: Config) -> Workload:
        P, G = cfg.rollout.prompts_per_step, cfg.rollout.group_size
        S, C = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
        T = cfg.train.row_tokens or bucket(S + C)
        per_row = T // (S + C)
        rows = -(-P * G // cfg.train.mini_batches // per_row)
        R, picked = (
            min(cfg.rollout.slots or P * G, P * G),
            min(bucket(per_row * C, FEWEST_PICKED), T),
        )
        return cls(P, P * G, R, S, C, T, picked, rows, cfg.train.mini_batches)

    def decode_steps(self, mean_tokens: float) -> float:
        """Of the decode loop, for completions of `mean_tokens` on average and C at most. An estimate where completions
        wait for slots: all tokens over all slots, and at the end what a longest one has beyond the mean. That the
        last round may not fill them is not in it."""
        N, R, C = self.sequences, self.slots, self.new_tokens
        return C if R == N else N / R * mean_tokens + C - mean_tokens


def mesh_of(cfg: Config, devices: list[jax.Device]) -> jax.sharding.Mesh:
    """The config's mesh over all the devices, laid onto their torus. Raises PlanError where the sizes do not fit."""
    from jax.experimental import mesh_utils

    sizes = sharding.axis_sizes(cfg.mesh, len(devices))
    if math.prod(sizes) != len(devices):
        given = ", ".join(
            f"mesh.{axis}={size}" for axis, size in zip(sharding.AXES, sizes, strict=True)
        )
        raise PlanError(
            f"{given} makes {math.prod(sizes)} devices, the topology has {len(devices)}"
        )
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(
        placed, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES)
    )


def decode_trips(work: Workload, page: int) -> OpenTrips:
    """How often the loops of decoding run (rollout.decode), for completions of C tokens. Turns of refilling and shifts
    of columns as often as can be; how steps are shared among phases (with pages there is one) is an estimate."""
    S, C, N, R = bucket(work.prompt_tokens), work.new_tokens, work.sequences, work.slots
    columns = [width for _, width in phases(S, C, N, R, narrow=False, page=page)]
    used = [S + page - 2, *columns[:-1]]  # when the phase begins
    steps = [width - begin for begin, width in zip(used[:-1], columns)]
    steps.append(work.decode_steps(C) - sum(steps))
    start = Loop(R)  # requests that get a slot before the first step
    if R == N:
        return start, *map(Loop, steps)
    # once the cache is as wide as it gets, columns are shifted out whenever it is full
    fills = [1] * (len(steps) - 1) + [1 + max(0, steps[-1] - (columns[-1] - used[-1])) / growth(C)]
    share = [n / sum(steps) / fill for n, fill in zip(steps, fills)]  # of the rollout, in a fill
    turns = [
        1 + min(N - R, sum(steps)) * part for part in share
    ]  # as often as there can be a free slot
    nested = lambda fill, turn, part: Loop(
        fill, (Loop(turn, (Loop((N - R) * part / turn), Loop(sum(steps) * part / turn))),)
    )
    return start, *map(nested, fills, turns, share)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Lowers each function for the mesh. The mesh is in scope for tracing alone: nothing can run on its devices."""

    cfg: Config
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def replica(self) -> Programs:
        """Of a replica of the parameters, which samples its share of the prompts by itself (rollout.Sampler)."""
        rollout, n = self.cfg.rollout, len(self.mesh.devices)
        share = dataclasses.replace(
            rollout, prompts_per_step=rollout.prompts_per_step // n, slots=-(-rollout.slots // n)
        )
        return Programs(
            dataclasses.replace(self.cfg, rollout=share), sharding.replicas(self.mesh)[0]
        )

    def of(self, name: str) -> Programs:
        """Those to lower a function with, as runs have it: of the whole mesh, or of each of its replicas."""
        return self.replica if name in SAMPLING else self

    @functools.cached_property
    def policy(self) -> Policy:
        return make_policy(self.cfg.model)

    @functools.cached_property
    def params(self):
        return _placed(self.policy.shapes, sharding.shardings(self.mesh, self.policy.logical_axes))

    @property
    def work(self) -> Workload:
        return Workload.of(self.cfg)

    @property
    def moment_bytes(self) -> int:
        """Of AdamW's two moments on one device."""
        return 2 * sum(map(_local_bytes, jax.tree.leaves(self.params)))

    def lower(self, name: str) -> jax.stages.Lowered:
        """Raises ValueError where the arrays do not divide over the mesh."""
        function, *arguments = getattr(self, f"_{name}")()
        with jax.set_mesh(self.mesh):
            return function.trace(*arguments).lower(
                lowering_platforms=(self.mesh.devices.flat[0].platform,)
            )

    def open_trips(self, name: str) -> OpenTrips:
        """How often the function's loops run that end on data; attention in blocks (not on TPU) as if it saw all."""
        work = self.work
        if name != "decode":
            return -(
                -(bucket(work.prompt_tokens) if name == "prefill" else work.row_tokens) // BLOCK
            )
        return decode_trips(work, self.page)

    @property
    def live(self) -> float:
        """The share of the cache's columns that hold a live row's keys, while completions of C tokens are written."""
        work = self.work
        columns = widths(
            bucket(work.prompt_tokens), work.new_tokens, work.sequences > work.slots, self.page
        )[-1]
        return min(1.0, (work.prompt_tokens + (work.new_tokens + self.page) / 2) / columns)

    @property
    def page(self) -> int:
        with jax.set_mesh(self.mesh):
            return kernels.page(self.cfg.model.head_dim, jnp.dtype(self.cfg.model.compute_dtype))

    def arguments(self, name: str) -> tuple:
        """Of the function: trees of ShapeDtypeStructs."""
        return getattr(self, f"_{name}")()[1:]

    def largest_arguments(self, name: str, n: int = 5) -> list[str]:
        """On one device: size, global shape, path."""
        found = sorted(
            jax.tree.leaves_with_path(self.arguments(name)), key=lambda item: -_local_bytes(item[1])
        )
        return [f"{_local_bytes(x) / GiB:.3f} GiB  {x.dtype}{list(x.shape)}  argument{jax.tree_util.keystr(path)}"
                for path, x in found[:n]]  # fmt: skip

    def _update(self):
        cfg = self.cfg
        tx = make_optimizer(
            cfg.optimizer, cfg.train.steps * cfg.train.mini_batches * cfg.train.epochs
        )
        placed = state_shardings(self.policy, tx, self.mesh)
        state = _placed(jax.eval_shape(lambda p: init_state(p, tx), self.policy.shapes), placed)
        update = make_update(self.policy, tx, policy_loss(cfg), cfg.train.micro_batch, placed)
        return update, state, self._batch(old_logp=True, experts=cfg.train.routing_replay != "none")

    def _score(self):
        replay = self.cfg.train.routing_replay
        record = replay == "r2"
        scorer = make_scorer(
            self.policy,
            self.cfg.rollout.temperature,
            self.cfg.train.micro_batch,
            record_routing=record,
        )
        return scorer, self.params, self._batch(old_logp=False, experts=replay == "r3")

    def _batch(self, *, old_logp: bool, experts: bool) -> Batch:
        work, model = self.work, self.cfg.model
        placed = sharding.batch_sharding(self.mesh)
        make = lambda dtype, *shape: jax.ShapeDtypeStruct(
            (work.rows, *shape), dtype, sharding=placed
        )
        T, M = work.row_tokens, work.picked
        ints, floats = make(jnp.int32, T), make(jnp.float32, T)
        ids = make(
            np.min_scalar_type(model.num_experts),
            T,
            sum(model.sparse_layers),
            model.num_experts_per_tok,
        )
        return Batch(
            tokens_BT=ints, positions_BT=ints, segment_ids_BT=ints, prefix_ids_BT=ints, mask_BT=make(jnp.bool_, T),
            picked_BM=make(jnp.int32, M), source_BM=make(jnp.int32, M), adv_BT=floats, weight_BT=floats,
            old_logp_BT=floats if old_logp else None,
            ref_logp_BT=floats if old_logp and self.cfg.loss.kl_coef > 0 else None,
            correction_BT=floats if old_logp and self.cfg.loss.correction != "none" else None,
            expert_ids_BTLk=ids if experts else None,
        )  # fmt: skip

    @functools.cached_property
    def sampler(self) -> Sampler:
        cfg = self.cfg
        rule = SamplingParams(
            cfg.rollout.temperature, cfg.rollout.top_k, cfg.rollout.top_p, cfg.rollout.min_p
        )
        record = cfg.train.routing_replay == "r3"
        G, C = cfg.rollout.group_size, cfg.rollout.max_new_tokens
        return Sampler(self.policy, rule, G, C, NO_STOP, 0, record, cfg.rollout.slots)

    def _prompts(self):
        """What `prefill` takes: tokens, lengths and indices of prompts, limits of completions, a key."""
        work, placed = self.work, sharding.batch_sharding(self.mesh)
        make = lambda dtype, n, *shape: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=placed)
        P, key = work.prompts, jax.eval_shape(lambda: jax.random.key(0))
        tokens_PS = make(jnp.int32, P, bucket(work.prompt_tokens))
        return (
            tokens_PS,
            make(jnp.int32, P),
            make(jnp.uint32, P),
            make(jnp.int32, work.sequences),
            key,
        )

    def _prefill(self):
        def run(params, *prompts):
            return prefill(self.sampler, self.policy.bind(params), *prompts)

        return jax.jit(run), self.params, *self._prompts()

    def _decode(self):
        """The decode loop over all completions of the mesh, from what prefill leaves."""
        sampler = self.sampler
        placed = sharding.batch_sharding(self.mesh)
        rows = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed if x.ndim else None)
        by_head = sharding.shardings(self.mesh, ("batch", "kv_heads", None, None))

        def start(params, *prompts):
            return prefill(sampler, self.policy.bind(params), *prompts)[0]

        def run(params, requests):
            slots = fill_slots(sampler, requests)
            done = decode(
                self.policy.bind(params), requests, slots, sampler.sampling, NO_STOP, narrow=False
            )
            return (
                done.tokens_NC,
                done.logp_NC,
                done.length_N,
                done.expert_ids_NCLk,
            )  # the cache ends here

        requests = jax.tree.map(rows, jax.eval_shape(start, self.params, *self._prompts()))
        cached = lambda layers: tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_head) for x in layers
        )
        cache = dataclasses.replace(
            requests.cache, k=cached(requests.cache.k), v=cached(requests.cache.v)
        )
        return jax.jit(run), self.params, dataclasses.replace(requests, cache=cache)


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _placed(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
