"""Numbers of a configuration are inputs of the compiled update, see learner/numbers.py."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from sapo_jax.batch import TrainState
from sapo_jax.config import CISPO, GRPO, GSPO, SAPO, Config, Loss, Model, Optimizer
from sapo_jax.learner.numbers import numbers_of, with_numbers
from sapo_jax.learner.update import (
    init_state,
    make_optimizer,
    make_rl_update,
    make_schedule,
    make_update,
    policy_loss,
)
from tests.models import tiny
from tests.models.tiny import DENSE, MOE

STEPS = 20
OPTIMIZER = Optimizer(
    learning_rate=7e-3,
    schedule="linear",
    final_fraction=0.3,
    warmup_steps=3,
    weight_decay=0.1,
    max_grad_norm=0.7,
)


def config(model: Model = DENSE, **sections) -> Config:
    return Config(model=model, **{"optimizer": OPTIMIZER, **sections})


def drifted_batch(seed: int = 0):
    """Ratios away from 1, on both sides of the clips, and a reference for the KL penalty."""
    batch = tiny.batch(seed)
    rng = np.random.default_rng(seed)
    old_logp_BT = rng.normal(-3.5, 1.0, batch.mask_BT.shape).astype(np.float32)
    ref_logp_BT = old_logp_BT + rng.normal(0, 0.3, batch.mask_BT.shape).astype(np.float32)
    return dataclasses.replace(batch, old_logp_BT=old_logp_BT, ref_logp_BT=ref_logp_BT)


def fresh_state(cfg: Config) -> TrainState:
    make = functools.partial(init_state, optimizer=make_optimizer(cfg.optimizer, STEPS))
    return tiny.quick_jit(make)(jax.tree.map(np.array, tiny.params(cfg.model)))


def program_text(cfg: Config) -> str:
    """The program of the update, without its numbers."""
    update = make_rl_update(tiny.policy(cfg.model), cfg, STEPS, micro_batch=2)
    make = functools.partial(init_state, optimizer=make_optimizer(cfg.optimizer, STEPS))
    state = jax.eval_shape(make, tiny.policy(cfg.model).shapes)
    return update.func.lower(state, drifted_batch(), **update.keywords).as_text()


def test_the_numbers_of_a_configuration():
    cfg = config(objective=SAPO(tau_pos=1.5), loss=Loss(kl="k3", kl_coef=0.25))
    assert numbers_of(cfg) == {
        "objective.tau_pos": np.float32(1.5),
        "objective.tau_neg": np.float32(1.05),
        "loss.kl_coef": np.float32(0.25),
        "loss.correction_cap": np.float32(2.0),
        "optimizer.weight_decay": np.float32(0.1),
        "optimizer.max_grad_norm": np.float32(0.7),
    }
    other = with_numbers(cfg, {"objective.tau_neg": 3.0, "loss.kl_coef": 0.5})
    assert other.objective == SAPO(tau_pos=1.5, tau_neg=3.0)
    assert other.loss == Loss(kl="k3", kl_coef=0.5)
    assert other.optimizer == cfg.optimizer


def test_a_number_that_turns_its_part_off_is_no_input():
    cfg = config(optimizer=Optimizer(weight_decay=0.0))
    assert not {"loss.kl_coef", "optimizer.weight_decay"} & numbers_of(cfg).keys()


def test_arms_that_differ_in_numbers_alone_share_a_program():
    faster = dataclasses.replace(
        OPTIMIZER, learning_rate=1.0, final_fraction=0.9, weight_decay=0.5, max_grad_norm=3.0
    )
    arm = config(objective=SAPO(tau_pos=0.5, tau_neg=13.0))
    other_arm = config(objective=SAPO(tau_pos=2.0, tau_neg=1.0), optimizer=faster)
    assert program_text(arm) == program_text(other_arm)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_schedules_are_those_of_optax_to_the_last_bit(kind):
    cfg = dataclasses.replace(OPTIMIZER, schedule=kind, final_fraction=0.37)
    peak = cfg.learning_rate
    optax_schedule = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * 0.37, 47),
        "cosine": optax.cosine_decay_schedule(peak, 47, 0.37),
    }[kind]
    ours = jax.jit(make_schedule(cfg, 50))
    warmup = jax.jit(lambda count: peak * (count + 1) / 3)
    after_warmup = jax.jit(lambda count: optax_schedule(count - 3))
    expected = [float(warmup(step)) for step in range(3)]
    expected += [float(after_warmup(step)) for step in range(3, 60)]
    assert [float(ours(step)) for step in range(60)] == expected


SLOW = pytest.mark.slow
EXACT = {
    "sapo": config(objective=SAPO(tau_pos=1.3, tau_neg=1.7)),
    "cosine": config(optimizer=dataclasses.replace(OPTIMIZER, schedule="cosine")),
    "grpo": config(objective=GRPO(), optimizer=Optimizer()),
    "gspo": config(objective=GSPO()),
    "cispo_kl": config(objective=CISPO(), loss=Loss(kl="k2", kl_coef=0.3)),
    "moe": config(dataclasses.replace(MOE, router_aux_loss_coef=0.03)),
}


@pytest.mark.parametrize(
    "name", [name if name == "sapo" else pytest.param(name, marks=SLOW) for name in EXACT]
)
def test_the_update_is_that_of_constants_to_the_last_bit(name):
    """Steps through warm-up and decay, and beyond; parameters, moments and all statistics."""
    cfg = EXACT[name]
    policy = tiny.policy(cfg.model)
    optimizer = make_optimizer(cfg.optimizer, STEPS)
    updates = (
        make_update(policy, optimizer, policy_loss(cfg), 2),
        make_rl_update(policy, cfg, STEPS, 2),
    )
    results = []
    for update in updates:
        state = fresh_state(cfg)
        auxes = []
        for step in range(STEPS + 2):
            state, aux = update(state, drifted_batch(seed=step % 3))
            auxes.append(jax.device_get(aux))
        results.append((jax.device_get(state), auxes))
    expected, inputs = results
    assert jax.tree.structure(expected) == jax.tree.structure(inputs)
    jax.tree.map(np.testing.assert_array_equal, expected, inputs)
