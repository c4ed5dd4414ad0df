"""Dynamic sampling: which groups are kept, what a short batch is, who decides, and whole DAPO runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from sapo_jax.batch import Rollout
from sapo_jax.config import load
from sapo_jax.distributed.processes import ProcessShard
from sapo_jax.errors import RunError
from sapo_jax.rollout.groups import join_rollouts, take_groups
from sapo_jax.rollout.sampler import _sample
from sapo_jax.training.dynamic_sampling import MixedGroups, is_mixed
from sapo_jax.training.experience import GradedRollout, LocalPrompts
from sapo_jax.training.loop import train
from sapo_jax.types import Verdict
from tests.models import tiny
from tests.training.test_resume import (
    digests,
    finish,
    kill_when,
    samples,
    start,
    without_time,
    written,
)

G = 3
STATUS = {"y": "ok", "n": "wrong", "u": "unparsable", "t": "timeout", "e": "error"}


def graded(groups: str, first_index: int = 0) -> GradedRollout:
    """`yyn nnn`: a group of two correct completions and a wrong one, then three wrong ones.

    Rewards differ in all of them, so that nothing can be told from rewards.
    """
    letters = groups.replace(" ", "")
    prompts = [tiny.prompt(first_index + p, 3) for p in range(len(letters) // G)]
    return GradedRollout(
        prompts=prompts,
        length_B=np.arange(1, len(letters) + 1),
        finish_B=np.zeros(len(letters), np.int32),
        texts=[f"{first_index}-{b}" for b in range(len(letters))],
        verdicts=[Verdict(STATUS[x], 0.1 * b) for b, x in enumerate(letters)],
    )


def rollout(graded: GradedRollout, indices, experts: bool = False, S: int = 4) -> Rollout:
    """The completions of some groups; the first token is the prompt's index, the second the sample."""
    index_N = np.repeat([graded.prompts[i].index for i in indices], G)
    length_N = np.concatenate([graded.length_PG[i] for i in indices])
    tokens_NC = np.stack([index_N, np.tile(np.arange(G), len(indices))], axis=1).astype(np.int32)
    expert_ids = None
    if experts:
        expert_ids = np.broadcast_to(index_N[:, None, None, None], (len(index_N), S + 2, 1, 2))
    return Rollout(
        tokens_BC=tokens_NC,
        logp_BC=-tokens_NC.astype(np.float32),
        length_B=length_N,
        finish_B=np.zeros(len(index_N), np.int32),
        expert_ids_BTLk=expert_ids,
    )


def test_a_group_is_kept_if_some_are_correct_and_some_are_not():
    """By verdicts, although all rewards differ; a failed verifier says neither."""
    groups = "yyy nnn yyn yny utn uty eyy een eye eee eny yen"
    expected = [False, False, True, True, False, True, False, False, False, False, True, True]
    assert is_mixed(graded(groups)).tolist() == expected


def collect(rounds: list[str], num_groups: int, mini_batches: int, shard: ProcessShard):
    """MixedGroups after these rounds; prompts of round r have the indices 10 r, 10 r + 1, ..."""
    groups = MixedGroups(num_groups, mini_batches, shard, no_expert=9)
    for r, text in enumerate(rounds):
        its_graded = graded(text, 10 * r)
        indices = shard.local_indices(num_groups, mini_batches)
        local = LocalPrompts(its_graded.prompts, indices, shard)
        groups.add(local, rollout(its_graded, indices), its_graded)
    return groups


def test_a_batch_is_filled_in_the_order_of_drawing_and_what_is_left_over_is_dropped():
    rounds = ["yyn nnn yyy eee", "nnn yny ynn nny"]
    groups = collect(rounds, 4, 2, ProcessShard())
    assert groups.is_full
    batch, in_batch = groups.batch()
    assert [prompt.index for prompt in batch.local.batch] == [0, 11, 12, 13]
    assert batch.round_P.tolist() == [0, 1, 1, 1]
    assert in_batch.is_trained_P.all()
    assert is_mixed(in_batch).all()
    # tokens, lengths, texts and verdicts are of the same completions
    assert batch.rollout.tokens_BC[:, 0].tolist() == [0] * G + [11] * G + [12] * G + [13] * G
    np.testing.assert_array_equal(batch.rollout.length_B, in_batch.length_B)
    assert in_batch.texts[G] == "10-3"
    assert in_batch.verdicts[G + 1].status == "wrong"
    assert len(batch.drawn.prompts) == 8
    counts = {name.removeprefix("groups/"): count for name, count in batch.metrics.items()}
    assert counts == {
        "rounds": 2, "drawn": 8, "mixed": 4, "all_correct": 1, "all_wrong": 2, "failed": 1, "surplus": 0, "missing": 0,
    }  # fmt: skip


def test_groups_left_over_are_counted():
    batch = collect(["yyn yyn nnn yyn", "yyn yyn yyn yyn"], 4, 2, ProcessShard()).batch()[0]
    assert [prompt.index for prompt in batch.local.batch] == [0, 1, 3, 10]
    assert batch.metrics["groups/surplus"] == 3
    assert batch.metrics["groups/mixed"] == 7


def test_a_short_batch_is_filled_up_with_groups_that_are_not_trained_on():
    groups = collect(["nnn yyn nnn yyy"], 4, 2, ProcessShard())
    assert not groups.is_full
    assert groups.num_missing == 3
    batch, in_batch = groups.batch()
    assert [prompt.index for prompt in batch.local.batch] == [1, 0, 2, 3]
    assert in_batch.is_trained_P.tolist() == [True, False, False, False]
    assert batch.metrics["groups/missing"] == 3


def test_every_team_keeps_what_it_has_sampled():
    """Two teams, two mini-batches: places 0 and 2 are the first one's, 1 and 3 the second one's."""
    rounds = ["yyn nnn yyn nnn", "yyn nnn nnn yyn", "nnn nny nnn nnn"]
    both = []
    for team in (0, 1):
        shard = ProcessShard(team=team, teams=2)
        full = [collect(rounds[:r], 4, 2, shard).is_full for r in (1, 2, 3)]
        assert full == [False, False, True]  # the second team has nothing in the first round
        both.append(collect(rounds, 4, 2, shard).batch()[0])
    for batch in both:
        assert [prompt.index for prompt in batch.local.batch] == [0, 13, 2, 21]
        assert batch.metrics == both[0].metrics
        assert batch.metrics["groups/surplus"] == 1
    assert both[0].local.indices == [0, 2]
    assert both[1].local.indices == [1, 3]
    assert both[0].rollout.tokens_BC[::G, 0].tolist() == [0, 2]
    assert both[1].rollout.tokens_BC[::G, 0].tolist() == [13, 21]


def test_rollouts_with_prompts_of_different_widths_are_joined():
    """Recorded experts are aligned at the end of the prompt; what is missing is not recorded."""
    one = rollout(graded("yyn"), [0], experts=True, S=2)
    other = rollout(graded("yyn nnn", 5), [0, 1], experts=True, S=4)
    joined = join_rollouts([one, other], no_expert=9)
    ids = joined.expert_ids_BTLk
    assert ids.shape == (3 * G, 6, 1, 2)
    assert (ids[:G, :2] == 9).all()
    assert (ids[:G, 2:] == 0).all()
    assert (ids[G:, :, 0, 0] == joined.tokens_BC[G:, :1]).all()
    taken = take_groups(joined, [2, 0], G)
    assert taken.tokens_BC[:, 0].tolist() == [6] * G + [0] * G


# ---------------------------------------------------------------- whole runs

DYNAMIC = [
    "rollout.dynamic_sampling={max_rounds: 6}", "rewards.overlong={cache_tokens: 2}", "objective.name=grpo",
    "loss.normalization=token_mean", "evaluate.every=0", "cold_start.steps=20", "train.steps=5",
]  # fmt: skip


def rl_rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "rl" and row["step"] > 0]


def test_a_dapo_run_trains_on_groups_with_a_signal_alone(tiny_config, tmp_path):
    """The no-signal share of the update is 0 where there is any group; all rounds run one program."""
    programs_before = _sample._cache_size()
    train(load(tiny_config, [*DYNAMIC, "train.steps=4", f"run_dir={tmp_path}/run"]))
    rows = rl_rows(tmp_path / "run")
    assert [row["groups/no_signal_fraction"] for row in rows if row["groups/mixed"]]
    for row in rows:
        in_update = 4 - row["groups/missing"]
        assert row["groups/mixed"] == in_update + row["groups/surplus"]
        assert row["groups/drawn"] == 4 * row["groups/rounds"]
        assert row["groups/no_signal_fraction"] == (0 if in_update else 1)
        assert row["updates/skipped"] == 2 - np.ceil(in_update / 2)
    assert max(row["groups/rounds"] for row in rows) > 1
    assert _sample._cache_size() - programs_before <= 2  # of rollouts, and of evaluations


def test_a_short_batch_can_stop_the_run(tiny_config, tmp_path):
    settings = [
        *DYNAMIC,
        "rollout.dynamic_sampling={max_rounds: 2, short_batch: stop}",
        "cold_start.steps=0",
    ]
    with pytest.raises(RunError, match=r"2 rounds of dynamic sampling have left [1-4] of 4 groups"):
        train(load(tiny_config, [*settings, f"run_dir={tmp_path}/run"]))
    assert (tmp_path / "run" / "checkpoints" / "rl" / "0").exists()


@pytest.mark.slow
def test_killed_between_rounds_it_ends_as_one_that_was_left_alone(tiny_config, tmp_path):
    """The position in the data counts the rounds too."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    finish(tiny_config, whole, *DYNAMIC)
    for step in (1, 4):
        process = start(tiny_config, killed, *DYNAMIC)
        assert kill_when(process, written(killed, "rl", step), signal.SIGKILL) == -signal.SIGKILL
    finish(tiny_config, killed, *DYNAMIC)
    assert without_time(killed) == without_time(whole)
    assert samples(killed) == samples(whole)
    assert digests(killed, "rl", 5) == digests(whole, "rl", 5)
    assert max(row["groups/rounds"] for row in rl_rows(whole)) > 1


@pytest.mark.slow
def test_a_rollout_in_parts_is_the_same_rollout(tiny_config, tmp_path):
    folders = {}
    for at_once in (0, 1, 2):
        folders[at_once] = tmp_path / str(at_once)
        settings = [*DYNAMIC, f"rollout.prompts_at_once={at_once}", "train.steps=2"]
        train(load(tiny_config, [*settings, f"run_dir={folders[at_once]}"]))
    assert samples(folders[0]) == samples(folders[1]) == samples(folders[2])
    assert digests(folders[0], "rl", 2) == digests(folders[2], "rl", 2)
