"""Dynamic sampling: prompts are drawn until P groups have both right and wrong completions.

DAPO (arXiv 2503.14476, section 3.2): a group whose completions are all correct, or all wrong, has
no preference and gives no gradient. So such groups are dropped and further prompts are sampled, P
at a time, until P groups are there; what is left over is dropped too.

A group is judged by the verdicts of its verifier, before any shaping of rewards. Judged by "the
rewards differ", an all-wrong group whose completions differ in length would be kept under a length
penalty, and the division by the group's standard deviation would blow that penalty up to a
full-size gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sapo_jax.batch import Rollout
from sapo_jax.distributed.processes import ProcessShard
from sapo_jax.errors import RunError
from sapo_jax.rollout.groups import join_rollouts, take_groups
from sapo_jax.training.experience import GradedRollout, LocalPrompts, join_groups
from sapo_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class SampledGroups:
    """P groups of completions, sampled and perhaps graded."""

    local: LocalPrompts  # which of them are this team's
    rollout: Rollout  # of the prompts of this team
    round_P: np.ndarray  # in which round of the step each was sampled, from 0
    graded: GradedRollout | None = None  # of all P groups; None: not graded yet
    drawn: GradedRollout | None = None  # of all groups that were drawn, those dropped too
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def is_mixed(graded: GradedRollout) -> np.ndarray:
    """For each group whether some completions are correct and some are not, P.

    Without failed verifiers that is 0 < number correct < G. A completion whose verifier failed is
    neither, because nothing is known of it.
    """
    num_correct_P = graded.correct_PG.sum(axis=1)
    num_valid_P = graded.valid_PG.sum(axis=1)
    return (num_correct_P > 0) & (num_correct_P < num_valid_P)


class MixedGroups:
    """Collects the mixed groups of round after round, until there are P.

    Where there are several teams of processes, a group stays with the team that sampled it, and
    every team collects its own part of the P. All processes hold the verdicts of all groups, so all
    of them decide the same without asking each other.
    """

    def __init__(self, num_groups: int, mini_batches: int, shard: ProcessShard, no_expert: int):
        """num_groups: P. no_expert: see `rollout.groups.join_rollouts`."""
        self._num_groups = num_groups
        self._shard = shard
        self._no_expert = no_expert
        self._places: list[list[int]] = []  # by team: which of the P places are its own
        for team in range(shard.teams):
            team_shard = ProcessShard(team=team, teams=shard.teams)
            self._places.append(team_shard.local_indices(num_groups, mini_batches))
        self._mixed: list[list[_Group]] = [[] for _ in range(shard.teams)]
        self._others: list[list[_Group]] = [[] for _ in range(shard.teams)]
        self._all_graded: list[GradedRollout] = []
        self._num_mixed = 0

    @property
    def rounds(self) -> int:
        """How many rounds were drawn."""
        return len(self._all_graded)

    @property
    def is_full(self) -> bool:
        """Whether every team has as many groups as it has places."""
        return self.num_missing == 0

    @property
    def num_missing(self) -> int:
        """Places without a mixed group, of all teams."""
        return self._num_groups - sum(len(groups) for groups in self._mixed)

    def add(self, local: LocalPrompts, rollout: Rollout, graded: GradedRollout) -> None:
        """Take what a round has given; `rollout` is of this team, `graded` of all groups."""
        is_mixed_P = is_mixed(graded)
        self._num_mixed += int(is_mixed_P.sum())
        for team, places in enumerate(self._places):
            for position, index in enumerate(places):
                kept = self._others[team]
                if is_mixed_P[index]:
                    kept = self._mixed[team]
                if len(kept) == len(places):
                    continue
                its_rollout = None
                if team == self._shard.team:
                    its_rollout = take_groups(rollout, [position], graded.group_size)
                kept.append(_Group(local.batch[index], graded, index, self.rounds, its_rollout))
        self._all_graded.append(graded)

    def batch(self) -> tuple[SampledGroups, GradedRollout]:
        """The P groups, and their verdicts.

        Places that are left over hold groups that are not trained on.

        Mixed groups come first, so that they fill whole mini-batches as far as they reach. A
        mini-batch without any has no signal, and its update is skipped.
        """
        groups: list[_Group | None] = [None] * self._num_groups
        is_trained_P = np.zeros(self._num_groups, bool)
        local_rollouts = []
        for team, places in enumerate(self._places):
            mixed = self._mixed[team]
            fillers = self._others[team][: len(places) - len(mixed)]
            for place, group in zip(places, [*mixed, *fillers], strict=True):
                groups[place] = group
            is_trained_P[places[: len(mixed)]] = True
            if team == self._shard.team:
                local_rollouts = [group.rollout for group in [*mixed, *fillers]]
        chosen = [group for group in groups if group is not None]
        graded = join_groups([(group.graded, group.index) for group in chosen])
        prompts = [group.prompt for group in chosen]
        batch = SampledGroups(
            local=LocalPrompts(prompts, self._places[self._shard.team], self._shard),
            rollout=join_rollouts(_present(local_rollouts), self._no_expert),
            round_P=np.array([group.round for group in chosen]),
            drawn=_all_groups(self._all_graded),
            metrics=self._metrics(),
        )
        return batch, dataclasses.replace(graded, is_trained_P=is_trained_P)

    def _metrics(self) -> dict[str, float]:
        """Counts of groups. The others but those mixed are all correct, all wrong, or failed."""
        drawn = _all_groups(self._all_graded)
        num_correct_P = drawn.correct_PG.sum(axis=1)
        is_whole_P = drawn.valid_PG.all(axis=1)
        is_mixed_P = is_mixed(drawn)
        is_all_correct_P = is_whole_P & (num_correct_P == drawn.group_size)
        is_all_wrong_P = is_whole_P & (num_correct_P == 0)
        counts = {
            "groups/rounds": self.rounds,
            "groups/drawn": len(drawn.prompts),
            "groups/mixed": is_mixed_P.sum(),
            "groups/all_correct": is_all_correct_P.sum(),
            "groups/all_wrong": is_all_wrong_P.sum(),
            "groups/failed": (~is_whole_P & ~is_mixed_P).sum(),
            "groups/surplus": self._num_mixed - (self._num_groups - self.num_missing),
            "groups/missing": self.num_missing,
        }
        return {name: float(count) for name, count in counts.items()}


@dataclasses.dataclass(frozen=True)
class _Group:
    """A group that may be trained on."""

    prompt: Prompt
    graded: GradedRollout  # of its round
    index: int  # in that round
    round: int
    rollout: Rollout | None  # its completions; None where another team has them


def _present(rollouts: Sequence[Rollout | None]) -> list[Rollout]:
    return [rollout for rollout in rollouts if rollout is not None]


def _all_groups(rounds: Sequence[GradedRollout]) -> GradedRollout:
    """All groups of all rounds, in the order in which they were drawn."""
    groups = []
    for graded in rounds:
        groups += [(graded, index) for index in range(len(graded.prompts))]
    return join_groups(groups)


def short_batch_error(step: int, rounds: int, missing: int, groups: int) -> RunError:
    """What to do where the rounds have not given enough groups."""
    return RunError(
        f"rl step {step}: {rounds} rounds of dynamic sampling have left {missing} of {groups} "
        "groups missing whose completions are neither all correct nor all wrong. Take problems of "
        "another difficulty, a larger rollout.group_size or more "
        "rollout.dynamic_sampling.max_rounds; or let it train on what there is, with "
        "rollout.dynamic_sampling.short_batch=train"
    )
