"""Widths of the sampler's cache, for any lengths."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.rollout.cache_width import (
    MAX_WIDENINGS,
    MIN_COLUMNS_PER_WIDENING,
    cache_widths,
    columns_per_widening,
)

reproducible = settings(deadline=None, derandomize=True)
prompt_tokens = st.integers(1, 3000)
new_tokens = st.integers(1, 3000)


@reproducible
@given(C=new_tokens)
def test_a_few_widenings_hold_all_new_tokens(C):
    columns = columns_per_widening(C)
    assert columns * MAX_WIDENINGS >= C
    assert columns >= min(C, MIN_COLUMNS_PER_WIDENING)


@reproducible
@given(S=prompt_tokens, C=new_tokens, requests_wait=st.booleans())
def test_widths_ascend_to_what_is_needed(S, C, requests_wait):
    """A prompt brings S - 1 columns; its last token and all new ones but the last need C more."""
    widths = cache_widths(S, C, requests_wait)
    needed = S - 1 + C
    spare = columns_per_widening(C) if requests_wait else 0
    assert widths[-1] == needed + spare
    assert widths == sorted(set(widths))
    assert widths[0] >= S
    assert len(widths) <= MAX_WIDENINGS + requests_wait
    steps = [wide - narrow for narrow, wide in zip(widths, widths[1:], strict=False)]
    assert all(step <= columns_per_widening(C) for step in steps)


@reproducible
@given(
    S=prompt_tokens, C=new_tokens, requests_wait=st.booleans(), page=st.sampled_from([8, 64, 256])
)
def test_pages_have_one_width_that_holds_a_row_wherever_its_page_starts(S, C, requests_wait, page):
    (width,) = cache_widths(S, C, requests_wait, page)
    assert width % page == 0
    least = cache_widths(S, C, requests_wait)[-1] + page - 1
    assert least <= width < least + 2 * page
