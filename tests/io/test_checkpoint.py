"""Checkpoints: exact round trips, and every way a checkpoint can be incomplete, damaged or of another model.

Run as a script this file is the process that the kill -9 test kills, or the one that has four devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sapo_jax.batch import TrainState
from sapo_jax.config import schema
from sapo_jax.errors import CheckpointError
from sapo_jax.io.arrays import digests
from sapo_jax.io.checkpoint import Checkpoints

KEEP_TWO = schema.Checkpoint(keep_last=2)
EXTRAS = {
    "iterator": {"position": 12, "order": [3, 1, 2]},
    "seed": 7,
    "config": {"name": "run", "lr": 1e-3},
}


def make_state(seed: int, width: int = 24) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(50, width)), jnp.float32),
        "blocks": {
            "w": jnp.asarray(rng.normal(size=(3, width, 8)), jnp.bfloat16),
            "mask": jnp.arange(5) % 2 == 0,
        },
    }
    opt_state = optax.adamw(1e-3).init({"embed": params["embed"]})
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(rng.integers(1, 9), x.dtype), opt_state)
    return TrainState(step=jnp.int32(seed), params=params, opt_state=opt_state)


def abstract(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def assert_bit_equal(tree, other) -> None:
    chex.assert_trees_all_equal_structs(tree, other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (
            a.dtype == b.dtype
            and a.shape == b.shape
            and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        )


def save(directory: Path, *steps: int, cfg: schema.Checkpoint = KEEP_TWO) -> None:
    with Checkpoints(directory, cfg) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), EXTRAS)


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


# ---------------------------------------------------------------- round trips


def test_state_and_extras_come_back_bit_equal(tmp_path):
    save(tmp_path, 3)
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        step, state, extras = checkpoints.restore(abstract(make_state(0)))
    assert step == 3 and extras == EXTRAS
    assert_bit_equal(state, make_state(3))


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(abstract(make_state(0))) is None
    assert not (tmp_path / "none").exists(), "reading must not create the folder"
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None and checkpoints.steps() == []


def test_params_alone(tmp_path):
    save(tmp_path, 1, 2)
    reader = Checkpoints(tmp_path)
    wanted = abstract(make_state(0).params)
    step, params, extras = reader.restore_params(wanted)
    assert step == 2 and extras == EXTRAS
    assert_bit_equal(params, make_state(2).params)
    assert_bit_equal(reader.restore_params(wanted, step=1)[1], make_state(1).params)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 5; it has \[1, 2\]"):
        reader.restore_params(wanted, step=5)
    with pytest.raises(CheckpointError, match="reading only"):
        reader.save(3, make_state(3), EXTRAS)


def test_keep_last_and_keep_every(tmp_path):
    with Checkpoints(tmp_path, schema.Checkpoint(keep_last=2, keep_every=4)) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, make_state(step), EXTRAS)
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 9, 10]


def test_saving_returns_before_the_step_is_listed_and_wait_lists_it(tmp_path):
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        checkpoints.save(5, make_state(5), EXTRAS)
        checkpoints.save(
            5, make_state(5), EXTRAS
        )  # the same again: a stop right after a periodic save
        checkpoints.wait()
        assert checkpoints.steps() == [5]
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        with pytest.raises(CheckpointError, match="exists already"):  # another run's, perhaps
            checkpoints.save(5, make_state(5), EXTRAS)
        _, state, extras = checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(5, state, extras)  # a stop right after a resume


def test_buffers_may_be_donated_and_extras_changed_right_after_save(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x * 3 + 1, state), donate_argnums=0)
    noise = (
        np.random.default_rng(0).normal(size=(6, 1 << 20)).astype(np.float32)
    )  # 25 MB: the write outlasts save()
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        for step in (1, 2, 3):
            state = {f"w{i}": update(jnp.asarray(row) * step) for i, row in enumerate(noise)}
            expected = jax.tree.map(np.array, state)
            extras = {"iterator": {"position": step}}
            checkpoints.save(step, state, extras)
            extras["iterator"]["position"] = -1
            after = update(
                state
            )  # a CPU backend copies instead, as long as Orbax still reads the buffer
            for _ in range(3):
                after = update(after)
            jax.block_until_ready(after)
            found = checkpoints.restore(abstract(after))
            assert found[0] == step and found[2] == {"iterator": {"position": step}}
            assert_bit_equal(found[1], expected)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        with pytest.raises(TypeError, match="extras of a checkpoint must be JSON"):
            checkpoints.save(1, make_state(1), {"iterator": b"bytes"})
        with pytest.raises(TypeError, match="extras of a checkpoint must be JSON"):
            checkpoints.save(1, make_state(1), {"x": float("nan")})
        with pytest.raises(TypeError, match="only jax arrays can be saved: lr: float"):
            checkpoints.save(1, {"lr": 0.1}, {})
        with pytest.raises(ValueError, match="same path"):
            checkpoints.save(1, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, {})
        assert checkpoints.restore(abstract(make_state(0))) is None


# ---------------------------------------------------------------- digests


def reference_digest(x: np.ndarray) -> int:
    """The formula again, in Python integers."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
    total = 0
    for i, word in enumerate(x.reshape(-1).view(unsigned).tolist()):
        y = (word + i * 0x9E3779B1) % 2**32
        y = (y ^ (y >> 16)) * 0x85EBCA6B % 2**32
        y = (y ^ (y >> 13)) * 0xC2B2AE35 % 2**32
        total += y ^ (y >> 16)
    return total % 2**32


DTYPES = [
    np.float32,
    ml_dtypes.bfloat16,
    np.float16,
    np.int8,
    np.uint8,
    np.int16,
    np.int32,
    np.uint32,
    np.bool_,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_digest_is_the_formula(dtype, shape):
    x = np.asarray(np.random.default_rng(0).normal(scale=50, size=shape)).astype(dtype)
    assert int(digests({"x": jnp.asarray(x)})["x"]) == reference_digest(x)


def test_every_changed_bit_changes_the_digest():
    x = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    x[0, :3] = 0.0, np.nan, np.inf
    changed = np.repeat(x.reshape(1, -1).view(np.uint32), 35 * 32, axis=0)
    changed[np.arange(35 * 32), np.arange(35 * 32) // 32] ^= np.uint32(1) << (
        np.arange(35 * 32) % 32
    ).astype(np.uint32)
    one_by_one = jax.vmap(lambda y: digests({"x": y})["x"])(
        jnp.asarray(changed.view(np.float32)).reshape(-1, 5, 7)
    )
    assert int(digests({"x": jnp.asarray(x)})["x"]) not in set(np.asarray(one_by_one).tolist())


def test_swaps_and_sign_flips_change_the_digest():
    def digest(x):
        return int(digests({"x": jnp.asarray(x)})["x"])

    x = np.random.default_rng(2).integers(0, 2**16, size=256).astype(np.uint32)
    for i, j in [(0, 1), (0, 128), (3, 131), (64, 192)]:
        y = x.copy()
        y[[i, j]] = y[[j, i]]
        assert digest(y) != digest(x)
    signs = np.ones(128, np.float32)
    assert digest(signs) != digest(
        -signs
    )  # a sum that is linear in the words, with odd factors, calls these equal


def test_digest_compiles_once_per_tree():
    fresh = jax.jit(chex.assert_max_traces(digests.__wrapped__, n=1))
    for seed in range(3):
        fresh({"w": jnp.full((4, 4), float(seed))})


def test_digest_refuses_what_it_cannot_read():
    with pytest.raises(TypeError, match="complex64"):
        digests({"x": jnp.ones(2, jnp.complex64)})
    with pytest.raises(TypeError, match="int4"):
        digests({"x": jnp.ones(2, jnp.int4)})


# ---------------------------------------------------------------- damage


def biggest_data_file(step_folder: Path) -> Path:
    return max((f for f in step_folder.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_flipped_byte_that_orbax_misses_is_named(tmp_path, capfd):
    rng = np.random.default_rng(0)
    state = {
        "params": {
            "w": jnp.asarray(rng.integers(0, 256, size=(200_000,)), jnp.uint8),
            "b": jnp.ones(3),
        }
    }
    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:
        checkpoints.save(1, state, EXTRAS)
        checkpoints.save(2, state, EXTRAS)
    flip(biggest_data_file(tmp_path / "2"), 100_000)
    with (
        ocp.PyTreeCheckpointer() as plain
    ):  # the trap is real: otherwise this test would show nothing
        restore_args = ocp.checkpoint_utils.construct_restore_args(
            abstract({"params/w": state["params"]["w"], "params/b": jnp.ones(3)})
        )
        raw = plain.restore(tmp_path / "2" / "state", restore_args=restore_args)
    assert np.sum(np.asarray(raw["params/w"]) != np.asarray(state["params"]["w"])) == 1
    step, restored, _ = Checkpoints(tmp_path).restore(abstract(state))
    notice = capfd.readouterr().err
    assert f"{tmp_path / '2'} is damaged" in notice and "params/w" in notice
    assert "params/b" not in notice and "it is skipped" in notice
    assert step == 1
    assert_bit_equal(restored, state)


def test_no_flipped_byte_in_any_file_is_restored_silently(tmp_path):
    save(tmp_path, 1)
    rng = np.random.default_rng(0)
    caught = 0
    for path in sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file()):
        good = path.read_bytes()
        for _ in range(4):
            flip(path, int(rng.integers(len(good))), int(rng.integers(8)))
            try:
                _, state, extras = Checkpoints(tmp_path).restore(abstract(make_state(0)))
            except CheckpointError as error:
                caught += 1
                assert str(tmp_path / "1") in str(error) and "is damaged" in str(error)
            else:
                assert extras == EXTRAS, path
                assert_bit_equal(state, make_state(1))
            path.write_bytes(good)
    assert caught > 20


def test_another_model_is_named_leaf_by_leaf(tmp_path):
    save(tmp_path, 1)
    wider = dataclasses.replace(make_state(0, width=32), step=jnp.int32(0))
    wider.params["head"] = jnp.zeros((2, 2))
    del wider.params["blocks"]["mask"]
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path).restore(abstract(wider))
    message = str(caught.value)
    assert "another model" in message and str(tmp_path / "1") in message
    assert (
        "params/embed: float32[50, 24] in the checkpoint, float32[50, 32] configured now" in message
    )
    assert (
        "params/blocks/w: bfloat16[3, 24, 8] in the checkpoint, bfloat16[3, 32, 8] configured now"
        in message
    )
    assert "params/head: only in the configured model" in message
    assert "params/blocks/mask: only in the checkpoint" in message
    assert "opt_state/0/mu/embed" in message and "\n  step" not in message
    params = make_state(0).params | {"embed": jnp.zeros((50, 24), jnp.bfloat16)}
    with pytest.raises(
        CheckpointError, match=r"params/embed: float32\[50, 24\] in the checkpoint, bfloat16"
    ) as caught:
        Checkpoints(tmp_path).restore_params(abstract(params))
    assert "opt_state" not in str(caught.value)


def test_a_sharding_is_required(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="needs a sharding for every array"):
        Checkpoints(tmp_path).restore(jax.eval_shape(lambda: make_state(0)))


# ---------------------------------------------------------------- incomplete and failed saves


@pytest.mark.parametrize("missing", ["everything", "manifest", "extras", "state/_METADATA"])
def test_an_incomplete_step_is_skipped_with_a_notice_and_can_be_saved_again(
    tmp_path, missing, capfd
):
    save(tmp_path, 20, 40)
    save(tmp_path, 60) if missing != "everything" else (tmp_path / "60").mkdir()
    if missing != "everything":
        subprocess.run(["rm", "-r", str(tmp_path / "60" / missing)], check=True)
    (tmp_path / "80.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "80.orbax-checkpoint-tmp" / "state").write_text("half")
    (tmp_path / "999").mkdir()
    step, state, _ = Checkpoints(tmp_path).restore(abstract(make_state(0)))
    assert step == 40
    assert_bit_equal(state, make_state(40))
    notice = capfd.readouterr().err
    assert (
        f"skipped the incomplete checkpoint {tmp_path / '60'}" in notice
        and str(tmp_path / "999") in notice
    )
    assert (tmp_path / "60").exists(), "a reader changes nothing"

    with Checkpoints(tmp_path, KEEP_TWO) as checkpoints:  # as the trainer does
        assert f"skipped the incomplete checkpoint {tmp_path / '60'}" in capfd.readouterr().err
        assert checkpoints.restore(abstract(make_state(0)))[0] == 40
        checkpoints.save(60, make_state(60), EXTRAS)
        checkpoints.wait()
        assert checkpoints.steps() == [40, 60], (
            "an incomplete folder must not count among those kept"
        )
    assert_bit_equal(Checkpoints(tmp_path).restore(abstract(make_state(0)))[1], make_state(60))
    assert (tmp_path / "60.incomplete-0").is_dir() and not (
        tmp_path / "80.orbax-checkpoint-tmp"
    ).exists()


class FullDisk:
    """Files may not grow past 64 kB, like a disk that fills up; needs no root and no mount."""

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, self.limits[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "close", "restore"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_failed_in_the_background_surfaces(tmp_path, surfaces_at, caplog):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    checkpoints = Checkpoints(tmp_path, schema.Checkpoint(keep_last=1))
    checkpoints.save(1, state, EXTRAS)
    checkpoints.wait()
    message = r"/2 was not saved \(.*Check free space.*newest complete one is step 1"
    with FullDisk(), pytest.raises(CheckpointError, match=message):
        checkpoints.save(2, state, EXTRAS)
        if surfaces_at == "save":
            checkpoints.save(3, state, EXTRAS)
        elif surfaces_at == "restore":
            checkpoints.restore(abstract(state))
        else:
            getattr(checkpoints, surfaces_at)()
    assert not [r for r in caplog.records if r.exc_info], (
        "the failure is raised once, not logged as well"
    )
    assert checkpoints.steps() == [1], "the last good one stays"
    if surfaces_at != "close":
        checkpoints.save(2, state, EXTRAS)  # space was freed
        checkpoints.close()
        assert checkpoints.steps() == [1, 2], "never one alone, although keep_last is 1"
    assert_bit_equal(Checkpoints(tmp_path).restore(abstract(state))[1], state)


# ---------------------------------------------------------------- other processes


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def save_for_ever(directory: str) -> None:
    """Goes on from the newest checkpoint, and says which steps are complete: what the killer must find again."""
    with Checkpoints(directory, KEEP_TWO) as checkpoints:
        found = checkpoints.restore(abstract(make_state(0)))
        step = found[0] if found else 0
        while True:
            step += 1
            checkpoints.save(step, make_state(step), EXTRAS | {"step": step})
            if step % 2:
                checkpoints.wait()
                print(step, flush=True)


def kill_repeatedly(directory: Path, kills: int) -> None:
    rng = random.Random(0)
    reached = 0
    for _ in range(kills):
        process = start("save_for_ever", directory)
        first = process.stdout.readline()
        assert first, process.stderr.read()
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        process.stdout.close(), process.stderr.close()
        complete = int((lines or [first])[-1])
        step, state, extras = Checkpoints(directory).restore(abstract(make_state(0)))
        assert step >= complete > reached and extras == EXTRAS | {"step": step}
        assert_bit_equal(state, make_state(step))
        reached = step
    assert len([f for f in directory.iterdir() if f.name.isdigit()]) <= 4


def test_kill_9_while_saving(tmp_path):
    kill_repeatedly(tmp_path, kills=3)


@pytest.mark.slow
def test_kill_9_while_saving_many_times(tmp_path):
    kill_repeatedly(tmp_path, kills=20)


def across_meshes(directory: str) -> None:
    """Saves sharded over four devices, restores on other meshes; prints the digests under each sharding."""
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as Spec

    assert jax.device_count() == 4
    devices = np.asarray(jax.devices())
    state = {
        "w": np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32),
        "step": np.int32(5),
    }
    meshes = {
        "4x1": (Mesh(devices.reshape(4, 1), ("a", "b")), Spec("a")),
        "2x2": (Mesh(devices.reshape(2, 2), ("a", "b")), Spec("b", "a")),
        "1": (Mesh(devices[:1].reshape(1, 1), ("a", "b")), Spec()),
    }
    report = {}
    for name, (mesh, spec) in meshes.items():
        shardings = {"w": NamedSharding(mesh, spec), "step": NamedSharding(mesh, Spec())}
        placed = jax.device_put(state, shardings)
        assert "all-gather" not in digests.lower(placed).compile().as_text(), (
            "a digest must not gather the array"
        )
        with Checkpoints(Path(directory) / name, KEEP_TWO) as checkpoints:
            checkpoints.save(1, placed, {})
        for other, (mesh_2, spec_2) in meshes.items():
            shardings = {"w": NamedSharding(mesh_2, spec_2), "step": NamedSharding(mesh_2, Spec())}
            wanted = {
                k: jax.ShapeDtypeStruct(state[k].shape, state[k].dtype, sharding=shardings[k])
                for k in state
            }
            _, found, _ = Checkpoints(Path(directory) / name).restore(wanted)
            assert_bit_equal(found, state)
            assert found["w"].sharding == shardings["w"]
            report[f"{name}->{other}"] = {k: int(v) for k, v in digests(found).items()}
    print(json.dumps(report))


def test_other_meshes_restore_and_digest_the_same(tmp_path):
    process = start("across_meshes", tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    report = json.loads(output)
    w = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    expected = {"w": reference_digest(w), "step": reference_digest(np.int32(5))}
    assert len(report) == 9 and all(found == expected for found in report.values())


if __name__ == "__main__":
    if sys.argv[1] == "across_meshes":
        jax.config.update("jax_num_cpu_devices", 4)
    {"save_for_ever": save_for_ever, "across_meshes": across_meshes}[sys.argv[1]](sys.argv[2])
