"""`import sapo_jax as sj`: what a notebook needs."""

from __future__ import annotations

import ast
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import sapo_jax as sj
from sapo_jax.config import SAPO, ConfigError
from sapo_jax.errors import RunError

PACKAGE = Path(sj.__file__).parent


def test_every_name_of_every_public_face_is_there():
    for stub in PACKAGE.rglob("__init__.pyi"):
        name = ".".join(stub.parent.relative_to(PACKAGE.parent).parts)
        module = __import__(name, fromlist=["_"])
        names = []
        for node in ast.parse(stub.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names += [alias.name for alias in node.names]
        assert names, stub
        for public in names:
            assert getattr(module, public) is not None
        assert set(names) <= set(dir(module)), stub


def test_an_objective_in_one_line():
    mask_BT = jnp.ones((1, 1), bool)
    log_ratio_BT = jnp.log(jnp.array([[2.06]]))
    surrogate_BT, diagnostics = sj.objectives.sapo(
        log_ratio_BT, jnp.ones((1, 1)), mask_BT, SAPO(tau_pos=1.0)
    )
    # f(r) = 4 sigmoid(r - 1) at r = 2.06, and r f'(r), which peaks there at 1.575 (DESIGN 6).
    np.testing.assert_allclose(surrogate_BT, 4 / (1 + np.exp(-1.06)), rtol=1e-6)
    np.testing.assert_allclose(diagnostics["grad_weight"], 1.575, atol=5e-4)


def test_a_model_directory_is_sampled_and_scored(tiny_model):
    policy = sj.open_policy(tiny_model, "rollout.max_new_tokens=5")
    completions = policy.sample(["1 + 1?", "a longer question"], n=3, seed=1)
    assert [len(group) for group in completions] == [3, 3]
    assert policy.sample(["1 + 1?", "a longer question"], n=3, seed=1) == completions
    greedy = policy.sample(["1 + 1?"], temperature=0.0)
    assert policy.sample(["1 + 1?"], temperature=0.0, seed=5) == greedy
    logp = policy.score("1 + 1?", "two")
    assert logp.shape == (3,) and (logp < 0).all()


def test_scores_are_the_sampler_s(tiny_model):
    """The log-probability of one token, summed over all tokens of the alphabet, is that of one."""
    policy = sj.open_policy(tiny_model)
    total = sum(np.exp(policy.score("x", chr(byte))[0]) for byte in range(128))
    assert 0 < total < 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model):
    """Its last tokens would have no embedding."""
    with pytest.raises(ConfigError, match="model.vocab_size.*100 is smaller than.*259") as error:
        sj.open_policy(tiny_model, "model.vocab_size=100")
    assert str(tiny_model) in str(error.value)


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(RunError, match="neither the folder of a run"):
        sj.open_policy(tmp_path)
