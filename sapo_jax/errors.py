"""The exceptions whose message is written for people, and the exit codes of the command line.

A `UserError` says what is wrong and what to do about it, so the command line prints its message
alone, without a traceback. Everything else that is raised is a bug and keeps its traceback.
Imports nothing of this package.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Exit code (EX_TEMPFAIL) of a run that was told to stop, has saved, and can be resumed.
STOPPED = 75
MISTAKES_SHOWN = 20  # by the message of a DataError
PROBLEMS_SHOWN = 50  # by the message of an error about a configuration or a model's files


# Exit code (EX_IOERR) of a command that the disk, or a limit on the size of files, has stopped.
NO_SPACE = 74
_NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something that the user can put right; the message says what is wrong and what to do."""

    exit_code = 1  # of a command that ends with this error


class Stopped(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


class RunError(UserError, RuntimeError):
    """The run cannot go on."""


class FolderError(UserError, RuntimeError):
    """The folder belongs to another process, or cannot be claimed, read or written."""


class NoSpaceError(FolderError):
    """The disk is full, or a file has reached the limit on the size of files."""

    exit_code = NO_SPACE


class LogError(UserError, ValueError):
    """A log of a run lacks rows, or holds lines that are no rows; the message names them."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, read or trusted; the message names the folder."""


class CheckpointSpaceError(NoSpaceError, CheckpointError):
    """There is no room for a checkpoint; those that are complete stay."""


class ProcessError(UserError, RuntimeError):
    """The processes cannot be one job."""


class WorkerError(UserError, RuntimeError):
    """A verifier worker cannot start, or cannot prepare a verifier: no item is to blame."""


class AnalysisError(UserError, RuntimeError):
    """There is nothing to analyse."""


class ReportError(UserError, RuntimeError):
    """There is nothing to report."""


_ADVICE = {
    errno.EACCES: "give yourself the right to it, or set another place",
    errno.EPERM: "give yourself the right to it, or set another place",
    errno.EROFS: "set another place, on a file system that can be written",
    errno.ENAMETOOLONG: "set a shorter name",
    errno.EEXIST: "something that is no folder has that name: remove it, or set another place",
    errno.ENOTDIR: "a part of this path is no folder: set another place",
    errno.EISDIR: "a folder is where a file belongs: remove it, or set another place",
    errno.ELOOP: "its links lead in a circle: set another place",
    errno.ENOENT: "it cannot be made there: set another place",
    errno.EMFILE: "this process may not open more files: raise the limit, as in `ulimit -n 1024`",
    errno.ENFILE: "the machine has no more open files to give: end other processes",
    errno.EIO: "the device has failed: set another place",
    errno.ENOMEM: "there is no memory left: end other processes",
    errno.EFBIG: "it has reached the limit on the size of files: raise `ulimit -f`, then run the "
    "same command again",
}


def is_out_of_space(error: BaseException) -> bool:
    """Whether the disk is full, or a file has reached the limit on the size of files.

    Libraries wrap the operating system's error, or only quote it; so its causes and its text count.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_SPACE_ERRNOS:
            return True
        text = str(cause)
        if "No space left on device" in text or "File too large" in text:
            return True
        if "Disk quota exceeded" in text:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def from_os_error(error: OSError, path: str | Path | None = None) -> FolderError:
    """The operating system's error as a message for people: the path, what is wrong, what to do.

    path: named where the error itself names none. This is the one place that words such errors.
    """
    place = error.filename
    if place is None:
        place = path
    reason = error.strerror or str(error) or type(error).__name__
    if place is not None:
        reason = f"{place}: {reason}"
    advice = _ADVICE.get(error.errno or 0, "put that right, then run the same command again")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, then run the same command again: a run goes on from its newest "
        advice += "checkpoint"
    if is_out_of_space(error):
        return NoSpaceError(f"{reason}; {advice}")
    return FolderError(f"{reason}; {advice}")


class PlanError(UserError, ValueError):
    """The plan cannot be made: an unknown topology, or a config that does not fit on it."""


class ModelDirError(UserError, ValueError):
    """A model directory cannot be used.

    `problems` holds all that is wrong with it; the text lists the first 50.
    """

    def __init__(self, folder: str | Path, problems: list[str]):
        self.problems = problems
        super().__init__(listed(folder, problems))


class GGUFError(UserError, ValueError):
    """A GGUF file cannot be converted.

    `problems` holds all that was found; the text lists the first 50 under `source`.
    """

    def __init__(self, source: Any, problems: list[str]):
        self.problems = tuple(problems)
        super().__init__(listed(source, problems))


def listed(source: Any, problems: Sequence[object]) -> str:
    """The problems, one a line, under what has them; the first 50, and how many more there are."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{source}: {count}", *map(str, problems[:PROBLEMS_SHOWN])]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"... and {len(problems) - PROBLEMS_SHOWN} more")
    return "\n  ".join(lines)


class DataError(UserError, ValueError):
    """Data or its settings cannot be used.

    `mistakes` holds all of them; the message shows the first 20.
    """

    def __init__(self, *mistakes: str):
        self.mistakes = list(mistakes)
        lines = self.mistakes[:MISTAKES_SHOWN]
        if len(self.mistakes) > MISTAKES_SHOWN:
            lines.append(f"... and {len(self.mistakes) - MISTAKES_SHOWN} more")
        if len(self.mistakes) > 1:
            lines.insert(0, f"{len(self.mistakes)} mistakes in the data:")
        super().__init__("\n  ".join(lines))
