"""Whether held-out problems are really held out: for the commands that read a finished run.

`sapo-jax eval RUN data.held_out=40`, another `data.seed`, or a file that was cut short or edited
since split the problems anew. What the run was trained on may then lie on the held-out side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sapo_jax.config import load
from sapo_jax.config.load import diff
from sapo_jax.data import load_demonstrations, load_problems, trained_on
from sapo_jax.data.identity import content_of, question_hash
from sapo_jax.errors import RunError
from sapo_jax.io.files import CONFIG
from sapo_jax.training.run import Run, TrainedParams, gold_check, say
from sapo_jax.types import Prompt

_NAMED = 3  # problems that the message names


def check_held_out(run: Run, trained: TrainedParams) -> None:
    """Raise RunError where the parameters were trained on some of the run's held-out problems.

    The checkpoint says which problems it was trained on. One that an older version wrote does not:
    then it is worked out from the run's config.yaml, and a notice says so.
    """
    saved = trained.data
    if saved is None:  # pretrained weights: the run has trained on nothing yet
        return
    held_out = run.problems.held_out
    saved_held_out = saved.get("held_out")
    if saved_held_out is not None and saved_held_out["digest"] == content_of(held_out)["digest"]:
        return  # the very problems that the run itself held out
    overlap = trained_on(saved, held_out)
    if overlap is None:
        overlap = _overlap_by_config(run)
    demonstrated = _demonstrated(run)
    overlap += [prompt for prompt in demonstrated if prompt not in overlap]
    if not overlap:
        return
    questions = ", ".join(repr(prompt.question[:40]) for prompt in overlap[:_NAMED])
    if len(overlap) > _NAMED:
        questions += ", ..."
    raise RunError(
        f"{len(overlap)} of the {len(held_out)} held-out problems were trained on by this run"
        f" ({questions}): their score would say nothing."
        " Leave data.held_out, data.seed and data.tasks as the run's config.yaml has them and its"
        " files as they were, or name other problems as held_out_path of a task"
    )


def _overlap_by_config(run: Run) -> list[Prompt]:
    """The held-out problems that the run's own config.yaml trains on, with the files of today."""
    stored = load(run.folder.logs / CONFIG)
    say(
        [
            "the checkpoint does not hold which problems it was trained on; that is worked out"
            " from the run's config.yaml and the files as they are now"
        ]
    )
    if not any(key.startswith("data.") for key in diff(stored, run.cfg)):
        return []
    problems = load_problems(stored.data, run.tokenizer, check=gold_check(run.verifiers))
    return _common(run, problems.train.values())


def _demonstrated(run: Run) -> list[Prompt]:
    """The held-out problems that the cold start's demonstrations show how to answer."""
    cold_start = run.cfg.cold_start
    if not cold_start.steps or cold_start.demonstrations is None:
        return []
    demonstrations = load_demonstrations(
        cold_start.demonstrations, run.cfg.data, run.tokenizer, held_out=()
    )
    return _common(run, [demonstrations])


def _common(run: Run, trained: Iterable[Sequence[Prompt]]) -> list[Prompt]:
    questions = {question_hash(prompt) for prompts in trained for prompt in prompts}
    return [prompt for prompt in run.problems.held_out if question_hash(prompt) in questions]
