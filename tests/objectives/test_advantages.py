from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.config import Advantage
from sapo_jax.objectives.advantages import advantages

KINDS = ("group", "mean_only", "leave_one_out")
REWARD_PG = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 1.0]], np.float32)
VALID_PG = np.ones((2, 4), bool)


# On jax arrays in one program, instead of many single operations.
jitted_advantages = jax.jit(advantages, static_argnums=2)


def std(group, ddof):
    return np.std(np.array(group, np.float64), ddof=ddof)


@pytest.mark.parametrize("xp", [np, jnp])
def test_by_hand(xp):
    """Means 0.5 and 1; population std 0.5 and sqrt(1.5), sample std sqrt(1/3) and sqrt(2)."""
    centered_PG = np.array([[0.5, -0.5, -0.5, 0.5], [-1, -1, 2, 0]])
    std_P1 = {0: np.array([[0.5], [1.5**0.5]]), 1: np.array([[3**-0.5], [2**0.5]])}
    expected = {
        Advantage("mean_only"): centered_PG,
        Advantage("leave_one_out"): [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-4 / 3, -4 / 3, 8 / 3, 0]],
        Advantage("group", ddof=0, eps=0.0): centered_PG / std_P1[0],
        Advantage("group", ddof=1, eps=0.0): centered_PG / std_P1[1],
        Advantage("group", ddof=1, eps=0.5): centered_PG / (std_P1[1] + 0.5),
    }
    for cfg, adv_PG in expected.items():
        function = advantages if xp is np else jitted_advantages
        result_PG = function(xp.asarray(REWARD_PG), xp.asarray(VALID_PG), cfg)
        np.testing.assert_allclose(result_PG, adv_PG, rtol=1e-6)
        assert (
            isinstance(result_PG, np.ndarray if xp is np else jax.Array)
            and result_PG.dtype == np.float32
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [5.0, np.nan, np.inf, -np.inf])
def test_invalid_samples_are_left_out(kind, junk):
    """The valid samples get what they would get in a group of their own; the invalid one gets 0."""
    reward_PG = REWARD_PG.copy()
    valid_PG = VALID_PG.copy()
    reward_PG[:, 1] = junk
    valid_PG[:, 1] = False
    cfg = Advantage(kind, ddof=1)
    kept = [0, 2, 3]
    adv_PG = advantages(reward_PG, valid_PG, cfg)
    np.testing.assert_allclose(
        adv_PG[:, kept], advantages(REWARD_PG[:, kept], VALID_PG[:, kept], cfg), rtol=1e-6
    )
    np.testing.assert_array_equal(adv_PG[:, 1], 0)


@pytest.mark.parametrize(
    "cfg", [*map(Advantage, KINDS), Advantage(ddof=1), Advantage(ddof=1, eps=0.0)], ids=str
)
@pytest.mark.parametrize("xp", [np, jnp])
def test_groups_without_preference_get_exact_zeros(cfg, xp):
    """Equal rewards (the mean of seven 0.1 is not quite 0.1), one valid sample, none; and no
    warning.
    """
    reward_PG = np.full((4, 7), 0.1, np.float32)
    reward_PG[1] = 0.7
    reward_PG[2, 3] = 0.9
    valid_PG = np.ones((4, 7), bool)
    valid_PG[2] = np.arange(7) == 3
    valid_PG[3] = False
    assert np.any(
        reward_PG[:2] != reward_PG[:2].mean(axis=1, keepdims=True)
    )  # the noise that must not come through
    with np.errstate(all="raise"):
        function = advantages if xp is np else jitted_advantages
        adv_PG = function(xp.asarray(reward_PG), xp.asarray(valid_PG), cfg)
        np.testing.assert_array_equal(adv_PG, 0)


def test_an_invalid_reward_that_differs_does_not_make_a_preference():
    reward_PG = np.array([[0.1, 0.1, 0.1, 0.9]], np.float32)
    np.testing.assert_array_equal(advantages(reward_PG, reward_PG < 0.5, Advantage()), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_properties_on_random_rewards(kind):
    """Zero mean, unit std in `group`; shifts change nothing, permutations permute, leave_one_out is
    what it says.
    """
    rng = np.random.default_rng(0)
    reward_PG = rng.standard_normal((16, 8))
    valid_PG = np.ones(reward_PG.shape, bool)
    cfg = Advantage(kind, ddof=1, eps=0.0)
    adv_PG = advantages(reward_PG, valid_PG, cfg)
    assert adv_PG.dtype == np.float64
    np.testing.assert_allclose(adv_PG.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(
        advantages(reward_PG + 5, valid_PG, cfg), adv_PG, rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(
        advantages(reward_PG[:, ::-1], valid_PG, cfg), adv_PG[:, ::-1], rtol=1e-10
    )
    scaled_PG = advantages(10 * reward_PG, valid_PG, cfg)
    np.testing.assert_allclose(scaled_PG, adv_PG * (1 if kind == "group" else 10), rtol=1e-10)
    if kind == "group":
        np.testing.assert_allclose(std(adv_PG[0], ddof=1), 1, rtol=1e-10)
    if kind == "leave_one_out":
        others = [reward_PG[0, g] - np.delete(reward_PG[0], g).mean() for g in range(8)]
        np.testing.assert_allclose(adv_PG[0], others, rtol=1e-10)


def test_jit_gives_the_same():
    for kind in KINDS:
        jitted = jitted_advantages(REWARD_PG, VALID_PG, Advantage(kind))
        np.testing.assert_allclose(
            jitted, advantages(REWARD_PG, VALID_PG, Advantage(kind)), rtol=1e-6
        )


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(AssertionError):
        advantages(REWARD_PG, VALID_PG[:, :2], Advantage())
    with pytest.raises(AssertionError):
        advantages(REWARD_PG[0], VALID_PG[0], Advantage())
    with pytest.raises(AssertionError):
        advantages(REWARD_PG, VALID_PG.astype(np.float32), Advantage())
