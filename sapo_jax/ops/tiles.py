"""Sizes of the tiles of attention that the plan and the dry run compute with, too.

This module imports no JAX, because the dry run must start without it.
"""

from __future__ import annotations

# Decoding on TPU fetches so many columns (tokens) of the KV cache at a time. It does so for heads
# whose size is a multiple of LANES, the width of a TPU's vector registers.
PAGE = 64
LANES = 128

# Rows of at most so many tokens are not worth cutting into blocks for attention: with all scores at
# once, forward and backward take half the time on CPU.
SHORT = 32
