"""The sampler: greedy decode, stopping, what a draw depends on, its distribution, how often it compiles."""

from __future__ import annotations

import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sapo_jax.batch import Rollout
from sapo_jax.models import Qwen3
from sapo_jax.ops import attention as attention_ops
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.rollout import sampler as sampler_module
from sapo_jax.rollout.cache_width import columns_per_widening
from sapo_jax.rollout.decode import phases
from sapo_jax.types import FINISH_REASONS, Prompt
from tests.models import tiny
from tests.rollout.test_agreement import sampled
from tests.rollout.test_sampling import slow_truncate

STOP, LENGTH = FINISH_REASONS.index("stop"), FINISH_REASONS.index("length")
KEY = jax.random.key(11)
PROMPTS = [tiny.prompt(11, 3), tiny.prompt(5, 9), tiny.prompt(8, 16)]
SAMPLED = SamplingParams()
each_model = pytest.mark.parametrize("kind", tiny.MODELS)


def make(
    kind: str = "dense",
    sampling: SamplingParams = SAMPLED,
    group_size=2,
    max_new_tokens=8,
    stop_ids=(),
    **kwargs,
) -> Sampler:
    return Sampler(
        tiny.policy(tiny.MODELS[kind]),
        sampling,
        group_size,
        max_new_tokens,
        stop_ids,
        tiny.PAD,
        **kwargs,
    )


def sample(sampler: Sampler, prompts: list[Prompt] = PROMPTS, key=KEY, **kwargs) -> Rollout:
    return sampler(tiny.params(sampler.policy.cfg), prompts, key, **kwargs)


@functools.cache
def full_forward(kind: str):
    """(tokens T, n) -> logits V of the token after the first n: one whole row, no cache."""
    policy = tiny.policy(tiny.MODELS[kind])

    @tiny.quick_jit
    def logits(tokens_T, n):
        model, t = policy.bind(tiny.params(policy.cfg)), jnp.arange(len(tokens_T))
        out = model.forward(
            tokens_T[None], jnp.where(t < n, t, 0)[None], (t < n).astype(jnp.int32)[None]
        )
        return model.logits(out.hidden_BTD[0, n - 1])

    def run(ids) -> np.ndarray:
        return np.asarray(logits(np.pad(np.array(ids, np.int32), (0, 48 - len(ids))), len(ids)))

    return run


# ---------------------------------------------------------------- greedy decode, stop tokens

N_GREEDY = 28


@functools.cache
def argmax_loop(kind: str) -> list[list[int]]:
    completions = []
    for prompt in PROMPTS:
        ids = list(prompt.ids)
        for _ in range(N_GREEDY):
            ids.append(int(full_forward(kind)(ids).argmax()))
        completions.append(ids[len(prompt.ids) :])
    return completions


@each_model
def test_greedy_decode_is_the_argmax_loop(kind):
    rollout = sample(make(kind, SamplingParams(temperature=0.0), max_new_tokens=N_GREEDY))
    expected = argmax_loop(kind)
    assert min(len(set(ids)) for ids in expected) > 3  # not one token over and over
    assert len({token for ids in expected for token in ids}) > 12
    assert rollout.tokens_BC.tolist() == [ids for ids in expected for _ in range(2)]
    assert set(rollout.finish_B) == {LENGTH} and set(rollout.length_B) == {N_GREEDY}
    np.testing.assert_array_equal(rollout.logp_BC, 0)
    assert rollout.expert_ids_BTLk is None


@each_model
def test_greedy_decode_with_stop_tokens(kind):
    """Cut after the first stop token, which is part of the completion; pad ids and log-prob 0 follow."""
    expected = argmax_loop(kind)
    stop_ids = (expected[0][6], expected[1][12])
    lengths = [
        next((i + 1 for i, token in enumerate(ids) if token in stop_ids), N_GREEDY)
        for ids in expected
    ]
    assert len(set(lengths)) > 1 and min(lengths) < 8
    sampling = SamplingParams(temperature=0.0)
    rollout = sample(make(kind, sampling, group_size=1, max_new_tokens=N_GREEDY, stop_ids=stop_ids))
    assert rollout.length_B.tolist() == lengths
    for tokens_C, finish, ids, n in zip(
        rollout.tokens_BC, rollout.finish_B, expected, lengths, strict=True
    ):
        assert tokens_C.tolist() == ids[:n] + [tiny.PAD] * (N_GREEDY - n)
        assert finish == (STOP if ids[n - 1] in stop_ids else LENGTH)


@functools.cache
def stopped() -> Rollout:
    return sample(
        make(sampling=SamplingParams(0.8), group_size=4, max_new_tokens=10, stop_ids=(1, 2, 3))
    )


def test_sampled_completions_end_at_stop_tokens():
    """Length, finish reason, pads and log-probs all tell the same story."""
    rollout = stopped()
    assert set(rollout.finish_B) == {STOP, LENGTH} and len(set(rollout.length_B)) > 3
    for tokens_C, logp_C, length, finish in zip(*jax.tree.leaves(rollout), strict=True):
        stops = np.flatnonzero(np.isin(tokens_C, (1, 2, 3)))
        assert (finish == STOP) == bool(len(stops))
        assert length == (stops[0] + 1 if len(stops) else 10)
        assert np.all(tokens_C[length:] == tiny.PAD) and np.all(logp_C[length:] == 0)
        assert np.all(logp_C[:length] < 0)
    assert [x.dtype.name for x in jax.tree.leaves(rollout)] == [
        "int32",
        "float32",
        "int32",
        "int32",
    ]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(rollout))


def test_a_pad_id_that_is_a_stop_token_ends_a_completion_once():
    """As in tokenizers whose pad and end token are one."""
    sampler = make(
        sampling=SamplingParams(0.8), group_size=4, max_new_tokens=10, stop_ids=(1, 2, 3)
    )
    rollout = sample(dataclasses.replace(sampler, pad_id=3))
    expected = stopped()
    np.testing.assert_array_equal(rollout.length_B, expected.length_B)
    np.testing.assert_array_equal(rollout.finish_B, expected.finish_B)
    real_BC = np.arange(10) < expected.length_B[:, None]
    np.testing.assert_array_equal(rollout.tokens_BC, np.where(real_BC, expected.tokens_BC, 3))


# ---------------------------------------------------------------- how much is computed, how often it compiles


def test_prompts_are_passed_once_and_the_loop_ends_with_the_last_completion(monkeypatch):
    """forward sees P rows, not P * G; decode runs once for each token of the longest completion."""
    forwards, decodes = [], []
    forward, decode = Qwen3.forward, Qwen3.decode

    def counted_forward(self, tokens_BT, *args, **kwargs):
        forwards.append(tokens_BT.shape)
        return forward(self, tokens_BT, *args, **kwargs)

    def counted_decode(self, decoder, tokens_B, *args):
        jax.debug.callback(lambda: decodes.append(tokens_B.shape), ordered=True)
        return decode(self, decoder, tokens_B, *args)

    monkeypatch.setattr(Qwen3, "forward", counted_forward)
    monkeypatch.setattr(Qwen3, "decode", counted_decode)
    stop_ids = tuple(range(1, 13))  # a third of the vocabulary: all rows stop soon
    rollout = sample(make(group_size=3, max_new_tokens=100, stop_ids=stop_ids))
    jax.effects_barrier()
    assert forwards == [(3, 16)]
    longest = rollout.length_B.max()
    assert set(rollout.finish_B) == {STOP} and 3 < longest < 60
    assert len(decodes) == longest and decodes[0] == (9,)
    live = [
        (rollout.length_B > n).sum() for n in range(longest)
    ]  # the last ones go on in fewer slots
    assert decodes == [(next(R for R in (2, 4, 9) if R >= n),) for n in live]


def test_batches_of_a_bucket_compile_once(monkeypatch):
    """Prompts of 1 to 16 tokens, any key, a batch that is filled up: one program. 17 tokens: another."""
    prefill = chex.assert_max_traces(sampler_module.prefill, n=1)
    monkeypatch.setattr(sampler_module, "prefill", prefill)
    sampler = make(max_new_tokens=1)  # the shortest completions, too
    for i, lengths in enumerate([(3, 9, 16), (1, 1, 1), (16, 2, 5)]):
        rollout = sample(sampler, [tiny.prompt(i, n) for n in lengths], jax.random.key(i))
        assert rollout.tokens_BC.shape == (6, 1) and rollout.length_B.tolist() == [1] * 6
    sample(sampler, [tiny.prompt(0, 4)], batch_prompts=3)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        sample(sampler, [tiny.prompt(0, 17)] * 3)


# ---------------------------------------------------------------- what a draw depends on


def test_draws_depend_on_prompt_index_sample_and_position_alone():
    """Changed: the group size, the number of prompts, their order, the bucket, the fellow prompts, the length limit."""
    expected = stopped().tokens_BC.reshape(3, 4, 10)
    prompts = [PROMPTS[2], tiny.prompt(3, 20), PROMPTS[0]]
    other = sample(
        make(sampling=SamplingParams(0.8), group_size=6, max_new_tokens=7, stop_ids=(1, 2, 3)),
        prompts,
    )
    other = other.tokens_BC.reshape(3, 6, 7)
    np.testing.assert_array_equal(other[0, :4], expected[2, :, :7])
    np.testing.assert_array_equal(other[2, :4], expected[0, :, :7])


def test_draws_differ_between_samples_prompts_positions_and_keys():
    """The same tokens under another index, another key: other completions. So are the samples of a group."""
    sampler = make(
        sampling=SamplingParams(0.8), group_size=4, max_new_tokens=10, stop_ids=(1, 2, 3)
    )
    twins = [
        PROMPTS[0],
        dataclasses.replace(PROMPTS[0], index=12),
        dataclasses.replace(PROMPTS[0], index=11 + 2**31),
    ]
    first, second = (sample(sampler, twins, key).tokens_BC for key in (KEY, jax.random.key(12)))
    np.testing.assert_array_equal(first[:4], stopped().tokens_BC[:4])
    assert len({tuple(row) for row in [*first, *second]}) == 24
    assert len(set(first[:, 0])) > 1


def test_prompt_indices_beyond_32_bits_are_taken_modulo():
    """Documented nowhere else: an index is cut to 32 bits, never refused."""
    sampler = make(
        sampling=SamplingParams(0.8), group_size=4, max_new_tokens=10, stop_ids=(1, 2, 3)
    )
    far = [dataclasses.replace(p, index=p.index + 2**32) for p in PROMPTS]
    np.testing.assert_array_equal(sample(sampler, far).tokens_BC, stopped().tokens_BC)


# ---------------------------------------------------------------- the distribution


def test_log_probs_are_those_of_the_truncated_distribution():
    """temperature, top-k, top-p and min-p together, along whole completions."""
    sampling = SamplingParams(temperature=1.4, top_k=12, top_p=0.9, min_p=0.04)
    rollout = sample(make(sampling=sampling, group_size=3, max_new_tokens=6))
    sizes = []
    for b, (tokens_C, logp_C) in enumerate(zip(rollout.tokens_BC, rollout.logp_BC, strict=True)):
        for t in range(rollout.length_B[b]):
            before = np.array([*PROMPTS[b // 3].ids, *tokens_C[:t]])
            z_V = slow_truncate(full_forward("dense")(before) / sampling.temperature, sampling)
            prob_V = np.exp(z_V - z_V.max())
            sizes.append(np.sum(prob_V > 0))
            assert logp_C[t] == pytest.approx(np.log(prob_V[tokens_C[t]] / prob_V.sum()), abs=1e-5)
    assert len(sizes) == 9 * 6 and 1 <= min(sizes) < max(sizes) <= 12


def test_pairs_of_tokens_have_the_right_frequencies():
    """4000 completions of two tokens, four choices each: chi-square over the 16 pairs."""
    sampling, n = SamplingParams(temperature=2.0, top_k=4), 4000
    rollout = sample(make(sampling=sampling, group_size=n, max_new_tokens=2), PROMPTS[:1])
    counts = collections.Counter(map(tuple, rollout.tokens_BC.tolist()))

    def next_tokens(ids) -> dict[int, float]:
        z_V = slow_truncate(full_forward("dense")(ids) / sampling.temperature, sampling)
        prob_V = np.exp(z_V - z_V.max())
        return {int(v): prob_V[v] / prob_V.sum() for v in np.flatnonzero(prob_V)}

    ids = PROMPTS[0].ids
    first = next_tokens(ids)
    expected = {(a, b): p * q for a, p in first.items() for b, q in next_tokens((*ids, a)).items()}
    assert counts.keys() <= expected.keys() and len(expected) == 16
    observed, probabilities = [counts[pair] for pair in expected], np.array(list(expected.values()))
    assert probabilities.min() * n > 5 and probabilities.max() / probabilities.min() > 3
    assert stats.chisquare(observed, n * probabilities).pvalue > 1e-3
    assert (
        stats.chisquare(observed, n * np.roll(probabilities, 1)).pvalue < 1e-6
    )  # the test can fail


# ---------------------------------------------------------------- routing


def test_recorded_routing_is_that_of_a_full_forward_pass():
    """Slot s of a row is column s: left-padded prompt, then completion. Padding and the last token hold E."""
    cfg, C, G = tiny.MOE, 12, 2
    rollout = sample(make("moe", SamplingParams(0.8), G, C, (1, 2), record_routing=True))
    np.testing.assert_array_equal(
        rollout.tokens_BC, sampled("moe").tokens_BC
    )  # recording changes no draw
    assert rollout.expert_ids_BTLk.shape == (
        6,
        16 + C,
        cfg.num_hidden_layers,
        cfg.num_experts_per_tok,
    )
    assert rollout.expert_ids_BTLk.dtype == np.uint8
    assert set(rollout.finish_B) == {STOP, LENGTH}

    rows = tiny.separate_rows(PROMPTS, rollout)
    arrays = (
        rows[name] for name in ("tokens_BT", "positions_BT", "segment_ids_BT", "prefix_ids_BT")
    )
    model = tiny.policy(cfg).bind(tiny.params(cfg))
    routing = tiny.quick_jit(lambda *x: model.forward(*x).routing)(*arrays)
    expected_LBTk = np.asarray(routing.expert_ids_BTk)
    for b, length in enumerate(rollout.length_B):
        S = len(PROMPTS[b // G].ids)
        passed = slice(16 - S, 16 + length - 1)
        found_tLk = rollout.expert_ids_BTLk[b, passed]
        np.testing.assert_array_equal(
            found_tLk, expected_LBTk[:, b, : S + length - 1].transpose(1, 0, 2)
        )
        assert set(found_tLk.flatten()) <= set(range(cfg.num_experts))
        assert np.all(np.delete(rollout.expert_ids_BTLk[b], passed, axis=0) == cfg.num_experts)
    assert len(np.unique(rollout.expert_ids_BTLk)) == cfg.num_experts + 1

    real_BT = rows["segment_ids_BT"] > 0  # the load counts no padding
    for ids_BTk, load_E in zip(expected_LBTk, routing.load_E, strict=True):
        np.testing.assert_allclose(
            load_E, np.bincount(ids_BTk[real_BT].flatten()) / ids_BTk[real_BT].size, rtol=1e-5
        )


def test_a_dense_model_has_no_routing_to_record():
    with pytest.raises(ValueError, match="record_routing: the model is dense"):
        make("dense", record_routing=True)


def test_no_prompts():
    with pytest.raises(ValueError, match="no prompts to sample from"):
        sample(make(), [])


# ---------------------------------------------------------------- slots


# A few completions end at the stop token, most are long.
WAITING = dict(sampling=SamplingParams(0.8), group_size=4, max_new_tokens=80, stop_ids=(20,))


@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ("dense", 8),
        pytest.param("dense", 3, marks=pytest.mark.slow),
        pytest.param("moe", 4, marks=pytest.mark.slow),
    ],
)
def test_completions_that_wait_for_a_slot_are_the_same(kind, slots):
    """Twelve completions of 1 to 80 tokens through a few slots, one after another, in a cache that is shifted; 8 slots
    become 4 and 2. Tokens, log-probs, lengths, reasons and experts are those of all at once, and of their own limits.
    """
    common = WAITING
    if kind == "moe":
        common = WAITING | {"stop_ids": (1,), "record_routing": True}
    limits = [80, 3, 1, 70, 64, 80, 2, 9, 80, 80, 5, 33]
    together = sample(make(kind, **common), limit_B=limits)
    waiting = sample(make(kind, **common, slots=slots), limit_B=limits)
    assert together.length_B.max() > 66 and np.all(together.length_B <= limits)
    assert (
        any(together.length_B[b] == limits[b] > 1 for b in range(12)) and STOP in together.finish_B
    )
    chex.assert_trees_all_close(waiting, together, atol=2e-5, rtol=1e-5)
    free = sample(make(kind, **common))
    for b, limit in enumerate(limits):
        n = min(limit, free.length_B[b])
        assert together.length_B[b] == n
        np.testing.assert_array_equal(together.tokens_BC[b, :n], free.tokens_BC[b, :n])


@pytest.mark.parametrize("slots", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_rows_that_start_at_pages(slots, monkeypatch):
    """The columns of a cache on TPU, here without its kernel: the same completions, waiting or not. Those that wait take
    more columns, one after another, than the cache has."""
    common = WAITING | {"slots": slots}
    limits, starts = [80, 3, 80, 80, 64, 80, 2, 80, 80, 80, 80, 80], []
    expected = sample(make(**WAITING), limit_B=limits)
    attend = attention_ops.decode_attention

    def spied(q, k, v, first_B, last_B, live_B):
        jax.debug.callback(
            lambda *x: starts.append(jax.tree.map(np.asarray, x)), first_B, last_B, live_B
        )
        return attend(q, k, v, first_B, last_B, live_B)

    monkeypatch.setattr(attention_ops, "decode_attention", spied)
    monkeypatch.setattr(attention_ops, "cache_page_size", lambda h, dtype: 8)
    sampler_module._sample.clear_cache()
    found = sample(make(**common), limit_B=limits)
    jax.effects_barrier()
    sampler_module._sample.clear_cache()
    chex.assert_trees_all_close(found, expected, atol=2e-5, rtol=1e-5)
    assert all(np.all(first_B[live_B] % 8 == 0) for first_B, _, live_B in starts)
    steps = len(starts) // tiny.DENSE.num_hidden_layers
    columns = phases(16, 80, 12, slots or 12, page=8)[-1].columns
    assert (15 + steps > columns) == (slots == 4)  # columns were shifted out
    ends = {int(behind) for _, last_B, _ in starts for behind in last_B.max() - last_B}
    assert len(ends) >= 3  # prompts have three lengths


def test_pages_and_completions_of_one_token(monkeypatch):
    """A page is more columns than they need: the cache is full before one can be shifted out."""
    monkeypatch.setattr(attention_ops, "cache_page_size", lambda h, dtype: 8)
    sampler_module._sample.clear_cache()
    common = dict(sampling=SamplingParams(0.8), group_size=4, max_new_tokens=1, stop_ids=(1, 2, 3))
    found = sample(make(**common, slots=2))
    sampler_module._sample.clear_cache()
    first_B1 = stopped().tokens_BC[:, :1]
    np.testing.assert_array_equal(found.tokens_BC, first_B1)
    np.testing.assert_array_equal(found.length_B, 1)
    np.testing.assert_array_equal(found.finish_B == STOP, np.isin(first_B1[:, 0], (1, 2, 3)))
    chex.assert_trees_all_close(found.logp_BC, stopped().logp_BC[:, :1], atol=1e-5)


def test_filled_up_batches_and_slots():
    """Prompts that nobody wants take a slot for no step."""
    common = dict(sampling=SamplingParams(0.8), group_size=4, max_new_tokens=10, stop_ids=(1, 2, 3))
    rollout = sample(make(**common, slots=5), PROMPTS[:1], batch_prompts=3)
    chex.assert_trees_all_close(rollout, jax.tree.map(lambda x: x[:4], stopped()), atol=1e-5)


@pytest.mark.parametrize("limits", [[0, 1, 1, 1, 1, 1], [1] * 5, [9, 1, 1, 1, 1, 1], [1.5] * 6])
def test_impossible_limits(limits):
    with pytest.raises(ValueError, match="limit_B: expected 6 integers from 1 to 8"):
        sample(make(), limit_B=limits)


def test_phases():
    """(slots, columns): all new tokens have a column; fewer slots only for long completions, on one device."""
    assert phases(16, 8, 6, 6) == [(6, 23)] and columns_per_widening(8) == 8
    assert phases(16, 100, 6, 6) == [(6, 115)] and columns_per_widening(100) == 100
    assert (
        phases(16, 128, 6, 3) == [(3, 79), (3, 143), (3, 207)] and columns_per_widening(128) == 64
    )
    assert phases(64, 192, 16, 16) == [(16, 127), (16, 191), (16, 255), (8, 255), (4, 255)]
    assert (
        phases(64, 192, 16, 16, narrow=False) == [(16, 127), (16, 191), (16, 255)]
        and columns_per_widening(192) == 64
    )
    assert phases(64, 192, 64, 16)[-1] == (4, 319)
    assert phases(64, 1000, 16, 16, narrow=False) == [(16, 313), (16, 563), (16, 813), (16, 1063)]
    assert columns_per_widening(1000) == 250
    assert phases(64, 1000, 16, 16, narrow=False, page=64) == [(16, 1152)]
