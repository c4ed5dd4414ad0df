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
    """Float32 weight of each token, made for the WHOLE optimiser batch; numpy in, numpy out, and jax likewise.

        sequence_mean  1 / (n |y_i|)             the mean over sequences of the mean over their tokens (SAPO Eq. 5)
        token_mean     1 / n_tokens              every token counts the same (DAPO, arXiv 2503.14476)
        constant       1 / (n max_new_tokens)    no length bias (Dr. GRPO, arXiv 2503.20783)

    |y_i| counts the unmasked tokens of sequence i and n the sequences that have any, so that samples masked for a
    failed verifier drop out of the mean. A row is one sequence or, with segment_ids_BT (0 on padding, 1, 2, ... on its
    sequences), several. Masked tokens weigh 0; if all are masked, all weights are 0. Where these rows are a part of the
    optimiser batch, `totals` are its n and n_tokens.
    """
    chex.assert_rank(mask_BT, 2)
    chex.assert_type(mask_BT, bool)
    xp = mask_BT.__array_namespace__()
    B, T = mask_BT.shape
    ids_BT = xp.ones((B, T), dtype=xp.int32) if segment_ids_BT is None else segment_ids_BT
    chex.assert_equal_shape([mask_BT, ids_BT])

    # A number for each sequence of the batch, -1 on masked tokens; its run in the sorted list is the sequence's length.
    ids_BT = xp.where(mask_BT, xp.arange(B)[:, None] * (T + 1) + ids_BT, -1)
    sorted_N = xp.sort(ids_BT.reshape(-1))
    length_BT = xp.searchsorted(sorted_N, ids_BT, side="right") - xp.searchsorted(
        sorted_N, ids_BT, side="left"
    )
    here = (
        xp.count_nonzero(xp.diff(sorted_N, prepend=-1)),
        xp.count_nonzero(mask_BT),
    )  # every new number but -1
    n_sequences, n_tokens = here if totals is None else totals

    denominators = {
        "sequence_mean": n_sequences * length_BT.astype(xp.float32),
        "token_mean": n_tokens * xp.ones((B, T), xp.float32),
        "constant": n_sequences * xp.full((B, T), max_new_tokens, xp.float32),
    }
    if normalization not in denominators:
        raise ValueError(
            f"loss.normalization: {normalization!r} is not one of {', '.join(denominators)}"
        )
    return xp.where(mask_BT, 1 / xp.maximum(denominators[normalization], 1), 0).astype(xp.float32)
