"""The update: optimiser, losses, one golden step, micro-batches, non-finite batches, donation, compilation."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from sapo_jax import diagnostics
from sapo_jax.batch import Batch, TrainState
from sapo_jax.config import (
    DPPO,
    GRPO,
    SAPO,
    Config,
    Loss,
    Mesh,
    Optimizer,
    Rollout,
    SequenceMask,
    load,
)
from sapo_jax.distributed import sharding
from sapo_jax.learner import update as learner
from sapo_jax.learner.routing_replay import router_metrics
from sapo_jax.learner.scoring import Scores, make_scorer
from sapo_jax.learner.update import (
    init_state,
    last_learning_rate,
    make_optimizer,
    make_schedule,
    make_update,
    policy_loss,
    sft_loss,
)
from sapo_jax.objectives.correction import CORRECTIONS
from sapo_jax.objectives.weights import token_weights
from sapo_jax.training.update_records import UpdateRecords
from tests.models import tiny

TEMPERATURE = 0.9
# Closer to a real start than tiny.MODELS: gradients are near 1, so that 1e-6 is near float32's rounding.
DENSE, MOE = (dataclasses.replace(model, initializer_range=0.06) for model in tiny.MODELS.values())
CFG = Config(
    model=DENSE, objective=SAPO(tau_pos=0.8, tau_neg=1.7), rollout=Rollout(temperature=TEMPERATURE),
    optimizer=Optimizer(learning_rate=0.01, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5),
)  # fmt: skip
SGD = optax.apply_if_finite(optax.sgd(1.0), 9)  # parameters before - after are the gradients


def changed(cfg, **changes):
    return dataclasses.replace(cfg, **changes)


@functools.cache
def scorer(model):
    return make_scorer(tiny.policy(model), TEMPERATURE, 4)


@functools.cache
def drifted_batch(seed: int = 0, model=DENSE) -> Batch:
    """A batch whose old log-probs differ from the model's by N(0, 0.5^2), so that the ratios have drifted from 1."""
    batch = tiny.batch(seed)
    logp_BT = scorer(model)(tiny.params(model), batch).logp_BT
    noise_BT = np.random.default_rng(seed + 1).normal(0, 0.5, logp_BT.shape).astype(np.float32)
    return changed(batch, old_logp_BT=np.asarray(logp_BT) + noise_BT)


@functools.cache
def state_maker(tx):
    """params -> the state at step 0 on copies of them, in one program."""
    return tiny.quick_jit(lambda params: init_state(jax.tree.map(jnp.copy, params), tx))


def fresh_state(tx, model=DENSE) -> TrainState:
    """On copies: the update donates its state."""
    return state_maker(tx)(tiny.params(model))


# The statistics that an update returns: those of its micro-batches together, and their names.
reduced = tiny.quick_jit(diagnostics.reduce_token_stats)


def finalized(stats):
    return diagnostics.finalize_token_stats(jax.device_get(stats))


def test_log_probs_that_a_loss_needs_must_be_in_the_batch():
    def trace(cfg: Config, batch: Batch):
        loss = policy_loss(cfg)
        jax.eval_shape(lambda params: loss(tiny.policy().bind(params), batch)[0], tiny.params())

    with pytest.raises(ValueError, match="needs old_logp_BT"):
        trace(CFG, tiny.batch())
    with_kl = changed(CFG, loss=Loss(kl="k3", kl_coef=0.1))
    with pytest.raises(ValueError, match="needs ref_logp_BT"):
        trace(with_kl, drifted_batch())
    with_mask = changed(CFG, loss=Loss(sequence_mask=SequenceMask(below=0.1)))
    with pytest.raises(ValueError, match="needs sampler_logp_BT"):
        trace(with_mask, drifted_batch())


# ---------------------------------------------------------------- optimiser


COSINE = 0.4 + 0.3 * (1 + np.cos(np.pi * np.arange(5) / 4))


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "total_steps", "expected"),
    [
        ("constant", 4, 8, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 4, 8, [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.4]),
        ("cosine", 4, 8, [0.25, 0.5, 0.75, 1, *COSINE, 0.4]),
        ("constant", 0, 2, [1, 1, 1]),
        ("linear", 0, 2, [1, 0.7, 0.4]),
    ],
)
def test_schedules_by_hand(schedule, warmup_steps, total_steps, expected):
    """Warm-up counts from 1 and reaches the peak; the decay ends at final_fraction and stays there."""
    cfg = Optimizer(
        learning_rate=2e-3, schedule=schedule, warmup_steps=warmup_steps, final_fraction=0.4
    )
    rate = tiny.quick_jit(make_schedule(cfg, total_steps))
    np.testing.assert_allclose(
        [rate(i) for i in range(len(expected))], 2e-3 * np.array(expected), rtol=1e-5
    )


def test_weight_decay_is_on_matrices_alone():
    """With no gradient at all, matrices shrink by learning rate * decay and norms stay."""
    tx = make_optimizer(changed(CFG.optimizer, weight_decay=0.2), 10)
    shapes = tiny.policy(changed(MOE, tie_word_embeddings=False)).shapes
    params = jax.tree.map(
        lambda s: np.random.default_rng(s.size).standard_normal(s.shape, np.float32), shapes
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tiny.quick_jit(lambda params: tx.update(zeros, tx.init(params), params))(params)
    scales = 0
    for (path, update), param in zip(
        jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        scales += (is_scale := path[-1].key == "scale")
        np.testing.assert_allclose(update, 0 if is_scale else -0.01 * 0.2 * param, rtol=1e-5)
    assert scales == 5


def test_three_steps_equal_those_of_torch():
    """AdamW after clipping by the norm over all parameters, with warm-up; the first gradient is below the clip."""
    cfg = changed(CFG.optimizer, warmup_steps=2)
    rng = np.random.default_rng(0)
    params = {
        "w": rng.standard_normal((3, 4), np.float32),
        "norm": {"scale": rng.standard_normal(4, np.float32)},
    }

    def random(scale):
        return jax.tree.map(lambda x: scale * rng.standard_normal(x.shape, np.float32), params)

    gradients = [random(scale) for scale in (0.05, 1, 9)]

    w, scale = (torch.tensor(x, requires_grad=True) for x in (params["w"], params["norm"]["scale"]))
    groups = [
        {"params": [w], "weight_decay": cfg.weight_decay},
        {"params": [scale], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(cfg.b1, cfg.b2), eps=cfg.eps)
    tx = make_optimizer(cfg, 10)
    state = tx.init(params)

    @tiny.quick_jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for rate, gradient in zip((0.005, 0.01, 0.01), gradients, strict=True):
        w.grad, scale.grad = torch.tensor(gradient["w"]), torch.tensor(gradient["norm"]["scale"])
        torch.nn.utils.clip_grad_norm_([w, scale], cfg.max_grad_norm)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        params, state = step(gradient, state, params)
    expected = {"w": w.detach().numpy(), "norm": {"scale": scale.detach().numpy()}}
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the loss as a function of the log-probs


@pytest.fixture
def loss_and_gradient(monkeypatch):
    """(cfg, batch, logp_BT) -> loss, statistics, d loss / d logp_BT: `score` is replaced by the log-probs given."""

    def given(logp_BT, batch, temperature):
        assert temperature == TEMPERATURE
        return Scores(logp_BT, jnp.ones_like(logp_BT), jnp.zeros(logp_BT.shape, bool), None)

    monkeypatch.setattr(learner, "score", given)

    def run(cfg, batch, logp_BT):
        evaluate = tiny.quick_jit(jax.value_and_grad(policy_loss(cfg), has_aux=True))
        (loss, (stats, _)), gradient_BT = evaluate(logp_BT, batch)
        return float(loss), jax.device_get(finalized(stats)), np.asarray(gradient_BT)

    return run


@functools.cache
def logp_example() -> tuple[Batch, np.ndarray, np.ndarray]:
    """A batch with old and reference log-probs, the policy's log-probs, and log r."""
    rng = np.random.default_rng(2)
    batch = tiny.batch()
    logp_BT, drift_BT, ref_BT = rng.normal(-1.5, 0.5, (3, *batch.tokens_BT.shape)).astype(
        np.float32
    )
    drift_BT = np.clip(drift_BT + 1.5, -1.2, 1.2)
    return changed(batch, old_logp_BT=logp_BT - drift_BT, ref_logp_BT=ref_BT), logp_BT, drift_BT


def sapo_gradient(batch: Batch, log_ratio_BT, cfg: SAPO) -> np.ndarray:
    """d loss / d log pi = -weight A r sech^2(tau / 2 (r - 1)), Eq. 16."""
    r_BT = np.exp(log_ratio_BT)
    tau_BT = np.where(batch.adv_BT > 0, cfg.tau_pos, cfg.tau_neg)
    return -batch.weight_BT * batch.adv_BT * r_BT / np.cosh(tau_BT / 2 * (r_BT - 1)) ** 2


def test_gradient_of_the_sapo_loss(loss_and_gradient):
    batch, logp_BT, log_ratio_BT = logp_example()
    loss, stats, gradient_BT = loss_and_gradient(CFG, batch, logp_BT)
    np.testing.assert_allclose(
        gradient_BT, sapo_gradient(batch, log_ratio_BT, CFG.objective), atol=1e-6
    )
    tau_BT = np.where(batch.adv_BT > 0, 0.8, 1.7)
    f_BT = 4 / tau_BT / (1 + np.exp(-tau_BT * (np.exp(log_ratio_BT) - 1)))
    assert loss == pytest.approx(-np.sum(batch.weight_BT * batch.adv_BT * f_BT), abs=1e-6)
    assert stats["ratio/mean"] == pytest.approx(
        np.exp(log_ratio_BT)[batch.mask_BT].mean(), rel=1e-5
    )
    assert stats["tokens/count"] == batch.mask_BT.sum() and not any(
        "reference" in name for name in stats
    )


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        ("k1", lambda x: x, np.ones_like),
        ("k2", lambda x: x**2 / 2, lambda x: x),
        ("k3", lambda x: np.exp(-x) - 1 + x, lambda x: 1 - np.exp(-x)),
    ],
)
def test_kl_adds_its_own_gradient(loss_and_gradient, kl, value, slope):
    """loss + coef * sum(weight * kl(log pi - log pi_ref)), and the same weights."""
    batch, logp_BT, _ = logp_example()
    x_BT = logp_BT - batch.ref_logp_BT
    plain_loss, _, plain_BT = loss_and_gradient(CFG, batch, logp_BT)
    loss, stats, gradient_BT = loss_and_gradient(
        changed(CFG, loss=Loss(kl=kl, kl_coef=0.3)), batch, logp_BT
    )
    np.testing.assert_allclose(
        gradient_BT - plain_BT, 0.3 * batch.weight_BT * slope(x_BT), atol=1e-6
    )
    assert loss - plain_loss == pytest.approx(0.3 * np.sum(batch.weight_BT * value(x_BT)), abs=1e-6)
    assert stats["kl/reference_mean"] == pytest.approx(value(x_BT)[batch.mask_BT].mean(), rel=1e-5)


def test_kl_without_a_coefficient_is_not_computed(loss_and_gradient):
    batch, logp_BT, _ = logp_example()
    cfg, batch = changed(CFG, loss=Loss(kl="k3", kl_coef=0.0)), changed(batch, ref_logp_BT=None)
    without = loss_and_gradient(cfg, batch, logp_BT)
    chex.assert_trees_all_equal(without, loss_and_gradient(CFG, batch, logp_BT))


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("objective", [SAPO(), GRPO()], ids=lambda o: o.name)
def test_correction_multiplies_the_surrogate_and_not_the_kl(loss_and_gradient, kind, objective):
    """Each token's gradient is multiplied by its weight: the capped one, or 0 where it is out of bounds."""
    batch, logp_BT, _ = logp_example()
    cfg = changed(CFG, objective=objective)
    mismatch_BT = np.random.default_rng(5).normal(0, 1, logp_BT.shape).astype(np.float32)
    w_BT = np.exp(mismatch_BT)
    expected_BT = (
        np.minimum(w_BT, 2)
        if kind == "truncated"
        else np.where((w_BT >= 0.5) & (w_BT <= 2), w_BT, 0)
    )
    weighted = changed(batch, correction_BT=CORRECTIONS[kind](mismatch_BT, batch.mask_BT, 2.0))

    _, _, plain_BT = loss_and_gradient(cfg, batch, logp_BT)
    _, _, gradient_BT = loss_and_gradient(cfg, weighted, logp_BT)
    np.testing.assert_allclose(gradient_BT, expected_BT * plain_BT, atol=1e-6)
    assert np.abs(gradient_BT - plain_BT).max() > 0.01

    with_kl = changed(cfg, loss=Loss(kl="k2", kl_coef=0.3))
    _, _, kl_BT = loss_and_gradient(with_kl, weighted, logp_BT)
    np.testing.assert_allclose(
        kl_BT - gradient_BT, 0.3 * batch.weight_BT * (logp_BT - batch.ref_logp_BT), atol=1e-6
    )


def test_a_sequence_mask_zeroes_the_surrogate_inside_the_means_and_not_the_kl(loss_and_gradient):
    """The mean of log(pi / pi_sampler) decides, of sequences with A < 0; the weights stay."""
    batch, logp_BT, _ = logp_example()
    below = 0.1
    rng = np.random.default_rng(6)
    offset_BT = np.repeat(rng.normal(0, 0.5, (len(logp_BT), 1)), logp_BT.shape[1], axis=1)
    batch = changed(batch, sampler_logp_BT=(logp_BT - offset_BT).astype(np.float32))

    left_out_BT = batch.mask_BT & (batch.adv_BT < 0) & (offset_BT < -below)
    negative_BT = batch.mask_BT & (batch.adv_BT < 0)
    loss = Loss(kl="k2", kl_coef=0.3)
    plain_loss, _, plain_BT = loss_and_gradient(changed(CFG, loss=loss), batch, logp_BT)
    with_mask = changed(CFG, loss=changed(loss, sequence_mask=SequenceMask(below=below)))
    masked_loss, stats, masked_BT = loss_and_gradient(with_mask, batch, logp_BT)

    kl_BT = 0.3 * batch.weight_BT * (logp_BT - batch.ref_logp_BT)
    np.testing.assert_allclose(masked_BT, np.where(left_out_BT, kl_BT, plain_BT), atol=1e-6)
    assert 0 < left_out_BT.sum() < negative_BT.sum()
    assert masked_loss != pytest.approx(plain_loss, abs=1e-3)

    def sequences(of_BT):
        return len(np.unique(sequence_numbers(batch)[of_BT]))

    surrogate_BT = np.abs(plain_BT - kl_BT)
    expected = {
        "sequence_mask/fraction": sequences(left_out_BT) / sequences(batch.mask_BT),
        "sequence_mask/neg_fraction": sequences(left_out_BT) / sequences(negative_BT),
        "sequence_mask/grad_share": surrogate_BT[left_out_BT].sum() / surrogate_BT.sum(),
        "clip_fraction/mean": left_out_BT.sum() / batch.mask_BT.sum(),
    }
    assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def sequence_numbers(batch: Batch) -> np.ndarray:
    """A number of its own for the sequence of each token, over all rows."""
    row_B1 = np.arange(len(batch.segment_ids_BT))[:, None]
    return row_B1 * 1000 + np.asarray(batch.segment_ids_BT)


def test_the_old_log_probs_reach_an_objective_that_needs_them(loss_and_gradient):
    """DPPO drops the tokens whose probability moved away by more than delta."""
    batch, logp_BT, log_ratio_BT = logp_example()
    _, _, gradient_BT = loss_and_gradient(changed(CFG, objective=DPPO(delta=0.1)), batch, logp_BT)
    distance_BT = np.abs(np.exp(batch.old_logp_BT) - np.exp(logp_BT))
    is_blocked_BT = (batch.adv_BT * log_ratio_BT > 0) & (distance_BT > 0.1)
    expected_BT = -batch.weight_BT * batch.adv_BT * np.exp(log_ratio_BT) * ~is_blocked_BT
    np.testing.assert_allclose(gradient_BT, expected_BT, atol=1e-6)
    assert 0 < is_blocked_BT[batch.mask_BT].sum() < batch.mask_BT.sum()


# ---------------------------------------------------------------- the config file reaches the loss

YAML = """
model: {hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8}
data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}
rollout: {temperature: 0.9, prompts_per_step: 2, group_size: 4}
train: {mini_batches: 2}
objective: {name: sapo, tau_pos: 0.8, tau_neg: TAU}
"""


def test_tau_of_the_config_file_reaches_the_loss(loss_and_gradient, tmp_path):
    """Two files that differ in tau_neg, one batch whose ratios have drifted: two gradients, both as predicted."""
    batch, logp_BT, log_ratio_BT = logp_example()
    found = []
    for tau_neg in (1.05, 6.0):
        (tmp_path / f"{tau_neg}.yaml").write_text(YAML.replace("TAU", str(tau_neg)))
        _, stats, gradient_BT = loss_and_gradient(
            load(tmp_path / f"{tau_neg}.yaml"), batch, logp_BT
        )
        expected_BT = sapo_gradient(batch, log_ratio_BT, SAPO(tau_pos=0.8, tau_neg=tau_neg))
        np.testing.assert_allclose(gradient_BT, expected_BT, atol=1e-6)
        found.append(gradient_BT)
    differ_BT = np.abs(found[0] - found[1]) > 1e-3
    assert np.any(differ_BT & (batch.adv_BT < 0)) and not np.any(differ_BT & (batch.adv_BT > 0))


# ---------------------------------------------------------------- the update


@functools.cache
def adam_update():
    """One program for the tests below: two micro-batches of two rows."""
    tx = make_optimizer(CFG.optimizer, 10)
    counted = chex.assert_max_traces(policy_loss(CFG), n=1)
    return tx, make_update(tiny.policy(DENSE), tx, counted, 2)


GOLDEN = {
    "loss": -0.985825717,
    "grad_norm": 5.01254749,
    "gate/mean": 0.982803226,
    "entropy/mean": 3.5252521,
    "embed": 0.0549787283,
    "q": -0.0790989622,
    "down": 0.0208911337,
    "norm": 0.876115084,
}


def test_golden_step():
    """Stored numbers of one AdamW step. A change here changes training: know why before you store new ones."""
    tx, update = adam_update()
    state, aux = jax.device_get(update(fresh_state(tx), drifted_batch()))
    stats = finalized(reduced(aux["stats"]))
    layers = state.params["layers"][0]
    found = {
        "loss": aux["loss"],
        "grad_norm": aux["grad_norm"],
        "gate/mean": stats["gate/mean"],
        "entropy/mean": stats["entropy/mean"],
        "embed": state.params["embed"][5, 3],
        "q": layers["attention"]["q"][1, 2, 3, 4],
        "down": layers["mlp"]["down"][0, 7, 11],
        "norm": state.params["norm"]["scale"][2],
    }
    assert {name: float(x) for name, x in found.items()} == pytest.approx(
        GOLDEN, rel=1e-5, abs=1e-6
    )
    assert state.step == 1


def test_a_non_finite_batch_is_skipped_and_counted():
    """Parameters and moments stay bit for bit; a good batch then resets the count in a row, not the total."""
    tx, update = adam_update()
    good = drifted_batch()
    bad = changed(good, weight_BT=np.where(np.arange(16) == 7, np.nan, good.weight_BT))
    state, aux = update(fresh_state(tx), good)
    before = jax.device_get(state)
    for i in (1, 2):
        state, aux = update(state, bad)
        assert not np.isfinite(aux["loss"]) and not np.isfinite(aux["grad_norm"])
        assert (aux["nonfinite_in_row"], aux["nonfinite_total"]) == (i, i)
        chex.assert_trees_all_equal(state.params, before.params)
        chex.assert_trees_all_equal(state.opt_state.inner_state, before.opt_state.inner_state)
    state, aux = update(state, good)
    assert (aux["nonfinite_in_row"], aux["nonfinite_total"], state.step) == (0, 2, 4)
    inner = jax.tree.leaves_with_path(state.opt_state.inner_state)
    counts = [x for path, x in inner if jax.tree_util.keystr(path).endswith(".count")]
    assert counts and all(count == 2 for count in counts)  # of updates that were applied
    assert (
        last_learning_rate(lambda count: count, state, aux) == 1
    )  # the newest of them was at count 1

    undisturbed, _ = update(jax.tree.map(jnp.array, before), good)
    chex.assert_trees_all_equal(state.params, undisturbed.params)
    assert np.any(np.asarray(state.params["embed"]) != before.params["embed"])


def test_the_state_is_donated_and_the_batch_is_not():
    tx, update = adam_update()
    state, batch = fresh_state(tx), jax.device_put(drifted_batch())
    update(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state.inner_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(batch))


def test_all_mini_batches_run_one_program():
    """The loss is traced once (see `adam_update`), for fresh states, states from an update, other batches."""
    tx, update = adam_update()
    state = fresh_state(tx)
    for seed in (0, 1, 2):
        state, aux = update(state, drifted_batch(seed))
    assert state.step == 3 and np.isfinite(aux["loss"])


def test_placed_states_run_one_program_and_micro_batches_change_nothing():
    """As the trainer does it: the state placed on a mesh, batches put on it; and one micro-batch, not two."""
    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        tx = make_optimizer(CFG.optimizer, 10)
        placed = learner.state_shardings(tiny.policy(DENSE), tx, mesh)
        state = jax.device_put(fresh_state(tx), placed)
        counted = chex.assert_max_traces(policy_loss(CFG), n=1)
        update = make_update(tiny.policy(DENSE), tx, counted, 4, placed)
        state, aux = update(state, sharding.put_batch(drifted_batch(), mesh))
        one_step = jax.device_get((state, aux))
        for seed in (1, 2):
            state, _ = update(state, sharding.put_batch(drifted_batch(seed), mesh))
    assert update._cache_size() == 1 and state.step == 3
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, state), placed)

    _, update_by_two = adam_update()
    assert_same_step(update_by_two(fresh_state(tx), drifted_batch()), one_step)


def assert_same_step(a, b):
    """Parameters, optimiser state, loss, gradient norm and statistics; float32's rounding apart."""
    (state_a, aux_a), (state_b, aux_b) = a, b
    state_a, state_b = jax.device_get((state_a, state_b))
    chex.assert_trees_all_close(
        (state_a.params, state_a.opt_state), (state_b.params, state_b.opt_state), atol=1e-6
    )
    for name in ("loss", "grad_norm"):
        assert aux_a[name] == pytest.approx(float(aux_b[name]), rel=1e-6)
    chex.assert_trees_all_close(
        *(jax.device_get(reduced(aux["stats"])) for aux in (aux_a, aux_b)),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", (DENSE, MOE), ids=tiny.MODELS)
def test_any_number_of_micro_batches(model):
    """One, two or four: the same gradients (SGD with learning rate 1). Without an aux loss: see the module."""
    batch = drifted_batch(model=model)

    def run(micro_batch):
        update = make_update(tiny.policy(model), SGD, policy_loss(CFG), micro_batch)
        return update(fresh_state(SGD, model), batch)

    whole = run(4)
    assert whole[1]["grad_norm"] > 0.1
    for micro_batch in (2, 1):
        state, aux = run(micro_batch)
        assert len(aux["stats"].count) == 4 // micro_batch
        assert_same_step((state, aux), whole)


def with_rows_of_padding(batch: Batch, rows: int) -> Batch:
    """No token, nothing to train on: segment 0, and column T for the completion tokens that are not there."""
    T = batch.tokens_BT.shape[1]

    def padded(x):
        return np.concatenate([x, np.zeros((rows, *x.shape[1:]), x.dtype)])

    padded_batch = jax.tree.map(lambda x: padded(np.asarray(x)), batch)
    padded_batch.picked_BM[-rows:] = T
    return padded_batch


def test_aux_loss_is_weighted_by_real_tokens():
    """loss = policy loss + coef * mean over layers of the mean over micro-batches, by their real tokens; its gradient
    moves the router. A micro-batch that is only padding changes neither the step nor what is logged of the router."""
    batch = changed(tiny.batch(), old_logp_BT=np.full((4, 16), -3.0, np.float32))
    model = changed(MOE, router_aux_loss_coef=0.25)
    # Next to no policy loss: what is left is the aux loss. (With none at all there is no update.)
    zeros = changed(batch, weight_BT=batch.weight_BT * np.float32(1e-20))
    update = make_update(tiny.policy(model), SGD, policy_loss(CFG), 2)
    state, aux = jax.device_get(update(fresh_state(SGD, model), zeros))
    routing = aux["routing"]
    np.testing.assert_array_equal(routing.tokens, [[19, 19], [26, 26]])
    np.testing.assert_array_equal(routing.routes_E.sum(axis=-1), 2 * routing.tokens)
    aux_nL = np.asarray(routing.aux_loss)
    assert (
        aux_nL.shape == (2, 2) and np.all(aux_nL > 0.9) and abs(aux_nL[0] - aux_nL[1]).min() > 1e-3
    )
    assert aux["loss"] == pytest.approx(
        0.25 * float((19 * aux_nL[0] + 26 * aux_nL[1]).mean() / 45), rel=1e-6
    )
    start = jax.device_get(tiny.params(model))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, start)
    assert moved["layers"][0]["mlp"]["router"] > 1e-3 and moved["norm"]["scale"] == 0

    padded_state, padded = jax.device_get(
        update(fresh_state(SGD, model), with_rows_of_padding(zeros, 2))
    )
    assert padded["routing"].tokens.tolist() == [[19, 19], [26, 26], [0, 0]]
    assert padded["loss"] == aux["loss"]
    chex.assert_trees_all_equal(padded_state.params, state.params)
    logged = [router_metrics([x["routing"]], model) for x in (aux, padded)]
    assert logged[0] == logged[1] and logged[0]["router/load_max"] > 1


# ---------------------------------------------------------------- supervised fine-tuning


def test_sft_loss_is_torch_cross_entropy():
    """Mean over the response tokens of the batch; the accuracy counts are those of the arg-max."""
    batch = tiny.batch()
    policy, params = tiny.policy(DENSE), tiny.params(DENSE)
    weight_BT = token_weights(batch.mask_BT, batch.segment_ids_BT, "token_mean", 1)

    @tiny.quick_jit
    def run(params):
        model = policy.bind(params)
        out = model.forward(
            batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, batch.prefix_ids_BT
        )
        return sft_loss(model, changed(batch, weight_BT=weight_BT)), model.logits(out.hidden_BTD)

    (loss, ((hits, tokens), _)), logits_BTV = run(params)
    targets_BT = torch.tensor(np.where(batch.mask_BT, batch.tokens_BT, -100)[:, 1:]).long()
    logits_NV = torch.tensor(np.asarray(logits_BTV))[:, :-1].reshape(-1, 37)
    expected = torch.nn.functional.cross_entropy(
        logits_NV, targets_BT.reshape(-1), ignore_index=-100
    )
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert tokens == batch.mask_BT.sum()
    assert hits == (logits_NV.argmax(-1) == targets_BT.reshape(-1)).sum().item()


# ---------------------------------------------------------------- batches without a signal


def without_signal(kind: str) -> Batch:
    """A batch from which there is nothing to learn: every sample has failed, or all A are 0."""
    batch = drifted_batch()
    if kind == "all_failed":
        nothing_BT = np.zeros_like(batch.mask_BT)
        return changed(batch, mask_BT=nothing_BT, weight_BT=np.zeros_like(batch.weight_BT))
    return changed(batch, adv_BT=np.zeros_like(batch.adv_BT))


@pytest.mark.parametrize("kind", ["all_failed", "all_equal"])
def test_a_batch_without_a_signal_changes_nothing(kind):
    """Momentum and weight decay would: parameters, moments, schedule and step stay bit for bit."""
    tx, update = adam_update()
    state, aux = update(fresh_state(tx), drifted_batch())
    assert not aux["skipped"]
    before = jax.device_get(state)
    state, aux = update(state, without_signal(kind))
    assert aux["skipped"]
    assert aux["grad_norm"] == 0
    chex.assert_trees_all_equal(jax.device_get(state), before)
    assert last_learning_rate(lambda count: count, state, aux) == 0  # that of the first update


def test_the_kl_penalty_and_imitation_are_signals():
    """With A = 0 the penalty still pulls; a supervised batch has no advantages at all."""
    batch = without_signal("all_equal")
    ref_logp_BT = np.asarray(batch.old_logp_BT) - 0.3
    assert not learner.has_signal(batch)
    assert learner.has_signal(changed(batch, ref_logp_BT=ref_logp_BT))
    assert learner.has_signal(changed(batch, old_logp_BT=None))
    failed = without_signal("all_failed")
    assert not learner.has_signal(changed(failed, ref_logp_BT=ref_logp_BT))
    assert not learner.has_signal(changed(failed, old_logp_BT=None))
    broken = changed(failed, weight_BT=np.full_like(failed.weight_BT, np.nan))
    assert learner.has_signal(broken)  # it is for the check of finite gradients to refuse it


# ---------------------------------------------------------------- many updates


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_what_64_updates_say_takes_no_more_device_memory_than_what_4_say():
    """Records are read as they come; and micro-batches are added up to the same statistics."""
    tx, update = adam_update()
    update_of_batch = {}
    most_bytes = {}
    for num_updates in (4, 64):
        state = fresh_state(tx)
        records = UpdateRecords()
        seen = []
        for _ in range(num_updates):
            state, aux = update(state, drifted_batch())
            records.add(aux)
            del aux
            seen.append(live_bytes())
        most_bytes[num_updates] = max(seen)
        update_of_batch[num_updates] = records.finish()
        assert len(update_of_batch[num_updates]) == num_updates
    assert most_bytes[64] == most_bytes[4]
    for few, many in zip(update_of_batch[4], update_of_batch[64][:4], strict=True):
        chex.assert_trees_all_equal(few, many)
    _, aux = update(fresh_state(tx), drifted_batch())
    assert len(aux["stats"].count) == 2
    added_up = update_of_batch[4][0]["stats"]
    assert len(added_up.count) == 1
    chex.assert_trees_all_close(reduced(added_up), jax.device_get(reduced(aux["stats"])))
