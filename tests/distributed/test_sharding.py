"""Mesh and specs; and, on eight virtual devices in a process of their own, that a mesh changes no
number.

The process is this file run as a module: it prints, as JSON, how far each mesh is from one device.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sapo_jax import diagnostics
from sapo_jax.config import SAPO, Config, Mesh, Optimizer
from sapo_jax.config import Rollout as RolloutConfig
from sapo_jax.distributed import sharding
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import (
    init_state,
    make_optimizer,
    make_update,
    policy_loss,
    state_shardings,
)
from sapo_jax.ops import expert_parallel
from sapo_jax.rollout import Sampler, SamplingParams
from tests.models import tiny

# every dim divides by 2: V 40, D 24, H 4, K 2, F 40 and 20, E 4; none is the 16 tokens of a row
DENSE = dataclasses.replace(
    tiny.DENSE, vocab_size=40, initializer_range=0.1, tie_word_embeddings=False
)
MOE = dataclasses.replace(
    DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, router_aux_loss_coef=0.1
)
ROWS = 8  # of a micro-batch
CASES = {
    "dense data=8": (DENSE, Mesh(data=8)),
    "dense fsdp=4 tensor=2": (DENSE, Mesh(fsdp=4, tensor=2)),
    "dense data=2 fsdp=4": (DENSE, Mesh(data=2, fsdp=4)),
    "dense data=2 fsdp=2 tensor=2": (DENSE, Mesh(data=2, fsdp=2, tensor=2)),
    "dense fsdp=4 of 8 devices": (DENSE, Mesh(data=1, fsdp=4)),
    "dense data=2 context=4": (DENSE, Mesh(data=2, context=4)),
    "dense fsdp=2 context=2 tensor=2": (DENSE, Mesh(fsdp=2, context=2, tensor=2)),
    "moe data=8": (MOE, Mesh(data=8)),
    "moe data=4 expert=2": (MOE, Mesh(data=4, expert=2)),
    "moe data=2 expert=2 tensor=2": (MOE, Mesh(data=2, expert=2, tensor=2)),
    "moe fsdp=2 expert=4": (MOE, Mesh(fsdp=2, expert=4)),
    "moe fsdp=2 expert=2 context=2": (MOE, Mesh(fsdp=2, expert=2, context=2)),
    # Replay of random experts, and recording of the routing.
    "replay fsdp=2 expert=2 tensor=2": (MOE, Mesh(fsdp=2, expert=2, tensor=2)),
    "replay data=2 expert=2 context=2": (MOE, Mesh(data=2, expert=2, context=2)),
}

# ---------------------------------------------------------------- mesh and specs


def test_mesh_has_all_axes():
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == (1,) * 5


@pytest.mark.parametrize(
    ("cfg", "devices", "message"),
    [
        (
            Mesh(data=2, tensor=2),
            3,
            r"mesh.data=2, .*mesh.tensor=2 needs 4 devices, but there are 3; lower",
        ),
        (Mesh(fsdp=16), 8, r"mesh.data=1, mesh.fsdp=16, .* needs 16 devices, but there are 8"),
        (
            Mesh(fsdp=3),
            8,
            r"mesh.data=2, mesh.fsdp=3, .* does not divide the 8 devices; set mesh.data",
        ),
    ],
)
def test_meshes_that_do_not_fit(cfg, devices, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(cfg, list(range(devices)))


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as its place in a mesh depends on."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_are_joined_along_data_alone():
    chips = [Chip(i, i // 4) for i in range(8)]
    slices = np.vectorize(lambda chip: chip.slice_index)(sharding.arrange(chips, (4, 1, 1, 1, 2)))
    assert slices.shape == (4, 1, 1, 1, 2)  # `data` goes over both slices, `tensor` stays in one
    assert (slices == np.array([0, 0, 1, 1]).reshape(4, 1, 1, 1, 1)).all()
    with pytest.raises(ValueError, match="in 2 slices; make mesh.data=1 a multiple of 2"):
        sharding.arrange(chips, (1, 8, 1, 1, 1))


def test_specs_follow_the_rules():
    assert sharding.spec("vocab", "embed") == P("tensor", "fsdp")
    assert sharding.spec("layers", "experts", "embed", "mlp") == P(None, "expert", "fsdp", "tensor")
    assert sharding.spec("batch", None, None) == P(("data", "fsdp", "expert"), None, None)
    assert sharding.spec() == P()


def specs_of(logical_axes, mesh: jax.sharding.Mesh):
    return jax.tree.map(lambda s: s.spec, sharding.shardings(mesh, logical_axes))


def test_parameters_are_split_as_the_rules_say():
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    specs = specs_of(tiny.policy(MOE).logical_axes, mesh)
    block = specs["layers"][0]
    attention = block["attention"]
    mlp = block["mlp"]
    assert specs["embed"] == specs["head"] == P("tensor", "fsdp")
    assert specs["norm"]["scale"] == P("fsdp")
    assert block["mlp_norm"]["scale"] == P(None, "fsdp")
    assert attention["q"] == attention["k"] == attention["v"] == P(None, "fsdp", "tensor", None)
    assert attention["o"] == P(None, "tensor", None, "fsdp")
    assert attention["q_norm"]["scale"] == P(None, None)
    assert mlp["router"] == P(None, "fsdp", None)
    assert mlp["gate"] == mlp["up"] == P(None, "expert", "fsdp", "tensor")
    assert mlp["down"] == P(None, "expert", "tensor", "fsdp")
    dense_mlp = specs_of(tiny.policy(DENSE).logical_axes, mesh)["layers"][0]["mlp"]
    assert dense_mlp["gate"] == dense_mlp["up"] == P(None, "fsdp", "tensor")
    assert dense_mlp["down"] == P(None, "tensor", "fsdp")


def test_optimizer_moments_live_with_their_parameters():
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    policy = tiny.policy(DENSE)
    tx = make_optimizer(Optimizer(warmup_steps=2), 10)
    placed = state_shardings(policy, tx, mesh)
    shapes = jax.eval_shape(lambda params: init_state(params, tx), policy.shapes)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    specs = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree.leaves_with_path(placed)}
    moments = [name for name in specs if ".mu" in name or ".nu" in name]
    assert len(moments) == 2 * len(jax.tree.leaves(policy.shapes))
    for name in moments:
        assert specs[name] == specs[".params" + name.split(".mu")[-1].split(".nu")[-1]], name
    assert all(
        specs[name] == P()
        for name in specs
        if name not in moments and not name.startswith(".params")
    )


@pytest.mark.parametrize(
    ("sizes", "shape", "axes", "expected"),
    [
        ({"fsdp": 2, "tensor": 2}, (8, 12), (None, "decode_mlp"), (None, ("tensor", "fsdp"))),
        # 9 divides not by 6, but by 3.
        ({"fsdp": 2, "tensor": 3}, (8, 9), (None, "decode_mlp"), (None, ("tensor",))),
        ({"fsdp": 2, "tensor": 2}, (8, 9), ("kv_heads", "decode_vocab"), (("tensor",), None)),
    ],
)
def test_constrain_if_divisible_takes_the_axes_that_divide(sizes, shape, axes, expected):
    mesh_shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    mesh = jax.sharding.AbstractMesh(mesh_shape, sharding.AXES)

    def constrained(w):
        return sharding.constrain_if_divisible(w, *axes)

    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(constrained)(jnp.zeros(shape))
    assert jaxpr.eqns[0].params["sharding"].spec == P(*expected)


@pytest.mark.parametrize(("T", "expected"), [(12, "sequence"), (10, None)])
def test_rows_that_do_not_divide_over_the_mesh_stay_whole(T, expected):
    assert sharding.sequence_axis(T) is None  # there is no mesh
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 4, 2), sharding.AXES)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.sequence_axis(T) == expected
        assert sharding.sequence_axis(T, "sequence_between_layers") is None  # over 4 * 2 devices


def test_without_a_mesh_constrain_does_nothing():
    x = jnp.ones((3, 2))
    assert sharding.constrain(x, "batch", None) is x


# ---------------------------------------------------------------- eight devices


def on_mesh(model, mesh_cfg: Mesh | None, replay: bool = False) -> dict:
    """One optimiser step, scores and a rollout on a mesh, as the trainer runs them.

    mesh_cfg None: on one device, without a mesh to speak of.
    """
    if mesh_cfg is None:
        mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    else:
        mesh = sharding.make_mesh(mesh_cfg)
    cfg = Config(
        model=model,
        objective=SAPO(tau_neg=1.5),
        rollout=RolloutConfig(temperature=0.9),
        optimizer=Optimizer(learning_rate=0.01, eps=1e-2, weight_decay=0.1),
    )
    policy = tiny.policy(model)
    tx = make_optimizer(cfg.optimizer, 10)
    batch = tiny.batch(lengths=(12, 7, 16, 10, 9, 14, 11, 8) * 2)
    if replay:
        experts = tiny.random_experts(batch.tokens_BT.shape, model)
        batch = dataclasses.replace(batch, expert_ids_BTLk=experts)
    prompts = [tiny.prompt(i, n) for i, n in enumerate((3, 9, 16, 5, 12, 1, 7, 10))]
    with jax.set_mesh(mesh):
        placed = state_shardings(policy, tx, mesh)
        params = jax.tree.map(
            lambda x, s: jax.device_put(np.asarray(x), s), tiny.params(model), placed.params
        )
        score = make_scorer(policy, 0.9, 8)
        logp_BT, entropy_BT = score(params, sharding.put_batch(batch, mesh))
        noise_BT = np.random.default_rng(0).normal(0, 0.5, logp_BT.shape).astype(np.float32)
        batch = dataclasses.replace(batch, old_logp_BT=np.asarray(logp_BT) + noise_BT)

        # With 8 slots half of the completions wait. Tokens of a step pass through all experts, or
        # (in the cases of replay) are sorted by expert.
        sampler = Sampler(policy, SamplingParams(0.9), 2, 12, (1, 2), tiny.PAD, replay, slots=8)
        most_tokens = {"cpu": 0} if replay else {}
        with mock.patch.dict(expert_parallel.MOST_TOKENS_THROUGH_ALL_EXPERTS, most_tokens):
            rollout = sampler(params, prompts, jax.random.key(1))

        state = jax.jit(lambda p: init_state(p, tx), out_shardings=placed)(params)
        update = make_update(policy, tx, policy_loss(cfg), ROWS, placed)
        compiled = update.lower(state, sharding.put_batch(batch, mesh)).compile()
        state, aux = compiled(state, sharding.put_batch(batch, mesh))
        same_place = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed
        )
    # The first moment after one step is (1 - b1) times the gradient, clipped to a norm of 1.
    first_moment = optax.tree.get(state.opt_state, "mu")
    gradients = jax.tree.map(lambda mu: np.asarray(mu) / (1 - cfg.optimizer.b1), first_moment)
    token_stats = diagnostics.reduce_token_stats(jax.device_get(aux["stats"]))
    real_BT = batch.segment_ids_BT > 0
    return {
        "numbers": {
            "params": jax.device_get(state.params),
            "gradients": gradients,
            "loss": float(aux["loss"]),
            "grad_norm": float(aux["grad_norm"]),
            "statistics": diagnostics.finalize_token_stats(token_stats),
            "counts": [x for x in jax.tree.leaves(token_stats) if x.dtype.kind in "iu"],
            "logp": np.asarray(logp_BT)[real_BT],
            "entropy": np.asarray(entropy_BT)[real_BT],
            "sampler_logp": rollout.logp_BC,
        },
        "tokens": rollout.tokens_BC.tolist(),
        "experts": rollout.expert_ids_BTLk.tolist() if replay else None,
        "lengths": rollout.length_B.tolist(),
        "placed": all(jax.tree.leaves(same_place)),
        "specs": {
            path_name(path): [*x.sharding.spec]
            for path, x in jax.tree.leaves_with_path(state.params)
        },
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,  # per device
        "kept": stacked_inputs(compiled.as_text(), model),
    }


def path_name(path: tuple) -> str:
    """layers/0/attention/q"""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stacked_inputs(text: str, model) -> list[list[int]]:
    """[rows, tokens] of the arrays that hold a number for each layer, row, token and dim of D: what
    the backward pass keeps."""
    L = model.num_hidden_layers
    D = model.hidden_size
    found = set(re.findall(rf"f32\[{L},(\d+),(\d+),{D}\]", text))
    return [[int(rows), int(tokens)] for rows, tokens in found]


def largest_gap(ours, theirs) -> float:
    """The largest difference of two trees of numbers."""

    def gap(a, b) -> float:
        return float(np.max(np.abs(np.asarray(a, np.float64) - b)))

    return max(jax.tree.leaves(jax.tree.map(gap, ours, theirs)))


def main() -> None:
    """{case: {quantity: largest difference from one device, ...}} as the last line of stdout."""
    on_single_device = {
        "dense": on_mesh(DENSE, None),
        "moe": on_mesh(MOE, None),
        "replay": on_mesh(MOE, None, replay=True),
    }
    results = {}
    for case, (model, mesh_cfg) in CASES.items():
        kind = case.split()[0]
        single = on_single_device[kind]
        many = on_mesh(model, mesh_cfg, replay=kind == "replay")
        results[case] = {
            "gaps": {
                name: largest_gap(many["numbers"][name], single["numbers"][name])
                for name in single["numbers"]
            },
            "same_tokens": many["tokens"] == single["tokens"]
            and many["experts"] == single["experts"],
            "lengths": many["lengths"],
            "placed": many["placed"],
            "specs": many["specs"],
            "kept": many["kept"],
            "temporaries": many["temporaries"] / single["temporaries"],
        }
    print(json.dumps(results))


@pytest.fixture(scope="module")
def eight_devices():
    # Without LLVM's optimisations, programs are quick to compile.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.test_sharding"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_eight(test):
    """Marks a test that looks at the results of the process with eight devices; the first waits for
    it."""
    return pytest.mark.slow(pytest.mark.timeout(2500)(test))


@on_eight
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_no_number(case, eight_devices):
    """Scores, loss, gradients, statistics, and parameters after a step: 1e-5 from one device. The
    same sampled tokens, histograms and sampled sequences."""
    result = eight_devices[case]
    assert max(result["gaps"].values()) < 1e-5, result["gaps"]
    assert result["same_tokens"] and len(set(result["lengths"])) > 2
    assert result["placed"]  # the new state lives where the old one did
    # Activations are split: with a replicated batch this is about 1. Those of experts are not, as
    # the buffers of their blocks do not shrink with the rows.
    if case.startswith("dense"):
        assert result["temporaries"] < 0.35


@on_eight
@pytest.mark.parametrize("case", CASES)
def test_what_backward_keeps_of_a_layer_is_split_over_all_axes(case, eight_devices):
    _, mesh_cfg = CASES[case]
    *batch, context, tensor = sharding.axis_sizes(mesh_cfg, 8)
    kept = eight_devices[case]["kept"]
    rows = ROWS // math.prod(batch)
    T = 16
    assert [rows, T // (context * tensor)] in kept
    assert context * tensor == 1 or [rows, T] not in kept


@on_eight
def test_updated_parameters_are_split(eight_devices):
    dense = eight_devices["dense data=2 fsdp=2 tensor=2"]["specs"]
    moe = eight_devices["moe data=2 expert=2 tensor=2"]["specs"]
    assert dense["embed"] == ["tensor", "fsdp"]
    assert dense["layers/0/attention/q"][:3] == [None, "fsdp", "tensor"]
    assert dense["layers/0/mlp/down"] == [None, "tensor", "fsdp"]
    assert moe["layers/0/mlp/gate"] == [None, "expert", "fsdp", "tensor"]
    assert moe["layers/0/mlp/router"][:2] == [None, "fsdp"]


if __name__ == "__main__":
    main()
