"""The real SmolLM2, and what `make smollm2` made of it: exported, loaded in transformers, the same
logits.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_jax.config import Mesh, Model, read_model_keys
from sapo_jax.data import load_template, load_tokenizer
from sapo_jax.distributed import sharding
from sapo_jax.hub.weights import load_params
from sapo_jax.models import make_policy
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.types import Prompt

ROOT = Path(__file__).parents[2]
FOLDERS = {"pretrained": ROOT / ".cache/smollm2/model", "after RL": ROOT / "runs/smollm2/exported"}
QUESTIONS = (
    "What is the capital of France?",
    "State the final answer to the following arithmetic problem: 12 + 7 =",
)


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request) -> Path:
    if not FOLDERS[request.param].exists():
        pytest.skip(f"{FOLDERS[request.param]} is not there; run: make smollm2")
    return FOLDERS[request.param]


@pytest.mark.slow
@torch.no_grad()
def test_logits_tokens_and_greedy_answers_are_those_of_transformers(folder):
    cfg = Model(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in read_model_keys(folder).items()}
    )
    policy = make_policy(cfg)
    tokenizer = load_tokenizer(str(folder))
    template = load_template("auto", tokenizer)
    params = load_params(folder, policy, sharding.make_mesh(Mesh(), jax.devices()[:1]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    theirs = AutoTokenizer.from_pretrained(folder)

    @jax.jit
    def logits(params, tokens):
        bound = policy.bind(params)
        positions = np.arange(tokens.shape[1])[None]
        return bound.logits(bound.forward(tokens, positions, np.ones_like(positions)).hidden_BTD)

    for i, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.encode_pieces(template.pieces(chat))
        assert ids == theirs.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        tokens = np.array([ids], np.int32)
        ours = logits(params, tokens)
        expected = exact(torch.tensor(tokens)).logits.numpy()
        float32 = model(torch.tensor(tokens)).logits.numpy()
        scale = np.abs(expected).max()
        error = np.abs(ours - expected).max()
        assert error < 1e-5 * scale  # logits go to 38: float32 itself is off by 1e-4
        assert error < 2 * np.abs(float32 - expected).max()  # transformers in float32 is no closer
        assert np.abs(ours - float32).max() < 1e-5 * scale
        sampler = Sampler(
            policy, SamplingParams(temperature=0.0), 1, 16, tokenizer.stop_ids, tokenizer.pad_id
        )
        rollout = sampler(
            params, [Prompt(i, "", tuple(ids), "", "", "exact", "")], jax.random.key(0)
        )
        expected = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[
            0, len(ids) :
        ].numpy()
        np.testing.assert_array_equal(rollout.tokens_BC[0, : rollout.length_B[0]], expected)
