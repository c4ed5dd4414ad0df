"""Widths of the sampler's KV cache: arithmetic for the decode loop, the dry run and the plan.

The cache starts with few columns and is widened as it fills, so that attention reads few empty
columns. Each width is a program of its own, so there are only a few of them. This module imports
no JAX: the dry run needs these numbers and starts without it.
"""

from __future__ import annotations

import math

MAX_WIDENINGS = 4  # the cache grows to hold all new tokens in at most so many steps ...
MIN_COLUMNS_PER_WIDENING = 64  # ... each of which adds no fewer columns than this


def columns_per_widening(C: int) -> int:
    """Columns by which the cache is widened at a time, for completions of at most C tokens.

    Where requests wait for slots, the widest cache also has this many spare columns.
    """
    widenings = max(1, min(MAX_WIDENINGS, C // MIN_COLUMNS_PER_WIDENING))
    return math.ceil(C / widenings)


def cache_widths(S: int, C: int, requests_wait: bool, page: int = 1) -> list[int]:
    """Numbers of columns that the cache has in turn, ascending.

    S: tokens of a prompt, padded. The decode loop passes a prompt's last token itself, so the
        prompt brings S - 1 columns into the cache.
    C: most tokens of a completion.
    requests_wait: whether there are more completions than slots. Then the last width has spare
        columns, so that columns which no slot needs any more are not shifted out at every step.
    page: a row starts at a multiple of this many columns (`ops.attention.cache_page_size`), up to
        page - 1 columns early, and widths are multiples of it, too. Where attention fetches the
        cache page by page (page > 1), empty pages cost nothing, so one width is enough.
    """
    step = columns_per_widening(C)
    last = S + C - 1
    if requests_wait:
        last += step + page - 1
    if page > 1:
        num_pages = math.ceil((last + page - 1) / page)
        return [num_pages * page]
    return [*range(S - 1 + step, last, step), last]
