"""Policy-gradient objectives: pure functions of the log-ratio, the advantage and the mask of every token.

    objective(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None) -> (surrogate_BT, diagnostics)

log_ratio = log pi - log pi_old; cfg is the objective's own dataclass; segment_ids_BT tells apart the sequences of a
packed row (see `types.Batch`). `surrogate_BT` is to be maximised: loss = -sum(weight_BT * surrogate_BT), with the
weights of `weights.token_weights`. It is 0 where masked, and what the inputs hold there (NaN too) is never used.
`diagnostics` holds the arrays of `ratios.token_diagnostics`. Outputs are float32, or float64 for float64 inputs.

To add an objective: one file, one line in this table, one member of the config union.
"""

from sapo_jax.objectives.cispo import cispo
from sapo_jax.objectives.grpo import grpo
from sapo_jax.objectives.gspo import gspo
from sapo_jax.objectives.sapo import sapo

OBJECTIVES = {"sapo": sapo, "grpo": grpo, "gspo": gspo, "cispo": cispo}
