"""Against Hugging Face on whole sequences, in float32: left and right padding, packed rows, greedy
generation."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch

from sapo_jax.models import make_policy
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.types import Prompt
from tests.models.test_hf_parity import CASES, hugging_face
from tests.models.tiny import quick_jit
from tests.references import hf

each_case = pytest.mark.parametrize("name", CASES)
LENGTHS = (13, 16, 9)
PAD = 3  # an ordinary token, so that a pad that leaks in changes something


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, CASES["qwen3"].vocab_size, n) for n in LENGTHS]


@functools.cache
@torch.no_grad()
def separate_logits(name: str) -> list[np.ndarray]:
    """Hugging Face's logits [T, V] of each sequence by itself."""
    return [hugging_face(name)(torch.tensor(ids)[None]).logits[0].numpy() for ids in sequences()]


@functools.cache
def forward(name: str):
    policy = make_policy(CASES[name])
    params = hf.params(hugging_face(name).state_dict(), CASES[name])

    def logits(params, *arrays):
        model = policy.bind(params)
        return model.logits(model.forward(*arrays).hidden_BTD)

    return functools.partial(quick_jit(logits), params)


Place = tuple[int, slice]  # row and columns of a sequence


def arrange_sequences(side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Place]]:
    """tokens, positions, segments; and where each sequence is."""
    shape = (1, 48) if side == "packed" else (3, 20)
    tokens = np.full(shape, PAD, np.int32)
    positions = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    places = {
        "left": [(b, slice(20 - n, 20)) for b, n in enumerate(LENGTHS)],
        "right": [(b, slice(0, n)) for b, n in enumerate(LENGTHS)],
        "packed": [(0, slice(0, 13)), (0, slice(15, 31)), (0, slice(31, 40))],
    }[side]
    for i, ((row, columns), ids) in enumerate(zip(places, sequences(), strict=True)):
        tokens[row, columns] = ids
        positions[row, columns] = np.arange(len(ids))
        segments[row, columns] = i + 1 if side == "packed" else 1
    return tokens, positions, segments, places


@each_case
@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_padding_and_packing(name, side):
    *arrays, places = arrange_sequences(side)
    logits_BTV = np.asarray(forward(name)(*arrays))
    for place, expected in zip(places, separate_logits(name), strict=True):
        np.testing.assert_allclose(logits_BTV[place], expected, atol=1e-5)


@each_case
@torch.no_grad()
def test_their_left_padded_batch(name):
    """The same batch through Hugging Face, its mask and positions given."""
    tokens, positions, segments, places = arrange_sequences("left")
    theirs = hugging_face(name)(
        torch.tensor(tokens),
        attention_mask=torch.tensor(segments),
        position_ids=torch.tensor(positions),
    ).logits.numpy()
    ours = np.asarray(forward(name)(tokens, positions, segments))
    for place in places:
        np.testing.assert_allclose(ours[place], theirs[place], atol=1e-5)


QUICK = ("llama-mqa", "moe-sparse-step")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
@torch.no_grad()
def test_greedy_generation(name):
    """64 tokens, token for token: prompts of three lengths, left-padded in one batch."""
    policy = make_policy(CASES[name])
    params = hf.params(hugging_face(name).state_dict(), CASES[name])
    prompts = [
        Prompt(i, "", tuple(ids.tolist()), "", "", "exact", "") for i, ids in enumerate(sequences())
    ]
    sampler = Sampler(policy, SamplingParams(temperature=0.0), 1, 64, stop_ids=(), pad_id=PAD)
    rollout = sampler(params, prompts, jax.random.key(0))
    for ids, tokens_C in zip(sequences(), rollout.tokens_BC, strict=True):
        theirs = hugging_face(name).generate(
            torch.tensor(ids)[None], max_new_tokens=64, do_sample=False, eos_token_id=None
        )
        np.testing.assert_array_equal(tokens_C, theirs[0, len(ids) :])
    assert len(np.unique(rollout.tokens_BC)) > 5
