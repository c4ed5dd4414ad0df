"""Parts of rollouts: some of the groups of one, and several behind each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo_jax.batch import Array, Rollout


def take_sequences(rollout: Rollout, sequence_N: Sequence[int] | np.ndarray) -> Rollout:
    """The sequences at these indices, in this order; host arrays of their own."""

    def take(array: Array) -> np.ndarray:
        return np.asarray(array)[sequence_N]

    expert_ids_BTLk = None
    if rollout.expert_ids_BTLk is not None:
        expert_ids_BTLk = take(rollout.expert_ids_BTLk)
    return Rollout(
        tokens_BC=take(rollout.tokens_BC),
        logp_BC=take(rollout.logp_BC),
        length_B=take(rollout.length_B),
        finish_B=take(rollout.finish_B),
        expert_ids_BTLk=expert_ids_BTLk,
    )


def take_groups(rollout: Rollout, group_N: Sequence[int], group_size: int) -> Rollout:
    """The groups at these indices, in this order; host arrays of their own."""
    first_N1 = np.array(group_N, np.int64)[:, None] * group_size
    return take_sequences(rollout, (first_N1 + np.arange(group_size)).reshape(-1))


def join_rollouts(rollouts: Sequence[Rollout], no_expert: int) -> Rollout:
    """The sequences of several rollouts behind each other, as host arrays.

    no_expert: the id that stands for "not recorded". The prompts of each rollout are left-padded to
        their own number of slots S, and so are the recorded experts; here they get the largest S.
    """
    if len(rollouts) == 1:
        return rollouts[0]

    def join(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(rollout, name)) for rollout in rollouts])

    expert_ids_BTLk = None
    if rollouts[0].expert_ids_BTLk is not None:
        expert_ids_BTLk = _join_expert_ids(
            [np.asarray(rollout.expert_ids_BTLk) for rollout in rollouts], no_expert
        )
    return Rollout(
        tokens_BC=join("tokens_BC"),
        logp_BC=join("logp_BC"),
        length_B=join("length_B"),
        finish_B=join("finish_B"),
        expert_ids_BTLk=expert_ids_BTLk,
    )


def _join_expert_ids(parts: Sequence[np.ndarray], no_expert: int) -> np.ndarray:
    """BTLk of all parts, whose T = S + C may differ by S."""
    most_slots = max(part.shape[1] for part in parts)
    padded = []
    for part in parts:
        missing_slots = most_slots - part.shape[1]
        padding = [(0, 0), (missing_slots, 0), (0, 0), (0, 0)]
        padded.append(np.pad(part, padding, constant_values=no_expert))
    return np.concatenate(padded)
