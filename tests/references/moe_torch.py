"""A mixture of experts with given experts in plain torch: one loop over the tokens, one over their experts.

`forced` puts it in the place of a Hugging Face model's own. For tests only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel


def moe(x_ND, ids_Nk, router_ED, gate_up_EGD, down_EDF, normalise: bool):
    """y = sum_e g_e W_down,e (silu(W_gate,e x) * W_up,e x) over a token's given experts e; G = 2 F, gate over up.

    g = softmax(W_router x) over all experts, divided by its sum over the given ones with `normalise`.
    """
    out = []
    for x_D, ids_k in zip(x_ND, ids_Nk, strict=True):
        prob_E = torch.softmax(router_ED @ x_D, dim=0)
        total = sum(prob_E[e] for e in ids_k) if normalise else 1.0
        y_D = torch.zeros_like(x_D)
        for e in ids_k:
            gate_F, up_F = (gate_up_EGD[e] @ x_D).chunk(2)
            y_D = y_D + prob_E[e] / total * (
                down_EDF[e] @ (torch.nn.functional.silu(gate_F) * up_F)
            )
        out.append(y_D)
    return torch.stack(out)


@contextlib.contextmanager
def forced(model: PreTrainedModel, ids_BTLk: np.ndarray, normalise: bool) -> Iterator[None]:
    """Within it, sparse layer number l (of the sparse ones) sends token t of row b to the experts ids_BTLk[b, t, l]."""
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert len(blocks) == ids_BTLk.shape[2]

    def forward_of(block, ids_Nk):
        experts = block.experts

        def forward(x_BTD):
            x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
            y_ND = moe(
                x_ND, ids_Nk, block.gate.weight, experts.gate_up_proj, experts.down_proj, normalise
            )
            return y_ND.reshape(x_BTD.shape)

        return forward

    for i, block in enumerate(blocks):
        block.forward = forward_of(
            block, ids_BTLk[:, :, i].reshape(-1, ids_BTLk.shape[-1]).tolist()
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class has its own
