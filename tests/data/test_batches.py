import collections
import itertools
import json
import math
import threading

import pytest

from sapo_jax.data import PromptBatches
from sapo_jax.data.common import apportion
from sapo_jax.errors import DataError

LENGTHS = {"easy": 41, "hard": 100, "rare": 7}
WEIGHTS = {
    "easy": 2.0,
    "hard": 5.0,
    "rare": 1.0,
}  # of 16: 4, 10, 2; a pass takes 10, 10 and 3 batches


@pytest.fixture
def train(make_prompts):
    starts = itertools.accumulate(LENGTHS.values(), initial=0)
    return {
        name: make_prompts(name, count, first)
        for (name, count), first in zip(LENGTHS.items(), starts)
    }


def take(batches, count):
    return [[p.index for p in next(batches)] for _ in range(count)]


def test_every_batch_has_the_same_shares(train):
    batches = PromptBatches(train, WEIGHTS, 16, seed=0)
    for batch in itertools.islice(batches, 40):
        assert collections.Counter(p.task for p in batch) == {"easy": 4, "hard": 10, "rare": 2}
        assert len({p.index for p in batch}) == 16


def test_each_pass_is_a_new_shuffle_without_repetition(train):
    batches = PromptBatches({"hard": train["hard"]}, {"hard": 1.0}, 10, seed=0)
    passes = [list(itertools.chain(*take(batches, 10))) for _ in range(3)]
    assert all(sorted(order) == sorted(p.index for p in train["hard"]) for order in passes)
    assert len(set(map(tuple, passes))) == 3


def test_what_a_pass_leaves_over_differs(train):
    batches = PromptBatches({"easy": train["easy"]}, {"easy": 1.0}, 4, seed=0)
    left = [
        {p.index for p in train["easy"]} - set(itertools.chain(*take(batches, 10)))
        for _ in range(12)
    ]
    assert all(len(rest) == 1 for rest in left)
    assert len(set.union(*left)) > 4


def test_tasks_are_mixed_inside_a_batch(train):
    batches = PromptBatches(train, WEIGHTS, 16, seed=0)
    firsts = collections.Counter(next(batches)[0].task for _ in range(60))
    assert (
        firsts["hard"] < 55 and firsts["easy"] > 0
    )  # not sorted by task; 60 * 10/16 = 37.5 expected


@pytest.mark.parametrize("point", [0, 1, 3, 9, 10, 11, 25])  # passes end after 3 and 10 batches
def test_exact_resume(train, point):
    batches = PromptBatches(train, WEIGHTS, 16, seed=3)
    take(batches, point)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 25)
    again = PromptBatches(dict(reversed(train.items())), WEIGHTS, 16, seed=3)
    take(again, 5)
    again.set_state(state)
    assert take(again, 25) == expected
    batches.set_state(state)  # going back works on the same object too
    assert take(batches, 25) == expected


def test_reading_the_state_changes_nothing(train):
    plain, watched = (PromptBatches(train, WEIGHTS, 16, seed=3) for _ in range(2))
    seen = [(watched.get_state(), *take(watched, 1))[1] for _ in range(12)]
    assert seen == take(plain, 12)


def test_seeds(train):
    runs = {seed: take(PromptBatches(train, WEIGHTS, 16, seed), 5) for seed in (0, 1, 2)}
    assert take(PromptBatches(train, WEIGHTS, 16, 0), 5) == runs[0]
    assert len({str(run) for run in runs.values()}) == 3
    # Nor is one seed the other one's next pass.
    long = {seed: take(PromptBatches(train, WEIGHTS, 16, seed), 22) for seed in (0, 1)}
    orders = {
        seed: [[i for i in batch if 41 <= i < 141] for batch in run] for seed, run in long.items()
    }
    assert [sorted(b) for b in orders[0][10:20]] != [sorted(b) for b in orders[1][:10]]


def test_a_task_keeps_its_order_when_others_change(train):
    alone = PromptBatches({"hard": train["hard"]}, {"hard": 1.0}, 10, seed=0)
    mixed = PromptBatches(train, WEIGHTS, 16, seed=0)
    for a, b in itertools.islice(zip(alone, mixed), 20):
        assert {p.index for p in a} == {p.index for p in b if p.task == "hard"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 32}, "batch_size was 16, is 32"),
        ({"seed": 4}, "seed was 3, is 4"),
        ({"weights": {**WEIGHTS, "rare": 2.0}}, r"tasks\.hard\.per_batch was 10, is 9"),
        ({"weights": {**WEIGHTS, "rare": 0.0}}, r"tasks\.rare was .*, is None"),
        ({"shorter": "easy"}, "task easy, .*: 41 problems then, 40 now; 1 removed"),
        ({"reordered": "easy"}, "41 problems then, 41 now; the same problems in another order"),
    ],
)
def test_a_state_of_other_data_is_refused(train, change, message):
    state = PromptBatches(train, WEIGHTS, 16, seed=3).get_state()
    if task := change.pop("shorter", None):
        train[task] = train[task][:-1]
    if task := change.pop("reordered", None):
        train[task] = train[task][::-1]
    other = PromptBatches(train, **{"weights": WEIGHTS, "batch_size": 16, "seed": 3, **change})
    with pytest.raises(DataError, match=message):
        other.set_state(state)
    assert other.get_state()["batches"] == 0


@pytest.mark.parametrize("batches", [-1, 1.5, "3", None, True])
def test_malformed_states(train, batches):
    it = PromptBatches(train, WEIGHTS, 16, seed=3)
    with pytest.raises(DataError, match="must be a number of batches"):
        it.set_state({**it.get_state(), "batches": batches})
    with pytest.raises(DataError, match="batch_size was None, is 16"):
        it.set_state({})


def test_mistakes(train):
    with pytest.raises(DataError, match="the batch size = 4 leaves none for rare"):
        PromptBatches(train, {**WEIGHTS, "rare": 0.01}, 4, 0)
    with pytest.raises(
        DataError, match="task rare has 7 training problems but every batch takes 8"
    ):
        PromptBatches(train, WEIGHTS, 64, 0)
    with pytest.raises(DataError, match="do not name the same tasks"):
        PromptBatches(train, {"easy": 1.0}, 4, 0)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="weights must be finite"):
            PromptBatches(train, {**WEIGHTS, "rare": weight}, 16, 0)


def test_no_threads_and_far_positions_are_cheap(train):
    before = threading.active_count()
    batches = PromptBatches(train, WEIGHTS, 16, seed=0)
    batches.set_state({**batches.get_state(), "batches": 10**7})
    assert len(next(batches)) == 16
    assert batches.get_state()["batches"] == 10**7 + 1
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "total, weights, shares",
    [
        (32, (1.0, 2.0), (11, 21)),
        (10, (0.1, 0.2, 0.7), (1, 2, 7)),
        (7, (1.0, 1.0, 1.0), (3, 2, 2)),  # ties go to the first
        (3, (1.0, 0.0, 2.0), (1, 0, 2)),
        (8, (5.0,), (8,)),
        (100, (1e-3, 1e-3), (50, 50)),
    ],
)
def test_apportion(total, weights, shares):
    assert tuple(apportion(total, dict(zip("abc", weights)), "x").values()) == shares
