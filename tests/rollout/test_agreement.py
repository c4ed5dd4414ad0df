"""Sampler and scorer are one model: the same tokens get the same log-probabilities, whatever surrounds them."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from sapo_jax.batch import Batch, Rollout
from sapo_jax.learner.scoring import make_scorer, score
from sapo_jax.rollout import Packing, Sampler, SamplingParams, pack_rollout
from sapo_jax.rollout.batching import left_padded
from sapo_jax.rollout.decode import first_slots
from sapo_jax.rollout.sampler import prefill
from sapo_jax.types import Prompt
from tests.models import tiny

TEMPERATURE, C, G = 0.8, 12, 2
KEY = jax.random.key(11)  # completions of many lengths
PROMPTS = [tiny.prompt(11, 3), tiny.prompt(5, 9), tiny.prompt(8, 16)]
each_model = pytest.mark.parametrize("kind", tiny.MODELS)


@functools.cache
def sampler(kind: str) -> Sampler:
    return Sampler(
        tiny.policy(tiny.MODELS[kind]),
        SamplingParams(TEMPERATURE),
        G,
        C,
        stop_ids=(1, 2),
        pad_id=tiny.PAD,
    )


def sample(kind: str, prompts: list[Prompt], **kwargs) -> Rollout:
    return sampler(kind)(tiny.params(tiny.MODELS[kind]), prompts, KEY, **kwargs)


@functools.cache
def sampled(kind: str) -> Rollout:
    rollout = sample(kind, PROMPTS)
    assert set(rollout.finish_B) == {0, 1} and len(set(rollout.length_B)) > 2  # a varied example
    return rollout


def as_batch(rows) -> Batch:
    zeros = np.zeros(rows["tokens_BT"].shape, np.float32)
    return Batch(**rows, adv_BT=zeros, weight_BT=zeros)


@functools.cache
def scorer(kind: str):
    return make_scorer(tiny.policy(tiny.MODELS[kind]), TEMPERATURE, 1)


def separate_rows(rollout: Rollout):
    """The rollout with one sequence per row, and value BC -> BT on those rows."""
    rows = tiny.separate_rows(PROMPTS, rollout)

    def place(value_BC: np.ndarray) -> np.ndarray:
        value_BT = np.zeros(rows["mask_BT"].shape, np.float32)
        value_BT[rows["mask_BT"]] = value_BC[
            np.arange(value_BC.shape[1])[None] < rollout.length_B[:, None]
        ]
        return value_BT

    return rows, place


@functools.cache
def scored(kind: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """The rollout, one sequence per row, with the sampler's log-probs and the scorer's, BT."""
    rows, place = separate_rows(sampled(kind))
    sampler_logp_BT = place(sampled(kind).logp_BC)
    logp_BT = scorer(kind)(tiny.params(tiny.MODELS[kind]), as_batch(rows)).logp_BT
    return rows, sampler_logp_BT, np.asarray(logp_BT)


def assert_same(a: Rollout, b: Rollout):
    for field in ("tokens_BC", "length_B", "finish_B"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    np.testing.assert_allclose(a.logp_BC, b.logp_BC, atol=1e-5)


def of_prompt(rollout: Rollout, p: int) -> Rollout:
    return jax.tree.map(lambda x: x[p * G : (p + 1) * G], rollout)


# ---------------------------------------------------------------- scorer == prefill == decode


@each_model
def test_scorer_equals_sampler(kind):
    rows, sampler_logp_BT, logp_BT = scored(kind)
    mask_BT = rows["mask_BT"]
    assert mask_BT.sum() == sampled(kind).length_B.sum() > 30
    assert sampler_logp_BT[mask_BT].std() > 0.5
    np.testing.assert_allclose(logp_BT[mask_BT], sampler_logp_BT[mask_BT], atol=1e-5)


@each_model
def test_prefill_equals_decode(kind):
    """The token after prompt + 4 completion tokens: with all of them as a prompt, and as it was decoded."""
    rollout, made = sampled(kind), dataclasses.replace(sampler(kind), group_size=1)
    rows = [b for b in range(len(rollout.length_B)) if rollout.length_B[b] > 4]
    ids = [(*PROMPTS[b // G].ids, *rollout.tokens_BC[b, :4].tolist()) for b in rows]
    prefixes = [dataclasses.replace(PROMPTS[0], ids=x) for x in ids]

    @tiny.quick_jit
    def next_logits(params, tokens_PS, length_P):
        model = made.policy.bind(params)
        ones_P = jnp.ones(len(tokens_PS), jnp.uint32)
        requests, _ = prefill(made, model, tokens_PS, length_P, ones_P, ones_P, KEY)
        slots = first_slots(requests, len(tokens_PS), C, tiny.PAD)
        decoder = model.decoder(positions=tokens_PS.shape[1])
        return decoder.logits(
            model.decode(decoder, slots.token_R, length_P - 1, slots.cache, slots.live_R)[0]
        )

    logits_PV = next_logits(tiny.params(made.policy.cfg), *left_padded(prefixes, tiny.PAD))
    logp_PV = scipy.special.log_softmax(np.asarray(logits_PV) / np.float32(TEMPERATURE), axis=-1)
    assert len(rows) > 3
    logp_P = logp_PV[np.arange(len(rows)), rollout.tokens_BC[rows, 4]]
    np.testing.assert_allclose(logp_P, rollout.logp_BC[rows, 4], atol=1e-5)


# ---------------------------------------------------------------- padding, order, composition, packing


@each_model
def test_left_padding_and_the_other_prompts_change_nothing(kind):
    """In another order; next to a longer prompt, so in a longer bucket; alone."""
    together = sampled(kind)
    backwards = sample(kind, PROMPTS[::-1])
    longer = sample(kind, [PROMPTS[1], tiny.prompt(3, 20), PROMPTS[0]])
    for p in range(3):
        assert_same(of_prompt(backwards, 2 - p), of_prompt(together, p))
    assert_same(of_prompt(longer, 0), of_prompt(together, 1))
    assert_same(of_prompt(longer, 2), of_prompt(together, 0))
    for p in (0, 2) if kind == "dense" else ():  # a third program
        assert_same(sample(kind, [PROMPTS[p]]), of_prompt(together, p))


def test_filling_up_a_batch_changes_nothing_and_is_cut_off():
    """batch_prompts: two prompts in the program of three."""
    two = sample("dense", PROMPTS[:2], batch_prompts=3)
    assert two.tokens_BC.shape == (2 * G, C)
    assert_same(two, jax.tree.map(lambda x: x[: 2 * G], sampled("dense")))


SIZES = {"max_prompt": 16, "max_new": C}
TOKENS = Packing(1, 0, skips=False, **SIZES)  # a row costs as much as it has tokens
PAIRS = Packing(0, 1, skips=False, **SIZES)  # or the square of that
PACKINGS = {  # what is cheapest
    "whole groups": TOKENS,
    "one completion each": PAIRS,
    "several pieces in long rows": dataclasses.replace(PAIRS, row_tokens=96),
    "long rows of whole groups": dataclasses.replace(TOKENS, row_tokens=96),
    "by what is seen": Packing(1, 1, skips=True, **SIZES),
}


@each_model
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_rows(kind, packing):
    """Completions that share a row, and their prompt: the log-probs of a row of their own, in every way of packing."""
    rollout = sampled(kind)
    rows = pack_rollout(PROMPTS, rollout, tiny.PAD, 1, PACKINGS[packing])
    assert rows.mask_BT.sum() == rollout.length_B.sum()
    assert rows.arrays["segment_ids_BT"].max() > 2 or packing == "one completion each"
    logp_BT = scorer(kind)(tiny.params(tiny.MODELS[kind]), as_batch(rows.arrays)).logp_BT
    np.testing.assert_allclose(logp_BT, rows.place(rollout.logp_BC), atol=1e-5)


def test_packings_differ():
    """Or else the test above says little."""
    shapes = {
        pack_rollout(PROMPTS, sampled("dense"), tiny.PAD, 1, way).mask_BT.shape
        for way in PACKINGS.values()
    }
    assert len(shapes) == 3


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_packing_changes_no_gradient(kind):
    """Of a weighted sum of log-probs, with respect to every parameter: a shared prompt gets the sum of its shares."""
    rollout, policy = sampled(kind), tiny.policy(tiny.MODELS[kind])
    coefficient_BC = (
        np.random.default_rng(1).standard_normal(rollout.logp_BC.shape).astype(np.float32)
    )

    def gradient(arrays, weight_BT):
        batch = as_batch(arrays)

        def loss(params):
            logp_BT = score(policy.bind(params), batch, TEMPERATURE).logp_BT
            return jnp.sum(weight_BT * logp_BT)

        return jax.device_get(tiny.quick_jit(jax.grad(loss))(tiny.params(policy.cfg)))

    packed = pack_rollout(PROMPTS, rollout, tiny.PAD, 1, TOKENS)
    arrays, place = separate_rows(rollout)
    separate = gradient(arrays, place(coefficient_BC))
    together = gradient(packed.arrays, packed.place(coefficient_BC))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(together), jax.tree.leaves(separate), strict=True
    ):
        assert np.abs(a - b).max() / np.abs(b).max() < 1e-5, jax.tree_util.keystr(path)


@each_model
def test_right_padding(kind):
    """Longer rows, filled with another pad id."""
    rows, _, logp_BT = scored(kind)
    T = rows["tokens_BT"].shape[1]
    longer = {
        name: np.pad(x, [(0, 0), (0, 13)]) if name.endswith("BT") else x for name, x in rows.items()
    }
    longer["tokens_BT"] = np.where(longer["segment_ids_BT"] > 0, longer["tokens_BT"], 17)
    longer["picked_BM"] = np.where(rows["picked_BM"] == T, T + 13, rows["picked_BM"])
    longer_BT = scorer(kind)(tiny.params(tiny.MODELS[kind]), as_batch(longer)).logp_BT
    real_BT = rows["segment_ids_BT"] > 0
    np.testing.assert_allclose(np.asarray(longer_BT)[:, :T][real_BT], logp_BT[real_BT], atol=1e-5)


# ---------------------------------------------------------------- remat, compute dtype


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(kind):
    batch = tiny.batch(lengths=(40, 7, 36, 10))  # more than SHORT: attention in blocks
    params = tiny.params(tiny.MODELS[kind])

    def gradient(remat: str):
        policy = tiny.policy(dataclasses.replace(tiny.MODELS[kind], remat=remat))

        def loss(params):
            logp_BT = score(policy.bind(params), batch, 1.0).logp_BT
            return jnp.sum(batch.weight_BT * batch.adv_BT * logp_BT)

        return jax.device_get(tiny.quick_jit(jax.value_and_grad(loss))(params))

    plain = gradient("none")
    assert min(np.abs(g).max() for g in jax.tree.leaves(plain[1])) > 1e-3
    for remat in ("dots", "attention", "full"):
        chex.assert_trees_all_close(gradient(remat), plain, atol=1e-5, rtol=1e-5)


def test_remat_keeps_less_for_the_backward_pass():
    """`full` keeps less than `attention`, that less than `dots`, `dots` less than `none`; rows longer than SHORT."""
    batch = jax.tree.map(lambda x: np.tile(x, (1, 4)), tiny.batch())

    def residuals(remat: str) -> int:
        policy = tiny.policy(dataclasses.replace(tiny.DENSE, remat=remat))

        def logp(params):
            return score(policy.bind(params), batch, 1.0).logp_BT

        kept = jax.eval_shape(lambda params: jax.vjp(logp, params)[1], tiny.params())
        return sum(x.size for x in jax.tree.leaves(kept))

    assert residuals("full") < residuals("attention") < residuals("dots") < residuals("none")


def test_tokens_are_sorted_by_expert_once_where_dots_are_kept():
    """The integers that backward has: with `dots` also which token goes where."""
    batch = tiny.batch()

    def integers(remat: str) -> int:
        policy = tiny.policy(dataclasses.replace(tiny.MOE, remat=remat))

        def logp(params):
            return score(policy.bind(params), batch, 1.0).logp_BT

        kept = jax.eval_shape(lambda params: jax.vjp(logp, params)[1], tiny.params(tiny.MOE))
        return sum(x.size for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.integer))

    copies = tiny.MOE.num_hidden_layers * batch.tokens_BT.size * tiny.MOE.num_experts_per_tok
    assert integers("dots") >= integers("attention") + 2 * copies


def test_bfloat16_compute_is_close_and_its_log_probs_are_float32():
    """bfloat16 has 8 bits: after two layers the log-probs are within 2^-4 of 1 nat or of their own size, if that
    is more, and within 0.03 on average. The sampler's cache is bfloat16 too; it agrees with the bfloat16 scorer in half of
    that."""
    cfg = dataclasses.replace(tiny.DENSE, compute_dtype="bfloat16")
    rows, _, logp_BT = scored("dense")
    bf16_scorer = make_scorer(tiny.policy(cfg), TEMPERATURE, 1)
    bf16_scores = bf16_scorer(tiny.params(), as_batch(rows))
    bf16_BT = bf16_scores.logp_BT
    assert bf16_BT.dtype == bf16_scores.entropy_BT.dtype == jnp.float32
    real_BT = rows["mask_BT"]
    gap_N = np.abs(np.asarray(bf16_BT) - logp_BT)[real_BT]
    size_N = np.maximum(1, np.abs(logp_BT[real_BT]))
    assert 1e-4 < gap_N.mean() < 0.03 and (gap_N / size_N).max() < 2**-4, (
        gap_N.mean(),
        (gap_N / size_N).max(),
    )

    made = dataclasses.replace(sampler("dense"), policy=tiny.policy(cfg))
    rollout = made(tiny.params(), PROMPTS, KEY)
    rows, place = separate_rows(rollout)
    sampler_logp_BT = place(rollout.logp_BC)
    bf16_BT = bf16_scorer(tiny.params(), as_batch(rows)).logp_BT
    gap_N = np.abs(np.asarray(bf16_BT) - sampler_logp_BT)[rows["mask_BT"]]
    assert rollout.logp_BC.dtype == np.float32
    size_N = np.maximum(1, np.abs(sampler_logp_BT[rows["mask_BT"]]))
    assert gap_N.mean() < 0.015 and (gap_N / size_N).max() < 2**-5, (
        gap_N.mean(),
        (gap_N / size_N).max(),
    )
