"""The conformance suite: what every objective must do, as checks `check(objective, cfg)` that raise
AssertionError.

`test_conformance.py` runs every check on every entry of OBJECTIVES in every variant of its config
below, and shows on a deliberately broken objective that each check can fail. A new objective needs
an entry in VARIANTS, nothing else.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.config import CISPO, DPPO, GRPO, GSPO, SAPO, TOPR, VESPO, Bounds
from sapo_jax.config.objective import GATES
from sapo_jax.objectives.sequence_mask import leave_out, masked_sequences
from sapo_jax.objectives.weights import token_weights

EVERY_BOUND = Bounds(pos_low=0.3, pos_high=0.4, neg_low=0.2, neg_high=0.9)
VARIANTS = {
    "sapo": [
        SAPO(),
        SAPO(tau_pos=1e-3, tau_neg=50.0),
        SAPO(tau_neg_below=12.0, tau_pos_above=0.5),
        SAPO(bounds=EVERY_BOUND),
        SAPO(gate="log"),
        SAPO(gate="log", tau_neg_below=12.0, bounds=Bounds(neg_low=0.2)),
        SAPO(gate="erf"),
        SAPO(gate="erf", tau_pos=1.0, tau_neg=0.3, bounds=EVERY_BOUND),
        SAPO(gate="arctan", tau_pos_below=0.7),
        SAPO(gate="softsign", width_pos=0.5, width_neg=0.1, tau_neg_above=2.0),
    ],
    "grpo": [
        GRPO(),
        GRPO(clip_low=0.6, clip_high=2.0),
        GRPO(bounds=Bounds(neg_high=2.0, pos_low=0.6)),
    ],
    "gspo": [
        GSPO(),
        GSPO(level="token"),
        GSPO(clip_low=0.2, clip_high=0.27),
        GSPO(clip_low=0.2, clip_high=0.27, level="token"),
    ],
    "cispo": [
        CISPO(),
        CISPO(clip_low=0.2, clip_high=0.5),
        CISPO(bounds=Bounds(pos_high=0.1, neg_low=0.3)),
    ],
    "vespo": [VESPO(), VESPO(c1_pos=0.5, c2_pos=0.2, c1_neg=1.0, c2_neg=4.0)],
    "dppo": [
        DPPO(),
        DPPO(divergence="kl", cap=3.0),
        DPPO(delta=0.3, bounds=Bounds(neg_low=0.5, neg_high=2.0)),
    ],
    "topr": [TOPR()],
}
# Every gate with and without bounds, and with and without temperatures of its quadrants.
GATE_PRODUCT = [
    SAPO(gate=gate, tau_pos=0.8, tau_neg=1.7, bounds=bounds, **quadrants)
    for gate in GATES
    for bounds in (Bounds(), EVERY_BOUND)
    for quadrants in ({}, {"tau_neg_below": 12.0, "tau_pos_above": 0.5})
]
EVERY_VARIANT = [cfg for variants in VARIANTS.values() for cfg in variants]
GARBAGE = (np.nan, np.inf, -np.inf, 200.0, -200.0)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The inputs of an objective, in numpy. weight_BT is made for the whole batch: rows taken from
    it keep theirs.
    """

    log_ratio_BT: np.ndarray
    adv_BT: np.ndarray
    mask_BT: np.ndarray
    weight_BT: np.ndarray
    old_logp_BT: np.ndarray
    segment_ids_BT: np.ndarray | None = None

    def replace(self, **changes) -> Tokens:
        return dataclasses.replace(self, **changes)

    def rows(self, index) -> Tokens:
        return Tokens(*(x if x is None else x[index] for x in vars(self).values()))

    def astype(self, dtype) -> Tokens:
        return self.replace(
            log_ratio_BT=self.log_ratio_BT.astype(dtype),
            adv_BT=self.adv_BT.astype(dtype),
            old_logp_BT=self.old_logp_BT.astype(dtype),
        )


def old_logps(log_ratio_BT):
    """Old log-probabilities that leave room for the ratio: half of the largest that do."""
    return np.minimum(-log_ratio_BT, 0) + np.log(log_ratio_BT.dtype.type(0.5))


def weighted(log_ratio_BT, adv_BT, mask_BT, segment_ids_BT=None, old_logp_BT=None) -> Tokens:
    if old_logp_BT is None:
        old_logp_BT = old_logps(log_ratio_BT)
    weight_BT = token_weights(
        mask_BT, segment_ids_BT, "sequence_mean", max_new_tokens=mask_BT.shape[1]
    )
    return Tokens(log_ratio_BT, adv_BT, mask_BT, weight_BT, old_logp_BT, segment_ids_BT)


def unweighted(log_ratio_BT, adv_BT, mask_BT=None, old_logp_BT=None) -> Tokens:
    """Tokens of weight 1, for which `gradient` is that of the plain sum; none are masked by
    default.
    """
    if mask_BT is None:
        mask_BT = np.ones(log_ratio_BT.shape, bool)
    if old_logp_BT is None:
        old_logp_BT = old_logps(log_ratio_BT)
    adv_BT = np.broadcast_to(adv_BT, mask_BT.shape).astype(log_ratio_BT.dtype)
    return Tokens(log_ratio_BT, adv_BT, mask_BT, np.ones_like(adv_BT), old_logp_BT)


def example() -> Tokens:
    """Six sequences: two masked prompt tokens, a completion, padding. Near and far off-policy, A of
    both signs.
    """
    rng = np.random.default_rng(0)
    length_B = np.array([6, 4, 5, 1, 6, 3])
    scale_B1 = np.array([1e-4, 1e-4, 0.2, 0.2, 1.0, 1.0])[:, None]
    adv_B1 = np.array([1.3, -0.7, 0.5, -2.0, 0.9, -1.1])[:, None]
    position_BT = np.broadcast_to(np.arange(9), (6, 9))
    mask_BT = (position_BT >= 2) & (position_BT < 2 + length_B[:, None])
    log_ratio_BT = np.where(mask_BT, scale_B1 * rng.standard_normal(mask_BT.shape), 0)
    # Likely tokens and rare ones, so that a divergence of probabilities has both.
    old_logp_BT = -np.geomspace(0.01, 5.0, mask_BT.size).reshape(mask_BT.shape).T.reshape(6, 9)
    old_logp_BT = np.minimum(old_logp_BT, -log_ratio_BT - 0.01)
    return weighted(
        log_ratio_BT.astype(np.float32),
        np.where(mask_BT, adv_B1, 0).astype(np.float32),
        mask_BT,
        old_logp_BT=old_logp_BT.astype(np.float32),
    )


def extremes() -> list[Tokens]:
    """Log-ratios up to +-200 for A of both signs: constant rows, so that the sequence ratio gets
    there, and mixed ones.

    In batches of the shape of `example`, for which everything is compiled already.
    """
    values_N = np.array([0.0, 1, 5, 10, 14, 19, 19.9, 20.1, 25, 89, 100, 200], np.float32)
    values_N = np.concatenate([-values_N, values_N])
    constant_RT = np.repeat(values_N[:, None], 9, axis=1)
    mixed_RT = np.random.default_rng(0).choice(values_N, (6, 9))
    batches = np.concatenate([constant_RT, mixed_RT]).reshape(-1, 6, 9)
    ones_BT = np.ones((6, 9), np.float32)
    return [
        weighted(x_BT, np.float32(adv) * ones_BT, ones_BT > 0)
        for x_BT in batches
        for adv in (1.5, -0.8)
    ]


def outputs(objective, cfg, log_ratio_BT, adv_BT, mask_BT, weight_BT, old_logp_BT, segment_ids_BT):
    """surrogate, diagnostics, and the gradient of sum(weight * surrogate) with respect to the
    log-ratio.
    """

    def total(log_ratio_BT):
        surrogate_BT, diagnostics = objective(
            log_ratio_BT,
            adv_BT,
            mask_BT,
            cfg,
            segment_ids_BT=segment_ids_BT,
            old_logp_BT=old_logp_BT,
        )
        return jnp.sum(weight_BT * surrogate_BT), (surrogate_BT, diagnostics)

    gradient_BT, (surrogate_BT, diagnostics) = jax.grad(total, has_aux=True)(
        jnp.asarray(log_ratio_BT)
    )
    return {"surrogate": surrogate_BT, "gradient": gradient_BT, **diagnostics}


jitted_outputs = jax.jit(outputs, static_argnums=(0, 1))


def evaluate(objective, cfg, tokens: Tokens, function=jitted_outputs) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, function(objective, cfg, *vars(tokens).values()))


@functools.cache
def with_sequence_mask(objective):
    """The objective behind a sequence mask of 0.05, whose sampler is the old policy."""

    def masked_objective(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None, **old):
        output = objective(log_ratio_BT, adv_BT, mask_BT, cfg, segment_ids_BT=segment_ids_BT, **old)
        left_out_BT = masked_sequences(log_ratio_BT, adv_BT, mask_BT, 0.05, segment_ids_BT)
        return leave_out(*output, left_out_BT)

    return masked_objective


def assert_close(actual, expected, tolerance=1e-6):
    """Trees equal within tolerance (absolute and relative); a NaN equals nothing."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=False
        ),
        actual,
        expected,
    )


def check_reinforce_at_ratio_one(objective, cfg):
    """At r = 1 the gradient is REINFORCE's, weight * A, and grad_weight is 1."""
    tokens = example()
    tokens = tokens.replace(log_ratio_BT=np.zeros_like(tokens.log_ratio_BT))
    result = evaluate(objective, cfg, tokens)
    assert_close(result["gradient"], tokens.weight_BT * tokens.adv_BT)
    assert_close(result["grad_weight"], tokens.mask_BT.astype(np.float32))


def check_masked_is_never_read(objective, cfg):
    """Whatever is in masked positions, NaN and inf included, all outputs there are 0 and the others
    are the same.
    """
    tokens = example()
    expected = evaluate(objective, cfg, tokens)
    for value in expected.values():
        np.testing.assert_array_equal(value[~tokens.mask_BT], 0)
    for garbage in GARBAGE:
        dirty = tokens.replace(
            log_ratio_BT=np.where(tokens.mask_BT, tokens.log_ratio_BT, np.float32(garbage)),
            adv_BT=np.where(tokens.mask_BT, tokens.adv_BT, np.float32(garbage)),
            old_logp_BT=np.where(tokens.mask_BT, tokens.old_logp_BT, np.float32(garbage)),
        )
        assert_close(evaluate(objective, cfg, dirty), expected, 0)


def check_padding(objective, cfg):
    """More padding, columns and whole rows, changes nothing."""
    tokens = example()
    B, T = tokens.mask_BT.shape

    def pad(x, fill):
        return np.pad(x, ((0, 2), (0, 3)), constant_values=fill)

    padded = weighted(
        pad(tokens.log_ratio_BT, 7.0),
        pad(tokens.adv_BT, -3.0),
        pad(tokens.mask_BT, False),
        old_logp_BT=pad(tokens.old_logp_BT, 5.0),
    )
    result = evaluate(objective, cfg, padded)
    assert_close(jax.tree.map(lambda x: x[:B, :T], result), evaluate(objective, cfg, tokens))
    assert all(np.all(x[B:] == 0) and np.all(x[:, T:] == 0) for x in result.values())


def check_packing(objective, cfg):
    """Three sequences in a row, told apart by segment ids, are worth the same as one per row."""
    tokens = example()
    B, T = tokens.mask_BT.shape

    def pack(x):
        return x.reshape(B // 3, 3 * T)

    # Prompts belong to their sequence's segment, padding (here also between the sequences) to
    # segment 0.
    inside_BT = tokens.mask_BT | (np.arange(T) < 2)
    segment_ids = pack(np.where(inside_BT, np.tile([[1], [2], [3]], (B // 3, 1)), 0))
    packed = weighted(
        pack(tokens.log_ratio_BT),
        pack(tokens.adv_BT),
        pack(tokens.mask_BT),
        segment_ids,
        pack(tokens.old_logp_BT),
    )
    assert_close(packed.weight_BT, pack(tokens.weight_BT))
    expected = jax.tree.map(pack, evaluate(objective, cfg, tokens))
    assert_close(evaluate(objective, cfg, packed), expected)


def check_row_permutation(objective, cfg):
    """Permuting the rows permutes the outputs."""
    tokens = example()
    order = np.array([3, 0, 5, 1, 4, 2])
    expected = jax.tree.map(lambda x: x[order], evaluate(objective, cfg, tokens))
    assert_close(evaluate(objective, cfg, tokens.rows(order)), expected)


def check_micro_batches(objective, cfg):
    """Splitting the rows into micro-batches, with the weights of the whole, changes neither outputs
    nor gradients.
    """
    tokens = example()
    parts = [
        evaluate(objective, cfg, tokens.rows(part))
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    assert_close(whole, evaluate(objective, cfg, tokens))


def check_jit(objective, cfg):
    """The objective and its gradient compile, to the same numbers."""
    assert_close(
        evaluate(objective, cfg, example(), jitted_outputs),
        evaluate(objective, cfg, example(), outputs),
    )


def check_zero_advantage(objective, cfg):
    """A = 0: exactly no surrogate and no gradient, however far off-policy; the other sequences do
    not notice.
    """
    for tokens in (example(), *extremes()):
        silent_B = np.arange(len(tokens.mask_BT)) % 2 == 0
        some = tokens.replace(
            adv_BT=np.where(silent_B[:, None], 0, tokens.adv_BT).astype(np.float32)
        )
        result = evaluate(objective, cfg, some)
        expected = evaluate(objective, cfg, tokens)
        for name in ("surrogate", "gradient", "centered"):
            np.testing.assert_array_equal(result[name][silent_B], 0)
            assert_close(result[name][~silent_B], expected[name][~silent_B])


def check_finite(objective, cfg):
    """Values, gradients and diagnostics are finite for |log-ratio| up to 200."""
    for tokens in extremes():
        for name, value in evaluate(objective, cfg, tokens).items():
            assert np.all(np.isfinite(value)), f"{name} is not finite"


def check_grad_weight(objective, cfg):
    """The reported multiplier is the one autodiff finds: d surrogate / d log r = grad_weight * A,
    and it is >= 0.
    """
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-10)):
        with jax.enable_x64(dtype == np.float64):
            for tokens in (example(), *extremes()):
                tokens = tokens.astype(dtype)
                result = evaluate(
                    objective, cfg, tokens.replace(weight_BT=np.ones_like(tokens.adv_BT))
                )
                assert_close(result["gradient"], result["grad_weight"] * tokens.adv_BT, tolerance)
                assert_close(result["grad_weight"], result["ratio"] * result["gate"], tolerance)
                assert np.all(result["grad_weight"] >= 0)


def check_clipped(objective, cfg):
    """`clipped` is 0 or 1, and where it is 1 there is no gradient."""
    for tokens in (example(), *extremes()):
        result = evaluate(objective, cfg, tokens)
        assert np.all(np.isin(result["clipped"], (0, 1)))
        np.testing.assert_array_equal(result["gradient"][result["clipped"] == 1], 0)


def check_centered(objective, cfg):
    """`centered` is the surrogate less its value at r = 1: 0 there, and different by the same
    constant everywhere.
    """
    with jax.enable_x64(True):
        tokens = example().astype(np.float64)
        at_one = evaluate(
            objective, cfg, tokens.replace(log_ratio_BT=np.zeros_like(tokens.log_ratio_BT))
        )
        result = evaluate(objective, cfg, tokens)
        np.testing.assert_array_equal(at_one["centered"], 0)
        assert_close(result["surrogate"] - result["centered"], at_one["surrogate"], 1e-10)


def check_scales_with_advantage(objective, cfg):
    """Three times the advantage is three times the surrogate and the gradient; ratio and gate stay."""
    tokens = example()
    result = evaluate(objective, cfg, tokens)
    tripled = evaluate(objective, cfg, tokens.replace(adv_BT=3 * tokens.adv_BT))
    factor = {"surrogate": 3, "gradient": 3, "centered": 3}
    assert_close(tripled, {name: factor.get(name, 1) * value for name, value in result.items()})


def check_output_form(objective, cfg):
    """[B, T] arrays under the agreed names; float32 for float32 and bfloat16 inputs, float64 for
    float64.
    """
    for input_dtype, output_dtype in (
        (jnp.bfloat16, "float32"),
        (np.float32, "float32"),
        (np.float64, "float64"),
    ):
        with jax.enable_x64(input_dtype == np.float64):
            result = evaluate(objective, cfg, example().astype(input_dtype))
        result.pop("gradient")
        assert result.keys() == {"surrogate", "ratio", "gate", "grad_weight", "clipped", "centered"}
        assert all(
            (x.shape, x.dtype) == (example().mask_BT.shape, output_dtype) for x in result.values()
        )


def check_diagnostics_are_constants(objective, cfg):
    """No gradient flows through the diagnostics."""
    tokens = example()

    def total(log_ratio_BT):
        _, diagnostics = objective(
            log_ratio_BT, tokens.adv_BT, tokens.mask_BT, cfg, old_logp_BT=tokens.old_logp_BT
        )
        return sum(jnp.sum(value) for value in diagnostics.values())

    gradient_BT = jax.jit(jax.grad(total))(jnp.asarray(tokens.log_ratio_BT))
    np.testing.assert_array_equal(gradient_BT, 0)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
