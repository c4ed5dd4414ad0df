"""The folders of a stage's checkpoints: which are complete, which have a name that is no step.

A complete checkpoint is a folder whose name is its step, as `str` writes it, and that holds
everything in `REQUIRED`.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

REQUIRED = ("_CHECKPOINT_METADATA", "state/_METADATA", "extras/metadata", "manifest/metadata")
_SET_ASIDE = re.compile(r"[0-9]+\.(incomplete|damaged)-[0-9]+")


class Misnamed(NamedTuple):
    """A checkpoint under a name by which no run looks for it."""

    folder: epath.Path
    step: int  # as which it was saved


def step_folders(directory: epath.Path) -> dict[int, epath.Path]:
    """The folders whose name is a step, complete or not."""
    if not directory.exists():
        return {}
    folders = {}
    for folder in directory.iterdir():
        if re.fullmatch("0|[1-9][0-9]*", folder.name):
            folders[int(folder.name)] = folder
    return folders


def missing_part(folder: epath.Path) -> str | None:
    """What a step folder lacks to be complete; None if it is."""
    if not folder.exists():
        return "folder where its link leads"
    # On gs:// a folder appears before it is committed.
    if not ocp.utils.is_checkpoint_finalized(folder):
        return "commit_success.txt"
    for name in REQUIRED:
        if not (folder / name).exists():
            return name
    return None


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    folders = step_folders(directory)
    return sorted(step for step, folder in folders.items() if missing_part(folder) is None)


def misnamed_checkpoints(directory: epath.Path) -> list[Misnamed]:
    """Checkpoints whose folder was renamed to something that is no step: `03`, `3 (copy)`.

    Those that this package has put aside itself are none of them.
    """
    if not directory.exists():
        return []
    misnamed = []
    for folder in directory.iterdir():
        is_step = re.fullmatch("0|[1-9][0-9]*", folder.name)
        if is_step or _SET_ASIDE.fullmatch(folder.name) or "orbax-checkpoint-tmp" in folder.name:
            continue
        step = saved_step(folder)
        if step is not None:
            misnamed.append(Misnamed(folder, step))
    return misnamed


def saved_step(folder: epath.Path) -> int | None:
    """The step as which a folder was saved; None where it is no checkpoint, or does not say."""
    try:
        step = json.loads((folder / "manifest" / "metadata").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def newest_extras(directory: epath.Path) -> tuple[int, dict] | None:
    """(step, extras) of the newest complete checkpoint, read without its arrays and unverified.

    None where there is no complete one, or where its extras cannot be read: `Checkpoints.restore`
    then says what is wrong with it.
    """
    steps = complete_steps(directory)
    if not steps:
        return None
    try:
        text = (directory / str(steps[-1]) / "extras" / "metadata").read_text()
        extras = json.loads(text)
    except (OSError, ValueError):
        return None
    if not isinstance(extras, dict):
        return None
    return steps[-1], extras
