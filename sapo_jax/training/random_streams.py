"""Where a run's random numbers come from: streams that depend on `train.seed` alone.

A key is a function of (seed, stream, step), and the order of the data a function of (seed, stream).
So a resumed run repeats nothing and skips nothing, and no state of a generator is ever saved.
"""

from __future__ import annotations

import enum

import jax

# Streams that may have an order of data. It is part of every saved run, as the values of Stream
# are: it must not change.
DATA_STREAMS = 4


class Stream(enum.IntEnum):
    """What the numbers are for. The values are part of every saved run: they must not change."""

    COLD_START = 0
    ROLLOUT = 1
    EVALUATE = 2
    INIT = 3
    REFILL = 4  # the further rounds of dynamic sampling
    OLD_LOGP_NOISE = 5


def random_key(seed: int, stream: Stream, step: int = 0) -> jax.Array:
    """The key of a stream at a step."""
    stream_key = jax.random.fold_in(jax.random.key(seed), int(stream))
    return jax.random.fold_in(stream_key, step)


def data_seed(seed: int, stream: Stream) -> int:
    """The seed of the order in which the stream goes through its problems."""
    return DATA_STREAMS * seed + int(stream)
