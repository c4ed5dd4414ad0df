"""The exceptions whose message is written for people, and the exit codes of the command line.

A `UserError` says what is wrong and what to do about it, so the command line prints its message
alone, without a traceback. Everything else that is raised is a bug and keeps its traceback.
Imports nothing of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

STOPPED = (
    75  # exit code (EX_TEMPFAIL) of a run that was told to stop, has saved, and can be resumed
)


class UserError(Exception):
    """Something that the user can put right; the message says what is wrong and what to do."""


class Stopped(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


class RunError(UserError, RuntimeError):
    """The run cannot go on."""


class FolderError(UserError, RuntimeError):
    """The folder belongs to another process, or cannot be claimed."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, read or trusted; the message names the folder."""


class ProcessError(UserError, RuntimeError):
    """The processes cannot be one job."""


class WorkerError(UserError, RuntimeError):
    """A verifier worker cannot start, or cannot prepare a verifier: no item is to blame."""


class AnalysisError(UserError, RuntimeError):
    """There is nothing to analyse."""


class ReportError(UserError, RuntimeError):
    """There is nothing to report."""


class PlanError(UserError, ValueError):
    """The plan cannot be made: an unknown topology, or a config that does not fit on it."""


class ModelDirError(UserError, ValueError):
    """A model directory cannot be used.

    `problems` holds all that is wrong with it; the text lists them.
    """

    def __init__(self, folder: str | Path, problems: list[str]):
        self.problems = problems
        super().__init__(_listed(folder, problems))


class GGUFError(UserError, ValueError):
    """A GGUF file cannot be converted.

    `problems` holds all that was found; the text lists them under `source`.
    """

    def __init__(self, source: Any, problems: list[str]):
        self.problems = tuple(problems)
        super().__init__(_listed(source, problems))


def _listed(source: Any, problems: list[str]) -> str:
    """The problems, one a line, under what has them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{source}: {count}", *problems])


SHOWN = 20  # mistakes listed in one message


class DataError(UserError, ValueError):
    """Data or its settings cannot be used.

    `mistakes` holds all of them; the message shows the first 20.
    """

    def __init__(self, *mistakes: str):
        self.mistakes = list(mistakes)
        lines = self.mistakes[:SHOWN]
        if len(self.mistakes) > SHOWN:
            lines.append(f"... and {len(self.mistakes) - SHOWN} more")
        if len(self.mistakes) > 1:
            lines.insert(0, f"{len(self.mistakes)} mistakes in the data:")
        super().__init__("\n  ".join(lines))
