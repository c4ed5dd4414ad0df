"""Checkpoints of one stage: train state, data position, seed, config, and a digest of every array.

Orbax writes them, asynchronously and atomically. Three things are added here, because a run must
either resume exactly or say why it cannot:

* every array carries a digest, computed on the device where it lives; Orbax alone restores a
  flipped byte silently;
* what is complete is decided by looking at the folder; an incomplete one is skipped with a notice;
* a save that failed in the background is raised by the next `wait`, `save` or `close`.

A step folder holds `state/` (one array per leaf, named by its path in the tree), `extras/` and
`manifest/` (JSON).
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

from sapo_jax import murmur
from sapo_jax.config import schema
from sapo_jax.distributed.processes import broadcast_from_first, is_first
from sapo_jax.errors import CheckpointError

_REQUIRED = ("_CHECKPOINT_METADATA", "state/_METADATA", "extras/metadata", "manifest/metadata")
_SHOWN = 8  # leaves listed in an error


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


class Checkpoints:
    """The checkpoints in `directory` (local or gs://), a context manager. cfg None: reading only.

    Opening for writing moves incomplete step folders aside (`<step>.incomplete-<n>`) and removes
    Orbax's temporary ones; so only one process group may have a directory open for writing. All
    processes make the same calls.
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
        described = _describe(leaves)
        for path, digest in jax.device_get(digests(leaves)).items():
            described[path]["digest"] = int(digest)
        manifest = {"leaves": described, "sha256": _sha256([described, extras])}
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
        self._pending = self._last = step

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

    def steps(self) -> list[int]:
        """The complete checkpoints on disk, ascending. A save under way is not among them."""
        folders = self._step_folders()
        return sorted(step for step, folder in folders.items() if not _missing_part(folder))

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extras) of the newest complete checkpoint, verified; None if there is none.

        abstract_state: a tree of jax.ShapeDtypeStruct with shardings; the mesh may differ from the
        one that saved. Raises CheckpointError if the tree differs from what was saved, or if the
        files are damaged.
        """
        step = self._newest()
        if step is None:
            return None
        restored = self._read(step, abstract_state, "")
        self._last = step  # a stop before the next step has nothing new to save
        return restored

    def restore_params(
        self, abstract_params: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """As `restore`, of the state's `params` alone: the optimiser's arrays are not read."""
        if step is None:
            step = self._newest()
        elif step not in self.steps():
            raise CheckpointError(
                f"{self.directory} holds no complete checkpoint of step {step}; "
                f"it has {self.steps()}."
            )
        if step is None:
            return None
        return self._read(step, abstract_params, "params/")

    # ------------------------------------------------------------ folders

    def _step_folders(self) -> dict[int, epath.Path]:
        if not self.directory.exists():
            return {}
        folders = {}
        for folder in self.directory.iterdir():
            if re.fullmatch("0|[1-9][0-9]*", folder.name):
                folders[int(folder.name)] = folder
        return folders

    def _newest(self) -> int | None:
        """The newest complete step, as the first process sees it: no other may restore another."""
        self.wait()
        newest = None
        if is_first():
            newest = self._newest_on_disk()
        return broadcast_from_first(newest)

    def _newest_on_disk(self) -> int | None:
        for step, folder in sorted(self._step_folders().items(), reverse=True):
            missing = _missing_part(folder)
            if missing is None:
                return step
            _notice(f"skipped the incomplete checkpoint {folder} (no {missing}).")
        return None

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
        steps = self.steps()
        kept = "there is no complete one"
        if steps:
            kept = f"the newest complete one is step {steps[-1]}"
        return CheckpointError(
            f"checkpoint {self.directory / str(step)} was not saved ({_cause(error)}). Check free "
            f"space and permissions, then run the same command again; {kept}."
        )

    # ------------------------------------------------------------ reading

    def _read(self, step: int, abstract: Any, prefix: str) -> tuple[int, Any, dict[str, Any]]:
        """(step, tree, extras): the arrays below `prefix`, as the abstract tree asks for them."""
        folder = self.directory / str(step)
        wanted, treedef = _flatten(abstract, prefix)
        unplaced = [path for path, x in wanted.items() if x.sharding is None]
        if unplaced:
            raise ValueError(
                "restoring needs a sharding for every array; none for: "
                + ", ".join(unplaced[:_SHOWN])
            )
        try:
            json_items = ocp.args.Composite(
                manifest=ocp.args.JsonRestore(), extras=ocp.args.JsonRestore()
            )
            texts = self._reader.restore(folder, args=json_items)
            extras = texts.extras
            stored = texts.manifest["leaves"]
            if _sha256([stored, extras]) != texts.manifest["sha256"]:
                raise ValueError("the digest of extras/ and manifest/ differs")
            stored_here = {p: leaf for p, leaf in stored.items() if p.startswith(prefix)}
            _check_structure(folder, stored_here, wanted)
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
            raise CheckpointError(
                f"checkpoint {folder} is damaged ({_cause(error)}). Delete this folder to go on "
                "from the checkpoint before it."
            ) from error
        tree = jax.tree.unflatten(treedef, [leaves[path] for path in wanted])
        return step, tree, extras


def _already_raised(record: logging.LogRecord) -> bool:
    """Log filter: Orbax logs a failed save five times, with its traceback.

    It is raised, with its cause, by `wait`.
    """
    return not (record.exc_info and "orbax" in record.pathname)


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
