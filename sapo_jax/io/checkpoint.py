"""Checkpoints of one stage: train state, data iterator, seed and resolved config, with a digest for every array.

Orbax writes them, asynchronously and atomically. Three things are added here, because a run must either resume exactly
or say why it cannot:

* every array carries a digest, computed on the device where it lives; Orbax alone restores a flipped byte silently;
* what is complete is decided by looking at the folder; an incomplete one is skipped with a notice;
* a save that failed in the background is raised by the next `wait`, `save` or `close`.

A step folder holds `state/` (one array per leaf, named by its path in the tree), `extras/` and `manifest/` (JSON).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from sapo_jax.config import schema
from sapo_jax.distributed.processes import broadcast_from_first, is_first
from sapo_jax.errors import CheckpointError

_REQUIRED = ("_CHECKPOINT_METADATA", "state/_METADATA", "extras/metadata", "manifest/metadata")
_SHOWN = 8  # leaves listed in an error


# ---------------------------------------------------------------- digests


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32: one word per element, two along a last dim for 64-bit types."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"a digest needs real numbers or booleans, not {x.dtype}")
    bits = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo)(x.dtype).bits
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}
    if bits not in unsigned:
        raise TypeError(f"a digest needs elements of 8, 16, 32 or 64 bits, not {x.dtype}")
    return jax.lax.bitcast_convert_type(x, unsigned[bits]).astype(jnp.uint32)


def _digest(x: jax.Array) -> jax.Array:
    words = _words(x)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(
        range(words.ndim)
    ):  # from iotas, not by reshaping: that would gather a sharded array
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    mixed = words + index * jnp.uint32(0x9E3779B1)
    for shift, odd in (
        (16, 0x85EBCA6B),
        (13, 0xC2B2AE35),
        (16, 1),
    ):  # every line is a bijection of uint32
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(odd)
    return jnp.sum(mixed, dtype=jnp.uint32)


@jax.jit
def digests(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """sum_i mix(bits(x_i) + i * odd) mod 2^32 of every array; i is the flat index, mix the murmur3 finaliser.

    mix is a bijection, so any change of one element changes the digest; a change of many escapes with chance 2^-32
    (were mix linear, pairs of flipped signs would cancel). Integer sums wrap, hence are associative: the digest does
    not depend on the mesh or the sharding, and only one uint32 per leaf leaves the devices.
    """
    return {path: _digest(x) for path, x in leaves.items()}


def _flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat = {
        prefix + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    if len(flat) != len(leaves):
        raise ValueError(
            "two leaves of the state have the same path: a '/' in a key makes names ambiguous"
        )
    return flat, treedef


def _describe(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {path: {"shape": list(x.shape), "dtype": str(x.dtype)} for path, x in leaves.items()}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- one stage's checkpoints


class Checkpoints:
    """The checkpoints in `directory` (local or gs://), a context manager. cfg None: for reading only.

    Opening for writing moves incomplete step folders aside (`<step>.incomplete-<n>`) and removes Orbax's temporary
    ones; so only one process group may have a directory open for writing. All processes make the same calls.
    """

    def __init__(self, directory: str | epath.PathLike, cfg: schema.Checkpoint | None = None):
        self.directory = epath.Path(directory).resolve()
        logging.getLogger("absl").addFilter(_already_raised)
        self._pending: int | None = None  # the step being saved in the background
        self._last: int | None = None  # the step saved or restored last
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._manager: ocp.CheckpointManager | None = None
        if cfg is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._set_aside_incomplete()
            kept = [checkpoint_managers.LatestN(cfg.keep_last)]
            if cfg.keep_every:
                kept.append(checkpoint_managers.EveryNSteps(cfg.keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Any, extras: dict[str, Any]) -> None:
        """Starts writing `state` (a pytree of jax arrays) and `extras` (JSON values: data iterator, seed, config).

        Returns once the arrays are copied to the host, so `state` may be donated right away and `extras` changed.
        Saving the step just saved or restored does nothing. Raises CheckpointError if this save cannot start, or if the
        previous one failed in the background.
        """
        if self._manager is None:
            raise CheckpointError(
                f"{self.directory} was opened for reading only; pass a checkpoint config to save."
            )
        if step == self._last:
            return
        self.wait()
        if step in self.steps():
            raise CheckpointError(
                f"{self.directory / str(step)} exists already. Restore it to go on from there, or remove it."
            )
        leaves, _ = _flatten(state)
        if wrong := [
            f"{path}: {type(x).__name__}"
            for path, x in leaves.items()
            if not isinstance(x, jax.Array)
        ]:
            raise TypeError("only jax arrays can be saved: " + ", ".join(wrong[:_SHOWN]))
        try:
            extras = json.loads(json.dumps(extras, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"the extras of a checkpoint must be JSON values: {error}") from error
        manifest = _describe(leaves)
        for path, digest in jax.device_get(digests(leaves)).items():
            manifest[path]["digest"] = int(digest)
        manifest = {"leaves": manifest, "sha256": _sha256([manifest, extras])}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves),
            extras=ocp.args.JsonSave(extras),
            manifest=ocp.args.JsonSave(manifest),
        )
        try:  # force: Orbax would skip the save, silently, if any folder had a higher number
            self._manager.save(step, args=items, force=True)
        except jax.errors.JaxRuntimeError:
            raise  # not the disk: memory, or a collective that another process has left
        except Exception as error:
            raise self._save_error(step, error) from error
        self._pending = self._last = step

    def wait(self) -> None:
        """Returns when the save under way is complete on disk; raises CheckpointError if it failed."""
        step, self._pending = self._pending, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            if is_first() and step not in self.steps():
                raise FileNotFoundError("the step folder is not complete")
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise self._save_error(step, error) from error

    def close(self) -> None:
        """Waits for the save under way, then frees Orbax's threads. Raises like `wait`."""
        try:
            self.wait()
        finally:
            self._reader.close()
            if self._manager is not None:
                self._manager.close()

    def steps(self) -> list[int]:
        """The complete checkpoints on disk, ascending. A save under way is not among them."""
        return sorted(step for step, folder in self._step_folders().items() if not _missing(folder))

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extras) of the newest complete checkpoint, verified; None if there is none.

        abstract_state: a tree of jax.ShapeDtypeStruct with shardings; the mesh may differ from the one that saved.
        Raises CheckpointError if the tree differs from what was saved, or if the files are damaged.
        """
        step = self._newest()
        if step is None:
            return None
        found = self._read(step, abstract_state, "")
        self._last = step  # a stop before the next step has nothing new to save
        return found

    def restore_params(
        self, abstract_params: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """As `restore`, of the `params` field of the state alone: the optimiser's arrays are not read."""
        if step is not None and step not in (steps := self.steps()):
            raise CheckpointError(
                f"{self.directory} holds no complete checkpoint of step {step}; it has {steps}."
            )
        step = self._newest() if step is None else step
        return None if step is None else self._read(step, abstract_params, "params/")

    # ------------------------------------------------------------ folders

    def _step_folders(self) -> dict[int, epath.Path]:
        if not self.directory.exists():
            return {}
        return {
            int(f.name): f
            for f in self.directory.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", f.name)
        }

    def _newest(self) -> int | None:
        """As the first of several processes sees it: the others must not restore another one."""
        self.wait()
        return broadcast_from_first(self._newest_here() if is_first() else None)

    def _newest_here(self) -> int | None:
        for step, folder in sorted(self._step_folders().items(), reverse=True):
            if not (missing := _missing(folder)):
                return step
            _notice(f"skipped the incomplete checkpoint {folder} (no {missing}).")
        return None

    def _set_aside_incomplete(self) -> None:
        if jax.process_index() == 0:
            for folder in self._step_folders().values():
                if missing := _missing(folder):
                    taken = {f.name for f in self.directory.iterdir()}
                    n = next(
                        n
                        for n in range(len(taken) + 1)
                        if f"{folder.name}.incomplete-{n}" not in taken
                    )
                    target = folder.rename(self.directory / f"{folder.name}.incomplete-{n}")
                    _notice(
                        f"skipped the incomplete checkpoint {folder} (no {missing}); it is now {target.name}, "
                        "and can be removed."
                    )
        multihost_utils.sync_global_devices(
            "checkpoint_folders"
        )  # returns at once in a single process

    def _save_error(self, step: int, error: Exception) -> CheckpointError:
        self._last = None
        self._manager.reload()  # Orbax has already forgotten the steps that the failed one was to replace
        steps = self.steps()
        kept = (
            f"the newest complete one is step {steps[-1]}" if steps else "there is no complete one"
        )
        return CheckpointError(
            f"checkpoint {self.directory / str(step)} was not saved ({_cause(error)}). Check free "
            f"space and permissions, then run the same command again; {kept}."
        )

    # ------------------------------------------------------------ reading

    def _read(self, step: int, abstract: Any, prefix: str) -> tuple[int, Any, dict[str, Any]]:
        folder = self.directory / str(step)
        wanted, treedef = _flatten(abstract, prefix)
        if unplaced := [path for path, x in wanted.items() if x.sharding is None]:
            raise ValueError(
                "restoring needs a sharding for every array; none for: "
                + ", ".join(unplaced[:_SHOWN])
            )
        try:
            json_items = ocp.args.Composite(
                manifest=ocp.args.JsonRestore(), extras=ocp.args.JsonRestore()
            )
            found = self._reader.restore(folder, args=json_items)
            extras, stored = found.extras, found.manifest["leaves"]
            if _sha256([stored, extras]) != found.manifest["sha256"]:
                raise ValueError("the digest of extras/ and manifest/ differs")
            _check_structure(
                folder,
                {path: leaf for path, leaf in stored.items() if path.startswith(prefix)},
                wanted,
            )
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            request = ocp.args.PyTreeRestore(
                item=wanted, restore_args=restore_args, partial_restore=True
            )
            leaves = self._reader.restore(folder, args=ocp.args.Composite(state=request)).state
            actual = jax.device_get(digests(leaves))
            if damaged := [path for path in wanted if int(actual[path]) != stored[path]["digest"]]:
                raise ValueError(
                    f"the digest of {len(damaged)} arrays differs: " + ", ".join(damaged[:_SHOWN])
                )
        except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError, PermissionError):
            raise  # not damage: another model, or a lack of memory or rights
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {folder} is damaged ({_cause(error)}). Delete this folder to go on from "
                "the checkpoint before it."
            ) from error
        return step, jax.tree.unflatten(treedef, [leaves[path] for path in wanted]), extras


def _already_raised(record: logging.LogRecord) -> bool:
    """Log filter: Orbax logs a failed save five times, with its traceback; it is raised, with its cause, by `wait`."""
    return not (record.exc_info and "orbax" in record.pathname)


def _cause(error: Exception) -> str:
    """One line of an error; Orbax's run to pages. The whole of it is in __cause__."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]


def _notice(text: str) -> None:
    print(f"sapo_jax: {text}", file=sys.stderr, flush=True)


def _missing(folder: epath.Path) -> str | None:
    """What a step folder lacks to be complete; None if it is."""
    if not ocp.utils.is_checkpoint_finalized(
        folder
    ):  # on gs:// a folder appears before it is committed
        return "commit_success.txt"
    return next((name for name in _REQUIRED if not (folder / name).exists()), None)


def _check_structure(folder: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    lines = []
    expected = _describe(wanted)
    for path in sorted(stored.keys() | expected.keys()):
        here, there = expected.get(path), stored.get(path)
        if there is None or here is None:
            lines.append(
                f"{path}: only in the {'checkpoint' if here is None else 'configured model and optimiser'}"
            )
        elif any(here[key] != there[key] for key in here):
            saved, now = (f"{leaf['dtype']}{leaf['shape']}" for leaf in (there, here))
            lines.append(f"{path}: {saved} in the checkpoint, {now} configured now")
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointError(
            f"checkpoint {folder} is of another model or optimiser than the config describes. Use the config it was "
            "saved with, or another run folder.\n  " + "\n  ".join(lines[:_SHOWN] + more)
        )
