"""Checkpoints of one stage: train state, data position, seed, config, and a digest of every array.

Orbax writes them, asynchronously and atomically. Six things are added here, because a run must
either resume exactly or say why it cannot:

* every array carries a digest, computed on the device where it lives; Orbax alone restores a
  flipped byte silently;
* what is complete is decided by looking at the folder; an incomplete one is skipped with a notice;
* a damaged one is put aside (`<step>.damaged-<n>`), and the newest whole one restored instead;
* before a save starts, the room that it needs is compared with what is free;
* a state that is not finite, or whose parameters have been blown up since the checkpoint before,
  replaces nothing: it is not saved (`arrays.why_ruined`);
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
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from sapo_jax.config import schema
from sapo_jax.distributed.processes import any_true, broadcast_from_first, is_first
from sapo_jax.errors import (
    CheckpointError,
    CheckpointSpaceError,
    from_os_error,
    is_out_of_space,
)
from sapo_jax.io.arrays import (
    describe,
    digests,
    flatten,
    root_mean_squares,
    why_blown_up,
    why_not_finite,
    why_ruined,
)
from sapo_jax.io.step_folders import (
    complete_steps,
    misnamed_checkpoints,
    missing_part,
    step_folders,
)

_UNREADABLE = "Encountered error while reading array"  # how Orbax's error begins
# The name of the array in an error of tensorstore: of its metadata, or of what they describe.
_ARRAY_IN_ERROR = re.compile(r"""(?:at|reading) "([^"]+)/\.zarray"|'path': '([^/'][^']*)/'""")
FEWEST_KEPT = 2  # checkpoints, whatever checkpoint.keep_last says
_SHOWN = 8  # leaves listed in an error
# Beside the arrays a checkpoint holds small files: on a disk each takes a block or two.
_BYTES_BESIDE_ARRAYS = 200_000


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- one stage's checkpoints


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not what was saved."""


class RuinedStateError(CheckpointError):
    """A state was not saved, because it is not finite or its parameters were blown up.

    `reason` says what shows it.
    """

    def __init__(self, reason: str, text: str):
        self.reason = reason
        super().__init__(text)


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
        # Root mean squares of the arrays saved, restored or begun with last; {}: none yet.
        self._trusted_sizes: dict[str, float] = {}
        self._refuses_blown_up = cfg is not None and cfg.on_ruin == "stop"
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._manager: ocp.CheckpointManager | None = None
        if cfg is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
                self._refuse_links()
                self._set_aside_incomplete()
            except OSError as error:
                raise from_os_error(error, str(self.directory)) from error
            self._look_for_misnamed()
            # Never one alone: while the newest is not yet known to restore, there is another.
            kept: list[Any] = [checkpoint_managers.LatestN(max(cfg.keep_last, FEWEST_KEPT))]
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
        CheckpointError if this save cannot start, or if the previous one failed in the background;
        RuinedStateError where the state is worth less than the checkpoints that are there.
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
        leaves, _ = flatten(state)
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
        sizes = _sizes_of(leaves)
        reason = why_not_finite(sizes)
        if reason is None and self._refuses_blown_up:
            reason = why_blown_up(self._trusted_sizes, sizes)
        if reason is not None:
            name = f"checkpoint {self.directory / str(step)}"
            text = f"{name} was not saved: {reason}; {self.what_is_kept()}."
            raise RuinedStateError(reason, text)
        self.check_space(leaves, step)
        self._check_writable(step)
        described = describe(leaves)
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
        self._trusted_sizes = sizes

    def begin_with(self, state: Any) -> None:
        """The state that training starts from, as what the first checkpoint is compared with."""
        leaves, _ = flatten(state)
        self._trusted_sizes = _sizes_of(leaves)

    def why_ruined(self, state: Any) -> str | None:
        """What shows that a state should not replace the checkpoint before; None: nothing does."""
        leaves, _ = flatten(state)
        return why_ruined(self._trusted_sizes, _sizes_of(leaves))

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
                f"same command again; {self.what_is_kept()}."
            )

    def _check_writable(self, step: int) -> None:
        """Raises CheckpointError where no folder can be made for the step; a collective.

        Orbax would find that out in a thread, while others wait for it: at the end of the program,
        for ten minutes.
        """
        failure: OSError | None = None
        if is_first() and "://" not in str(self.directory):
            # Its name is one that is swept, if a kill leaves it.
            trial = self.directory / f"{step}.orbax-checkpoint-tmp-trial"
            try:
                trial.mkdir(parents=True, exist_ok=True)  # Orbax makes the folder when it saves
                trial.rmdir()
            except OSError as error:
                failure = error
        if any_true(failure is not None):
            cause = failure or OSError("the first process cannot write there")
            raise self._save_error(step, cause) from failure

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
        return complete_steps(self.directory)

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
            self.begin_with(restored.tree)
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

    def _newest(self, skipped: set[int]) -> int | None:
        """The newest complete step, as the first process sees it: no other may restore another."""
        self.wait()
        if self._manager is None and not skipped:
            self._look_for_misnamed()
        newest = None
        if is_first():
            newest = self._newest_on_disk(skipped)
        return broadcast_from_first(newest)

    def _look_for_misnamed(self) -> None:
        """Say which checkpoints have a name that is no step.

        Raises CheckpointError where one of them is newer than all others: to go on from an older
        one, or to start again, would be a decision that nobody has made.
        """
        newest = max(self.steps(), default=-1)
        for folder, step in misnamed_checkpoints(self.directory):
            text = f"{folder} is the checkpoint of step {step} under another name"
            if step > newest:
                raise CheckpointError(
                    f"{text}, and the newest there is. Rename it to {step} to go on from it, or "
                    "move it out of this folder to go on without it"
                )
            if is_first():
                _notice(f"{text}; it is not used.")

    def _refuse_links(self) -> None:
        """Raises CheckpointError for a step folder that is a link: it could not be removed."""
        for folder in step_folders(self.directory).values():
            if Path(folder).is_symlink():
                raise CheckpointError(
                    f"{folder} is a link. A run removes its old checkpoints, which a link to one "
                    "does not survive: put a copy in its place (cp -rL), or remove the link"
                )

    def _newest_on_disk(self, skipped: set[int]) -> int | None:
        for step, folder in sorted(step_folders(self.directory).items(), reverse=True):
            if step in skipped:
                continue
            missing = missing_part(folder)
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
            for folder in step_folders(self.directory).values():
                missing = missing_part(folder)
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
                f"Check free space, then run the same command again; {self.what_is_kept()}."
            )
        return CheckpointError(
            f"{name} was not saved ({_cause(error)}). Check free space and permissions, then run "
            f"the same command again; {self.what_is_kept()}."
        )

    def _sweep_after_failure(self) -> None:
        try:
            self._sweep()
        except OSError:
            return  # the next start sweeps again; what has failed is more important

    def what_is_kept(self) -> str:
        """A clause about the newest complete checkpoint, for messages."""
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
        wanted, treedef = flatten(abstract, prefix)
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
        raise ValueError(
            f"it was saved as step {manifest['step']}, and renamed or copied to this number"
        )


def _sizes_of(leaves: dict[str, jax.Array]) -> dict[str, float]:
    sizes = jax.device_get(root_mean_squares(leaves))
    return {path: float(size) for path, size in sizes.items()}


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
    tensorstore's threads then print one traceback for each write that fails after it. Likewise with
    reading: the first array that cannot be read is raised, the others would be printed.
    """
    previous_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        text = str(unraisable.exc_value)
        if text == "Event loop is closed" or text.startswith(_UNREADABLE):
            return
        previous_hook(unraisable)

    sys.unraisablehook = hook


def _cause(error: Exception) -> str:
    """One line of an error; tensorstore's run to pages. The whole of it is in __cause__."""
    text = str(error)
    array = _ARRAY_IN_ERROR.search(text)
    if array is not None:
        name = array.group(1) or array.group(2)
        return f"the array {name} cannot be read: a file below state/ is missing or damaged"
    return f"{type(error).__name__}: {text}".splitlines()[0][:400]


def _notice(text: str) -> None:
    print(f"sapo_jax: {text}", file=sys.stderr, flush=True)


def _check_structure(folder: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError that lists the arrays which differ in presence, shape or dtype."""
    lines = []
    expected = describe(wanted)
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
