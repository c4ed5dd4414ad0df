"""How often the loops of decoding run (see rollout.decode); the compiled program does not say it.

All completions are taken to have their full length, C tokens. Decoding runs in phases, in each of
which the KV cache has another width. Where all completions have a slot, a phase is one loop of
steps. Where some wait for a slot, a phase is three loops, one inside the other:

    compact the cache whenever it is full
        take turns of admitting and stepping
            admit a waiting request, until no slot is free
            make a step, until a slot is free
"""

from __future__ import annotations

import dataclasses

from sapo_jax.plan.loops import OpenLoop
from sapo_jax.plan.workload import Workload
from sapo_jax.rollout.cache_width import cache_widths, columns_per_widening
from sapo_jax.rollout.packing import bucket


@dataclasses.dataclass(frozen=True)
class StepsPhase:
    """A phase of a rollout whose completions all have a slot from the start."""

    steps: float

    def loop(self) -> OpenLoop:
        """The one loop of the phase."""
        return OpenLoop("decode steps", self.steps)


@dataclasses.dataclass(frozen=True)
class RefillingPhase:
    """A phase of a rollout in which completions wait for slots."""

    compactions: float  # how often the cache is compacted
    turns_per_compaction: float
    admissions_per_turn: float
    steps_per_turn: float

    @property
    def admissions(self) -> float:
        """Requests that get a slot in this phase."""
        return self.compactions * self.turns_per_compaction * self.admissions_per_turn

    @property
    def steps(self) -> float:
        """Steps of this phase."""
        return self.compactions * self.turns_per_compaction * self.steps_per_turn

    def loop(self) -> OpenLoop:
        """The outermost loop of the phase, with those inside it."""
        admissions = OpenLoop("admit a waiting request", self.admissions_per_turn)
        steps = OpenLoop("decode steps", self.steps_per_turn)
        turns = OpenLoop("admit, then step", self.turns_per_compaction, (admissions, steps))
        return OpenLoop("compact, then fill", self.compactions, (turns,))


@dataclasses.dataclass(frozen=True)
class DecodeTrips:
    """How often each loop of a rollout's decoding runs."""

    first_admissions: int  # requests that get a slot before the first step
    phases: tuple[StepsPhase | RefillingPhase, ...]

    def open_loops(self) -> tuple[OpenLoop, ...]:
        """The loops in the order in which the program runs them."""
        first = OpenLoop("admit the first requests", self.first_admissions)
        return (first, *(phase.loop() for phase in self.phases))


def decode_trips(work: Workload, page: int) -> DecodeTrips:
    """How often the loops of decoding run, for completions of C tokens.

    Turns and compactions are counted as often as there can be. How the steps are shared among the
    phases is an estimate (with pages there is one phase). `page` is that of
    `ops.attention.cache_page_size`.
    """
    N = work.sequences
    R = work.slots
    C = work.new_tokens
    S = bucket(work.prompt_tokens)
    some_wait = N > R
    widths = cache_widths(S, C, some_wait, page)

    # A phase begins with the columns that the phase before has filled, the first one with those of
    # the prompts. Each step fills one column. The last phase has all steps that are left.
    columns_at_begin = [S + page - 2, *widths[:-1]]
    steps_of_phases: list[float] = [
        width - begin for width, begin in zip(widths[:-1], columns_at_begin, strict=False)
    ]
    steps_of_phases.append(work.decode_steps(C) - sum(steps_of_phases))
    if not some_wait:
        return DecodeTrips(R, tuple(StepsPhase(steps) for steps in steps_of_phases))

    # Once the cache is as wide as it gets, it is compacted whenever it is full.
    columns_left = widths[-1] - columns_at_begin[-1]
    steps_when_full = max(0, steps_of_phases[-1] - columns_left)
    compactions_of_last_phase = 1 + steps_when_full / columns_per_widening(C)

    total_steps = sum(steps_of_phases)
    waiting = N - R
    most_turns = min(waiting, total_steps)  # there can be as many times a free slot
    compactions_of_phases: list[float] = [1] * (len(steps_of_phases) - 1)
    compactions_of_phases.append(compactions_of_last_phase)
    phases = []
    for steps, compactions in zip(steps_of_phases, compactions_of_phases, strict=True):
        share = steps / total_steps / compactions  # of the rollout, between two compactions
        turns = 1 + most_turns * share
        phases.append(
            RefillingPhase(
                compactions=compactions,
                turns_per_compaction=turns,
                admissions_per_turn=waiting * share / turns,
                steps_per_turn=total_steps * share / turns,
            )
        )
    return DecodeTrips(R, tuple(phases))
