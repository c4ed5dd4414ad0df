"""Widths of the sampler's KV cache: arithmetic for the decode loop, the dry run and the plan. Imports no JAX."""

from __future__ import annotations

PARTS = 4  # in so many steps at most the cache is widened to all new tokens ...


LEAST = 64  # ... each of no fewer columns


def growth(C: int) -> int:
    """Columns by which the cache is widened, for completions of C tokens; its spare ones, where requests wait."""
    return -(-C // max(1, min(PARTS, C // LEAST)))


def widths(S: int, C: int, waits: bool, page: int = 1) -> list[int]:
    """Columns, ever more: for S prompt tokens, the last of which is passed by the loop, and C new ones.

    waits: more completions than slots. Then there is room beyond, so that columns are not shifted out at every step.
    page: a row starts at a multiple of it (kernels.page), up to page - 1 columns early; widths are multiples too. Where
    pages are fetched one by one (page > 1), empty ones cost nothing, and there is one width.
    """
    step = growth(C)
    last = S + C - 1 + (step + page - 1 if waits else 0)
    if page > 1:
        return [-(-(last + page - 1) // page) * page]
    return [*range(S - 1 + step, last, step), last]
