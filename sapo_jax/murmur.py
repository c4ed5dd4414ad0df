"""The finaliser of MurmurHash3 (Austin Appleby, public domain): it mixes all bits of a uint32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SPREAD = 0x9E3779B1  # an odd number near 2^32 / golden ratio: times it, neighbours are far apart


def mix(word: jax.Array) -> jax.Array:
    """Mix the bits of every uint32 word. Each line is a bijection, so the whole is one."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
