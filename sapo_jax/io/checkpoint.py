"""Checkpoints of one stage: train state, data position, seed, config, and a digest of every array.

Orbax writes them, asynchronously and atomically. Five things are added here, because a run must
either resume exactly or say why it cannot:

* every array carries a digest, computed on the device where it lives; Orbax alone restores a
  flipped byte silently;
* what is complete is decided by looking at the folder; an incomplete one is skipped with a notice;
* a damaged one is put aside (`<step>.damaged-<n>`), and the newest whole one restored instead;
* before a save starts, the room that it needs is compared with what is free;
* a save that failed in the background is raised by the next `wait`, `save` or `close`.

A step folder holds `state/` (one array per leaf, named by its path in the tree), `extras/` and
`manifest/` (JSON).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from sapo_jax import murmur
from sapo_jax.config import schema
from sapo_jax.distributed.processes import any_true, broadcast_from_first, is_first
from sapo_jax.errors import (
    CheckpointError,
    CheckpointSpaceError,
    from_os_error,
    is_out_of_space,
)

_REQUIRED = ("_CHECKPOINT_METADATA", "state/_METADATA", "extras/metadata", "manifest/metadata")
_SHOWN = 8  # leaves listed in an error
# Beside the arrays a checkpoint holds small files: on a disk each takes a block or two.
_BYTES_BESIDE_ARRAYS = 200_000


# ---------------------------------------------------------------- digests


@jax.jit
def digests(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """sum_i mix(bits(x_i) + i * odd) mod 2^32 of every array.

    i is the flat index, mix the finaliser of murmur3. That is a bijection, so any change of one
    element changes the digest; a change of many escapes with chance 2^-32. (Were mix linear, pairs
    of flipped signs would cancel.) Integer sums wrap, hence are associative: the digest does not
    depend on the mesh or the sharding, and only one uint32 per leaf leaves the devices.
    """
    return {path: _digest(x) for path, x in leaves.items()}


def _digest(x: jax.Array) -> jax.Array:
    words = _as_words(x)
    # The flat index is summed up from iotas: reshaping would gather a sharded array.
    flat_index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        index_along_dim = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        flat_index += index_along_dim * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    mixed = murmur.mix(words + flat_index * jnp.uint32(murmur.SPREAD))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _as_words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32: one word per element, two along a last dim for 64-bit types."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
    elif jnp.issubdtype(x.dtype, jnp.integer):
        bits = jnp.iinfo(x.dtype).bits
    else:
        raise TypeError(f"a digest needs real numbers or booleans, not {x.dtype}")
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}
    if bits not in unsigned:
        raise TypeError(f"a digest needs elements of 8, 16, 32 or 64 bits, not {x.dtype}")
    return jax.lax.bitcast_convert_type(x, unsigned[bits]).astype(jnp.uint32)


def _flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Any], Any]:
    """The leaves by their path in the tree, joined with "/", and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat = {}
    for path, leaf in leaves:
        flat[prefix + jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
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


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not what was saved."""


class Restored(NamedTuple):
    """What was read of a checkpoint."""

    step: int
    tree: Any  # the whole state, or its parameters alone
    extras: dict[str, Any]  # the JSON values that were saved beside the state


class CheckpointIdentity(NamedTuple):
    """What a checkpoint says of itself, without its arrays."""

    params_digest: str  # the same for the same parameters, whoever saved them
    extras: dict[str, Any]  # the JSON values that were saved beside the state


class Checkpoints:
    """The checkpoints of a stage; a context manager.

    directory: a path on a disk, or gs://.
    cfg: how many checkpoints are kept; None opens the directory for reading only.

    Opening for writing moves incomplete step folders aside (`<step>.incomplete-<n>`). It removes
    Orbax's temporary folders, and what an earlier start has moved aside as incomplete. So only one
    process group may have a directory open for writing. All processes make the same calls.
    """

    def __init__(self, directory: str | epath.PathLike, cfg: schema.Checkpoint | None = None):
        self.directory = epath.Path(directory).resolve()
        logging.getLogger("absl").addFilter(_already_raised)
        logging.getLogger("asyncio").addFilter(_already_raised)
        _quieten_tensorstore()
        self._pending: int | None = None  # the step being saved in the background
        self._last: int | None = None  # the step saved or restored last
        self._has_failed = False  # a save
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._manager: ocp.CheckpointManager | None = None
        if cfg is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
                self._set_aside_incomplete()
            except OSError as error:
                raise from_os_error(error, str(self.directory)) from error
            kept: list[Any] = [checkpoint_managers.LatestN(cfg.keep_last)]
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
        """Start to write `state` (a pytree of jax arrays) and `extras` (JSON values).

        extras: the position in the data, the seed and the resolved configuration.

        Returns once the arrays are copied to the host, so `state` may be donated right away and
        `extras` changed. Saving the step just saved or restored does nothing. Raises
        CheckpointError if this save cannot start, or if the previous one failed in the background.
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
                f"{self.directory / str(step)} exists already. Restore it to go on from there, or "
                "remove it."
            )
        leaves, _ = _flatten(state)
        no_arrays = []
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                no_arrays.append(f"{path}: {type(leaf).__name__}")
        if no_arrays:
            raise TypeError("only jax arrays can be saved: " + ", ".join(no_arrays[:_SHOWN]))
        try:
            extras = json.loads(json.dumps(extras, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"the extras of a checkpoint must be JSON values: {error}") from error
        self.check_space(leaves, step)
        described = _describe(leaves)
        for path, digest in jax.device_get(digests(leaves)).items():
            described[path]["digest"] = int(digest)
        manifest = {
            "leaves": described,
            "step": step,
            "sha256": _sha256([described, extras, step]),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves),
            extras=ocp.args.JsonSave(extras),
            manifest=ocp.args.JsonSave(manifest),
        )
        try:
            # Without `force` Orbax would silently skip the save, if a folder had a higher number.
            self._manager.save(step, args=items, force=True)
        except jax.errors.JaxRuntimeError:
            raise  # this is not the disk: memory, or a collective that another process has left
        except Exception as error:
            raise self._save_error(step, error) from error
        self._pending = step
        self._last = step

    def check_space(self, state: Any, step: int | None = None) -> None:
        """Raises CheckpointSpaceError where the disk has no room for one more checkpoint.

        state: the arrays, or their shapes. step: of the save that is about to start, if there is
        one. Nothing is known of the room in a bucket, so all of it counts as free.
        """
        arrays = jax.tree.leaves(state)
        needed = sum(x.size * x.dtype.itemsize for x in arrays) + _BYTES_BESIDE_ARRAYS
        free = None
        if is_first() and "://" not in str(self.directory):
            free = _free_bytes(self.directory)
            if free < needed:
                self._sweep()
                free = _free_bytes(self.directory)
        free = broadcast_from_first(free)
        if free is not None and free < needed:
            name = "the next checkpoint"
            if step is not None:
                name = f"checkpoint {self.directory / str(step)}"
            raise CheckpointSpaceError(
                f"there is no room for {name}: it needs {needed / 1e6:.1f} MB, and the disk of "
                f"{self.directory} has {free / 1e6:.1f} MB free. Free some space, then run the "
                f"same command again; {self._what_is_kept()}."
            )

    def wait(self) -> None:
        """Wait until the save under way is complete. Raises CheckpointError if it failed."""
        step = self._pending
        self._pending = None
        if step is None or self._manager is None:
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
            if self._has_failed:
                self._sweep_after_failure()  # threads may have written until now

    def steps(self) -> list[int]:
        """The complete checkpoints on disk, ascending. A save under way is not among them."""
        folders = self._step_folders()
        return sorted(step for step, folder in folders.items() if not _missing_part(folder))

    def restore(self, abstract_state: Any) -> Restored | None:
        """The state of the newest complete checkpoint, verified; None if there is none.

        abstract_state: a tree of jax.ShapeDtypeStruct with shardings; the mesh may differ from the
        one that saved. A damaged checkpoint is put aside (a reader skips it), with a notice, and
        the one before it is tried. Raises CheckpointError if the tree differs from what was saved,
        or if all checkpoints are damaged.
        """
        restored = self._read_newest(abstract_state, "")
        if restored is not None:
            self._last = restored.step  # a stop before the next step has nothing new to save
        return restored

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Restored | None:
        """As `restore`, of the state's `params` alone: the optimiser's arrays are not read.

        step: that of the checkpoint; None means the newest. Raises CheckpointError where there is
        no complete checkpoint of that step.
        """
        if step is None:
            return self._read_newest(abstract_params, "params/")
        if step not in self.steps():
            raise CheckpointError(
                f"{self.directory} holds no complete checkpoint of step {step}; "
                f"it has {self.steps()}."
            )
        return self._read(step, abstract_params, "params/")

    def identity(self, step: int) -> CheckpointIdentity:
        """Which parameters the checkpoint of a step holds. Raises CheckpointError."""
        if step not in self.steps():
            raise CheckpointError(
                f"{self.directory} holds no complete checkpoint of step {step}; "
                f"it has {self.steps()}."
            )
        folder = self.directory / str(step)
        try:
            manifest, extras = self._read_json(folder)
            _check_manifest(step, manifest, extras)
            digest_of = {}
            for path, leaf in manifest["leaves"].items():
                if path.startswith("params/"):
                    digest_of[path] = leaf["digest"]
        except Exception as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged ({_cause(error)})."
            ) from error
        return CheckpointIdentity(_sha256(digest_of), extras)

    # ------------------------------------------------------------ folders

    def _step_folders(self) -> dict[int, epath.Path]:
        if not self.directory.exists():
            return {}
        folders = {}
        for folder in self.directory.iterdir():
            if re.fullmatch("0|[1-9][0-9]*", folder.name):
                folders[int(folder.name)] = folder
        return folders

    def _newest(self, skipped: set[int]) -> int | None:
        """The newest complete step, as the first process sees it: no other may restore another."""
        self.wait()
        newest = None
        if is_first():
            newest = self._newest_on_disk(skipped)
        return broadcast_from_first(newest)

    def _newest_on_disk(self, skipped: set[int]) -> int | None:
        for step, folder in sorted(self._step_folders().items(), reverse=True):
            if step in skipped:
                continue
            missing = _missing_part(folder)
            if missing is None:
                return step
            _notice(f"skipped the incomplete checkpoint {folder} (no {missing}).")
        return None

    def _read_newest(self, abstract: Any, prefix: str) -> Restored | None:
        """What the newest whole checkpoint holds; damaged ones are put aside, or skipped."""
        damaged: set[int] = set()
        last_error: DamagedCheckpointError | None = None
        while True:
            step = self._newest(damaged)
            if step is None and last_error is None:
                return None
            if step is None:
                raise CheckpointError(
                    f"{self.directory} has no whole checkpoint left: {last_error} Copy one back, "
                    "or remove the run's folder to start again."
                ) from last_error
            restored = None
            try:
                restored = self._read(step, abstract, prefix)
            except DamagedCheckpointError as error:
                last_error = error
            if not any_true(restored is None):
                return restored
            damaged.add(step)
            if last_error is None:
                last_error = DamagedCheckpointError("another process cannot read it.")
            self._put_aside_damaged(step, last_error)

    def _put_aside_damaged(self, step: int, error: DamagedCheckpointError) -> None:
        """Rename the damaged checkpoint; a reader of the directory only says that it is skipped."""
        if is_first():
            folder = self.directory / str(step)
            what_follows = "it is skipped"
            if self._manager is not None:
                target = folder.rename(self._free_name(f"{folder.name}.damaged"))
                what_follows = f"it is now {target.name}, and can be removed"
            _notice(f"{error} {what_follows}; the checkpoint before it is used instead.")
        multihost_utils.sync_global_devices("damaged_checkpoint")
        if self._manager is not None:
            self._manager.reload()

    def _sweep(self) -> None:
        """Remove what can never be restored: Orbax's temporary folders, incomplete ones put aside.

        They fill the disk. Damaged checkpoints stay: people may want to look at them.
        """
        if not is_first():
            return
        for folder in self.directory.iterdir():
            is_incomplete = re.fullmatch(r"[0-9]+\.incomplete-[0-9]+", folder.name)
            if is_incomplete or "orbax-checkpoint-tmp" in folder.name:
                folder.rmtree(missing_ok=True)

    def _set_aside_incomplete(self) -> None:
        """Rename incomplete step folders, so that Orbax does not count them as steps."""
        if is_first():
            for folder in self._step_folders().values():
                missing = _missing_part(folder)
                if missing is not None:
                    target = folder.rename(self._free_name(f"{folder.name}.incomplete"))
                    _notice(
                        f"skipped the incomplete checkpoint {folder} (no {missing}); it is now "
                        f"{target.name}, and can be removed."
                    )
        # The others wait for it; in a single process this returns at once.
        multihost_utils.sync_global_devices("checkpoint_folders")

    def _free_name(self, stem: str) -> epath.Path:
        """`stem`-0, or the next number that is not taken."""
        taken = {file.name for file in self.directory.iterdir()}
        n = 0
        while f"{stem}-{n}" in taken:
            n += 1
        return self.directory / f"{stem}-{n}"

    def _save_error(self, step: int, error: Exception) -> CheckpointError:
        self._last = None
        if self._manager is not None:
            # Orbax has already forgotten the steps that the failed one was to replace.
            self._manager.reload()
        self._has_failed = True
        self._sweep_after_failure()
        name = f"checkpoint {self.directory / str(step)}"
        if is_out_of_space(error):
            return CheckpointSpaceError(
                f"{name} was not saved (the disk is full, or a file has reached `ulimit -f`). "
                f"Check free space, then run the same command again; {self._what_is_kept()}."
            )
        return CheckpointError(
            f"{name} was not saved ({_cause(error)}). Check free space and permissions, then run "
            f"the same command again; {self._what_is_kept()}."
        )

    def _sweep_after_failure(self) -> None:
        try:
            self._sweep()
        except OSError:
            return  # the next start sweeps again; what has failed is more important

    def _what_is_kept(self) -> str:
        steps = self.steps()
        if steps:
            return f"the newest complete one is step {steps[-1]}"
        return "there is no complete one"

    # ------------------------------------------------------------ reading

    def _read_json(self, folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The manifest and the extras of a step folder."""
        items = ocp.args.Composite(manifest=ocp.args.JsonRestore(), extras=ocp.args.JsonRestore())
        texts = self._reader.restore(folder, args=items)
        return texts.manifest, texts.extras

    def _read(self, step: int, abstract: Any, prefix: str) -> Restored:
        """The arrays below `prefix`, as the abstract tree asks for them."""
        folder = self.directory / str(step)
        wanted, treedef = _flatten(abstract, prefix)
        unplaced = [path for path, x in wanted.items() if x.sharding is None]
        if unplaced:
            raise ValueError(
                "restoring needs a sharding for every array; none for: "
                + ", ".join(unplaced[:_SHOWN])
            )
        try:
            manifest, extras = self._read_json(folder)
            stored = manifest["leaves"]
            _check_manifest(step, manifest, extras)
            stored_below_prefix = {
                path: leaf for path, leaf in stored.items() if path.startswith(prefix)
            }
            _check_structure(folder, stored_below_prefix, wanted)
            request = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
            leaves = self._reader.restore(folder, args=ocp.args.Composite(state=request)).state
            actual = jax.device_get(digests(leaves))
            damaged = [path for path in wanted if int(actual[path]) != stored[path]["digest"]]
            if damaged:
                raise ValueError(
                    f"the digest of {len(damaged)} arrays differs: " + ", ".join(damaged[:_SHOWN])
                )
        except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError, PermissionError):
            raise  # this is no damage: another model, or a lack of memory or rights
        except Exception as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged ({_cause(error)})."
            ) from error
        tree = jax.tree.unflatten(treedef, [leaves[path] for path in wanted])
        return Restored(step, tree, extras)


def _check_manifest(step: int, manifest: dict[str, Any], extras: dict[str, Any]) -> None:
    """Raises ValueError where manifest or extras are not those that were saved as this step.

    Checkpoints of before the step was part of the digest have no `step` in their manifest.
    """
    digested = [manifest["leaves"], extras]
    if "step" in manifest:
        digested.append(manifest["step"])
    if _sha256(digested) != manifest["sha256"]:
        raise ValueError("the digest of extras/ and manifest/ differs")
    if manifest.get("step", step) != step:
        raise ValueError(f"it was saved as step {manifest['step']}, and copied to this number")


def _free_bytes(directory: epath.Path) -> int:
    return shutil.disk_usage(Path(directory)).free


def _already_raised(record: logging.LogRecord) -> bool:
    """Log filter: Orbax logs a failed save five times, with its traceback.

    It is raised, with its cause, by `wait`. asyncio then logs it once more, as never retrieved.
    """
    return not (record.exc_info and ("orbax" in record.pathname or "asyncio" in record.pathname))


@functools.cache
def _quieten_tensorstore() -> None:
    """Do not print the error of threads that report a failed write to an event loop that has ended.

    After the first write that failed, Orbax closes its loop, and `wait` raises that failure.
    tensorstore's threads then print one traceback for each write that fails after it.
    """
    previous_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return
        previous_hook(unraisable)

    sys.unraisablehook = hook


def _cause(error: Exception) -> str:
    """One line of an error; Orbax's run to pages. The whole of it is in __cause__."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]


def _notice(text: str) -> None:
    print(f"sapo_jax: {text}", file=sys.stderr, flush=True)


def _missing_part(folder: epath.Path) -> str | None:
    """What a step folder lacks to be complete; None if it is."""
    # On gs:// a folder appears before it is committed.
    if not ocp.utils.is_checkpoint_finalized(folder):
        return "commit_success.txt"
    for name in _REQUIRED:
        if not (folder / name).exists():
            return name
    return None


def _check_structure(folder: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError that lists the arrays which differ in presence, shape or dtype."""
    lines = []
    expected = _describe(wanted)
    for path in sorted(stored.keys() | expected.keys()):
        if path not in expected:
            lines.append(f"{path}: only in the checkpoint")
        elif path not in stored:
            lines.append(f"{path}: only in the configured model and optimiser")
        else:
            saved = _array_type(stored[path])
            configured = _array_type(expected[path])
            if saved != configured:
                lines.append(f"{path}: {saved} in the checkpoint, {configured} configured now")
    if lines:
        shown = lines[:_SHOWN]
        if len(lines) > _SHOWN:
            shown.append(f"... and {len(lines) - _SHOWN} more")
        raise CheckpointError(
            f"checkpoint {folder} is of another model or optimiser than the config describes. Use "
            "the config it was saved with, or another run folder.\n  " + "\n  ".join(shown)
        )


def _array_type(leaf: dict[str, Any]) -> str:
    """For example `float32[4, 8]`."""
    return f"{leaf['dtype']}{leaf['shape']}"
