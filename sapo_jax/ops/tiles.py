"""Columns of the sampler's KV cache: arithmetic for the decode loop, the dry run and the plan; and which rows are short
for attention. Imports no JAX."""

from __future__ import annotations

PAGE, LANES = (
    64,
    128,
)  # columns that decoding on TPU fetches at a time, for heads whose size is a multiple of LANES
SHORT = 32  # tokens of a row whose attention is not worth blocks: forward and backward then take half the time on CPU
