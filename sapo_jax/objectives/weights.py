"""Token weights: the normalisation of the loss as data, loss = -sum(weight_BT * surrogate_BT)."""

from __future__ import annotations

import chex

from sapo_jax.batch import Array


def token_weights(
    mask_BT: Array,
    segment_ids_BT: Array | None,
    normalization: str,
    max_new_tokens: int,
    totals: tuple[int, int] | None = None,
) -> Array:
    """The float32 weight of each token, made for the WHOLE optimiser batch.

        sequence_mean  1 / (n |y_i|)           the mean over sequences of their token means
                                               (SAPO Eq. 5)
        token_mean     1 / n_tokens            every token counts the same
                                               (DAPO, https://arxiv.org/abs/2503.14476)
        constant       1 / (n max_new_tokens)  no length bias
                                               (Dr. GRPO, https://arxiv.org/abs/2503.20783)

    |y_i| counts the unmasked tokens of sequence i, and n the sequences that have any, so that
    samples which are masked because their verifier failed drop out of the mean. A row is one
    sequence or, with segment_ids_BT (0 on padding, 1, 2, ... on its sequences), several. Masked
    tokens weigh 0; if all are masked, all weights are 0.

    If these rows are only a part of the optimiser batch, `totals` are the (n, n_tokens) of the
    whole. Numpy arrays give a numpy array, jax arrays a jax array. Raises ValueError for an unknown
    normalization.
    """
    chex.assert_rank(mask_BT, 2)
    chex.assert_type(mask_BT, bool)
    xp = mask_BT.__array_namespace__()
    B, T = mask_BT.shape
    if segment_ids_BT is None:
        segment_ids_BT = xp.ones((B, T), dtype=xp.int32)
    chex.assert_equal_shape([mask_BT, segment_ids_BT])

    # Every sequence of the batch gets a number of its own, and masked tokens get -1. In the sorted
    # list of these numbers each sequence is a run of equal ones, as long as the sequence.
    row_B1 = xp.arange(B)[:, None]
    sequence_BT = xp.where(mask_BT, row_B1 * (T + 1) + segment_ids_BT, -1)
    sorted_N = xp.sort(sequence_BT.reshape(-1))
    run_start_BT = xp.searchsorted(sorted_N, sequence_BT, side="left")
    run_end_BT = xp.searchsorted(sorted_N, sequence_BT, side="right")
    length_BT = run_end_BT - run_start_BT

    if totals is None:
        # The list changes wherever a sequence begins; `prepend=-1` keeps the masked tokens from
        # counting as one.
        n_sequences = xp.count_nonzero(xp.diff(sorted_N, prepend=-1))
        n_tokens = xp.count_nonzero(mask_BT)
    else:
        n_sequences, n_tokens = totals

    if normalization == "sequence_mean":
        denominator_BT = n_sequences * length_BT.astype(xp.float32)
    elif normalization == "token_mean":
        denominator_BT = n_tokens * xp.ones((B, T), xp.float32)
    elif normalization == "constant":
        denominator_BT = n_sequences * xp.full((B, T), max_new_tokens, xp.float32)
    else:
        known = "sequence_mean, token_mean, constant"
        raise ValueError(f"loss.normalization: {normalization!r} is not one of {known}")
    return xp.where(mask_BT, 1 / xp.maximum(denominator_BT, 1), 0).astype(xp.float32)
