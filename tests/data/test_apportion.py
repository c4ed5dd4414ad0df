"""Whole shares by weight, for any weights: what defines the largest-remainder method."""

import hypothesis
import pytest
from hypothesis import strategies as st

from sapo_jax.config.task_rules import largest_remainder
from sapo_jax.data.common import apportion
from sapo_jax.errors import DataError

totals = st.integers(0, 10_000)
positive = st.one_of(st.integers(1, 50).map(float), st.floats(1e-3, 1e3))
named_weights = st.dictionaries(st.text("abcdef", min_size=1), positive, min_size=1, max_size=8)


@hypothesis.given(totals, named_weights)
def test_shares_are_whole_and_within_one_of_the_exact_ones(total, weights):
    shares = largest_remainder(total, weights)
    assert list(shares) == list(weights)
    assert sum(shares.values()) == total
    for name, weight in weights.items():
        exact = total * weight / sum(weights.values())
        assert isinstance(shares[name], int) and shares[name] >= 0
        assert abs(shares[name] - exact) < 1 + 1e-9


@hypothesis.given(totals, named_weights)
def test_a_larger_weight_never_gets_less(total, weights):
    shares = largest_remainder(total, weights)
    by_weight = sorted(weights, key=weights.get)
    for lighter, heavier in zip(by_weight, by_weight[1:]):
        if weights[lighter] < weights[heavier]:
            assert shares[lighter] <= shares[heavier]


@hypothesis.given(totals, named_weights, st.integers(-8, 8))
def test_only_the_ratios_of_weights_matter(total, weights, exponent):
    scaled = {name: weight * 2.0**exponent for name, weight in weights.items()}  # exact in floats
    assert largest_remainder(total, scaled) == largest_remainder(total, weights)


@hypothesis.given(totals, named_weights)
def test_a_task_without_weight_gets_nothing_and_takes_nothing(total, weights):
    shares = largest_remainder(total, weights)
    assert largest_remainder(total, {**weights, "idle": 0.0}) == {**shares, "idle": 0}


@hypothesis.given(totals, named_weights)
def test_apportion_refuses_exactly_what_leaves_a_task_without_a_share(total, weights):
    shares = largest_remainder(total, weights)
    starved = [name for name, share in shares.items() if share == 0]
    if starved:
        with pytest.raises(DataError, match=f"leaves none for {', '.join(starved)}: "):
            apportion(total, weights, "the batch size")
    else:
        assert apportion(total, weights, "the batch size") == shares
