"""How much the sequence mask (`loss.sequence_mask`) leaves out: of sequences and of the gradient.

Made inside the jitted update, of one micro-batch at a time; the sums of several add up.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array, Batch
from sapo_jax.diagnostics.quadrants import ratio
from sapo_jax.objectives.ratios import masked, sequence_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceMaskSums:
    """Float32 scalars; sequences are those with a trained token."""

    sequences: Array  # their number
    negative: Array  # those with A < 0
    left_out: Array  # those that the mask leaves out, all of which have A < 0
    grad: Array  # sum over tokens of weight |A| r f' before the mask, with the correction
    grad_left_out: Array  # its part of the sequences that the mask leaves out


def collect_sequence_mask(
    batch: Batch, left_out_BT: Array, grad_weight_BT: Array
) -> SequenceMaskSums:
    """The sums of one micro-batch.

    left_out_BT: bool, where `objectives.sequence_mask.masked_sequences` leaves a token out
    grad_weight_BT: what the objective reports before that, the multiplier on A grad log pi

    The gradient is a sum of vectors; here their sizes are added, as in `grad_share/`.
    """
    mask_BT = batch.mask_BT
    adv_BT = masked(batch.adv_BT, mask_BT)
    # The tokens of a sequence share it: each is one part in |y_i| of it.
    part_BT = mask_BT / sequence_length(mask_BT, batch.segment_ids_BT)
    grad_BT = batch.weight_BT * jnp.abs(adv_BT) * grad_weight_BT
    if batch.correction_BT is not None:
        grad_BT = grad_BT * batch.correction_BT
    grad_BT = masked(grad_BT, mask_BT)
    sums = SequenceMaskSums(
        sequences=part_BT.sum(),
        negative=jnp.where(adv_BT < 0, part_BT, 0).sum(),
        left_out=jnp.where(left_out_BT, part_BT, 0).sum(),
        grad=grad_BT.sum(),
        grad_left_out=jnp.where(left_out_BT, grad_BT, 0).sum(),
    )
    return jax.lax.stop_gradient(sums)


def finalize_sequence_mask(sums: SequenceMaskSums) -> dict[str, Array]:
    """Scalars by metric name; what there is nothing to take a share of is left out.

    Takes numpy arrays.
    """
    shares = {
        "sequence_mask/fraction": ratio(sums.left_out, sums.sequences),
        "sequence_mask/neg_fraction": ratio(sums.left_out, sums.negative),
        "sequence_mask/grad_share": ratio(sums.grad_left_out, sums.grad),
    }
    return {name: share for name, share in shares.items() if share is not None}
