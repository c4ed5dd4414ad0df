"""Mesh and specs; and, on eight virtual devices in a process of their own, that a mesh changes no number.

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
from sapo_jax.ops import expert_parallel as exchange
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
    "replay fsdp=2 expert=2 tensor=2": (
        MOE,
        Mesh(fsdp=2, expert=2, tensor=2),
    ),  # of random experts, and recording
    "replay data=2 expert=2 context=2": (MOE, Mesh(data=2, expert=2, context=2)),
}

# ---------------------------------------------------------------- mesh and specs


def test_mesh_has_all_axes():
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    assert (
        mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
        and mesh.devices.shape == (1,) * 5
    )


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
    assert slices.shape == (4, 1, 1, 1, 2)
    assert (slices == np.array([0, 0, 1, 1]).reshape(4, 1, 1, 1, 1)).all()
    with pytest.raises(ValueError, match="in 2 slices; make mesh.data=1 a multiple of 2"):
        sharding.arrange(chips, (1, 8, 1, 1, 1))


def test_specs_follow_the_rules():
    assert sharding.spec("vocab", "embed") == P("tensor", "fsdp")
    assert sharding.spec("layers", "experts", "embed", "mlp") == P(None, "expert", "fsdp", "tensor")
    assert sharding.spec("batch", None, None) == P(("data", "fsdp", "expert"), None, None)
    assert sharding.spec() == P()


def test_parameters_are_split_as_the_rules_say():
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    dims = tiny.policy(MOE).logical_axes
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(mesh, dims))
    block = specs["layers"][0]
    attention, mlp = block["attention"], block["mlp"]
    assert specs["embed"] == specs["head"] == P("tensor", "fsdp")
    assert specs["norm"]["scale"] == P("fsdp")
    assert block["mlp_norm"]["scale"] == P(None, "fsdp")
    assert attention["q"] == attention["k"] == attention["v"] == P(None, "fsdp", "tensor", None)
    assert attention["o"] == P(None, "tensor", None, "fsdp")
    assert attention["q_norm"]["scale"] == P(None, None)
    assert mlp["router"] == P(None, "fsdp", None)
    assert mlp["gate"] == mlp["up"] == P(None, "expert", "fsdp", "tensor")
    assert mlp["down"] == P(None, "expert", "tensor", "fsdp")
    dense = jax.tree.map(
        lambda s: s.spec, sharding.shardings(mesh, tiny.policy(DENSE).logical_axes)
    )["layers"][0]["mlp"]
    assert dense["gate"] == dense["up"] == P(None, "fsdp", "tensor") and dense["down"] == P(
        None, "tensor", "fsdp"
    )


def test_optimizer_moments_live_with_their_parameters():
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    policy, tx = tiny.policy(DENSE), make_optimizer(Optimizer(warmup_steps=2), 10)
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
    ("sizes", "shape", "dims", "expected"),
    [
        ({"fsdp": 2, "tensor": 2}, (8, 12), (None, "decode_mlp"), (None, ("tensor", "fsdp"))),
        (
            {"fsdp": 2, "tensor": 3},
            (8, 9),
            (None, "decode_mlp"),
            (None, ("tensor",)),
        ),  # not by 6, but by 3
        ({"fsdp": 2, "tensor": 2}, (8, 9), ("kv_heads", "decode_vocab"), (("tensor",), None)),
    ],
)
def test_lay_out_takes_what_divides(sizes, shape, dims, expected):
    mesh = jax.sharding.AbstractMesh(
        tuple({axis: sizes.get(axis, 1) for axis in sharding.AXES}.values()), sharding.AXES
    )
    with jax.sharding.use_abstract_mesh(mesh):
        found = jax.make_jaxpr(lambda w: sharding.constrain_if_divisible(w, *dims))(
            jnp.zeros(shape)
        )
    assert found.eqns[0].params["sharding"].spec == jax.sharding.PartitionSpec(*expected)


def test_without_a_mesh_constrain_does_nothing():
    x = jnp.ones((3, 2))
    assert sharding.constrain(x, "batch", None) is x


# ---------------------------------------------------------------- eight devices


def on_mesh(model, mesh_cfg: Mesh | None, replay: bool = False) -> dict:
    """One optimiser step, scores and a rollout on a mesh (None: one device and no mesh), as the trainer runs them."""
    mesh = sharding.make_mesh(mesh_cfg or Mesh(data=1), None if mesh_cfg else jax.devices()[:1])
    cfg = Config(
        model=model, objective=SAPO(tau_neg=1.5), rollout=RolloutConfig(temperature=0.9),
        optimizer=Optimizer(learning_rate=0.01, eps=1e-2, weight_decay=0.1),
    )  # fmt: skip
    policy, tx = tiny.policy(model), make_optimizer(cfg.optimizer, 10)
    batch = tiny.batch(lengths=(12, 7, 16, 10, 9, 14, 11, 8) * 2)
    if replay:
        batch = dataclasses.replace(
            batch, expert_ids_BTLk=tiny.random_experts(batch.tokens_BT.shape, model)
        )
    prompts = [tiny.prompt(i, n) for i, n in enumerate((3, 9, 16, 5, 12, 1, 7, 10))]
    with jax.set_mesh(mesh):
        placed = state_shardings(policy, tx, mesh)
        params = jax.tree.map(
            lambda x, s: jax.device_put(np.asarray(x), s), tiny.params(model), placed.params
        )
        logp_BT, entropy_BT = make_scorer(policy, 0.9, 8)(params, sharding.put_batch(batch, mesh))
        noise_BT = np.random.default_rng(0).normal(0, 0.5, logp_BT.shape).astype(np.float32)
        batch = dataclasses.replace(batch, old_logp_BT=np.asarray(logp_BT) + noise_BT)
        sampler = Sampler(
            policy, SamplingParams(0.9), 2, 12, (1, 2), tiny.PAD, replay, slots=8
        )  # half of the completions wait
        with mock.patch.dict(
            exchange.FEW, {"cpu": 0} if replay else {}
        ):  # rows sorted by expert, or through all
            rollout = sampler(params, prompts, jax.random.key(1))

        state = jax.jit(lambda p: init_state(p, tx), out_shardings=placed)(params)
        update = make_update(policy, tx, policy_loss(cfg), ROWS, placed)
        compiled = update.lower(state, sharding.put_batch(batch, mesh)).compile()
        state, aux = compiled(state, sharding.put_batch(batch, mesh))
        same_place = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed
        )
    return {
        "numbers": {
            "params": jax.device_get(state.params),
            "gradients": jax.tree.map(
                lambda mu: np.asarray(mu) / (1 - cfg.optimizer.b1),
                optax.tree.get(state.opt_state, "mu"),
            ),  # clipped to a norm of 1
            "loss": float(aux["loss"]),
            "grad_norm": float(aux["grad_norm"]),
            "statistics": diagnostics.finalize(
                evidence := diagnostics.reduce(jax.device_get(aux["stats"]))
            ),
            "counts": [x for x in jax.tree.leaves(evidence) if x.dtype.kind in "iu"],
            "logp": np.asarray(logp_BT)[batch.segment_ids_BT > 0],
            "entropy": np.asarray(entropy_BT)[batch.segment_ids_BT > 0],
            "sampler_logp": rollout.logp_BC,
        },
        "tokens": rollout.tokens_BC.tolist(),
        "experts": rollout.expert_ids_BTLk.tolist() if replay else None,
        "lengths": rollout.length_B.tolist(),
        "placed": all(jax.tree.leaves(same_place)),
        "specs": {
            "/".join(str(key.key if hasattr(key, "key") else key.idx) for key in path): [
                *x.sharding.spec
            ]
            for path, x in jax.tree.leaves_with_path(state.params)
        },
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,  # per device
        "kept": stacked_inputs(compiled.as_text(), model),
    }


def stacked_inputs(text: str, model) -> list[list[int]]:
    """[rows, tokens] of the arrays that hold a number for each layer, row, token and dim of D: what backward keeps."""
    L, D = model.num_hidden_layers, model.hidden_size
    return [[int(b), int(t)] for b, t in set(re.findall(rf"f32\[{L},(\d+),(\d+),{D}\]", text))]


def main() -> None:
    """{case: {quantity: largest difference from one device, ...}} as the last line of stdout."""
    single = {
        "dense": on_mesh(DENSE, None),
        "moe": on_mesh(MOE, None),
        "replay": on_mesh(MOE, None, replay=True),
    }
    found = {}
    for case, (model, mesh_cfg) in CASES.items():
        kind = case.split()[0]
        one, many = single[kind], on_mesh(model, mesh_cfg, kind == "replay")
        gap = lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - b)))
        found[case] = {
            "gaps": {
                name: max(
                    jax.tree.leaves(jax.tree.map(gap, many["numbers"][name], one["numbers"][name]))
                )
                for name in one["numbers"]
            },
            "same_tokens": many["tokens"] == one["tokens"] and many["experts"] == one["experts"],
            "lengths": many["lengths"],
            "placed": many["placed"],
            "specs": many["specs"],
            "kept": many["kept"],
            "temporaries": many["temporaries"] / one["temporaries"],
        }
    print(json.dumps(found))


@pytest.fixture(scope="module")
def eight_devices():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # quick to compile
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.test_sharding"], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, timeout=2400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_eight(test):
    """Marks a test that looks at what the process of eight devices found; the first one waits for it."""
    return pytest.mark.slow(pytest.mark.timeout(2500)(test))


@on_eight
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_no_number(case, eight_devices):
    """Scores, loss, gradients, statistics, and parameters after a step: 1e-5 from one device. The same sampled tokens,
    histograms and sampled sequences."""
    found = eight_devices[case]
    assert max(found["gaps"].values()) < 1e-5, found["gaps"]
    assert found["same_tokens"] and len(set(found["lengths"])) > 2
    assert found["placed"]  # the new state lives where the old one did
    if case.startswith("dense"):  # activations are split: with a replicated batch this is about 1
        assert (
            found["temporaries"] < 0.35
        )  # experts are not: the buffers of their blocks do not shrink as rows do


@on_eight
@pytest.mark.parametrize("case", CASES)
def test_what_backward_keeps_of_a_layer_is_split_over_all_axes(case, eight_devices):
    (*batch, context, tensor), kept = (
        sharding.axis_sizes(CASES[case][1], 8),
        eight_devices[case]["kept"],
    )
    rows, T = ROWS // math.prod(batch), 16
    assert [rows, T // (context * tensor)] in kept
    assert context * tensor == 1 or [rows, T] not in kept


@on_eight
def test_updated_parameters_are_split(eight_devices):
    dense, moe = (
        eight_devices[f"{kind} tensor=2"]["specs"]
        for kind in ("dense data=2 fsdp=2", "moe data=2 expert=2")
    )
    assert dense["embed"] == ["tensor", "fsdp"]
    assert dense["layers/0/attention/q"][:3] == [None, "fsdp", "tensor"]
    assert dense["layers/0/mlp/down"] == [None, "tensor", "fsdp"]
    assert moe["layers/0/mlp/gate"] == [None, "expert", "fsdp", "tensor"]
    assert moe["layers/0/mlp/router"][:2] == [None, "fsdp"]


if __name__ == "__main__":
    main()
