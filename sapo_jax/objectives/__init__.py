"""Policy-gradient objectives, and what turns rewards and log-probabilities into a loss.

An objective is a pure function of the log-ratio, the advantage and the mask of every token:

    objective(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None)
        -> (surrogate_BT, diagnostics)

- `log_ratio_BT` is log pi - log pi_old, `adv_BT` the advantage of the token's sequence, `mask_BT`
  (bool) is True on the tokens that are trained on. `cfg` is the objective's own dataclass of
  `config.schema`.
- `segment_ids_BT` tells apart the sequences that are packed into one row: 0 on padding, 1, 2, ...
  on the sequences.
- `surrogate_BT` is to be maximised: loss = -sum(weight_BT * surrogate_BT), with the weights of
  `token_weights`. It is 0 where the mask is False, and what the inputs hold there (NaN too) never
  reaches a value or a gradient.
- `diagnostics` holds the arrays of `ratios.token_diagnostics`.
- Outputs are float32, or float64 for float64 inputs.

The functions `sapo`, `grpo`, `gspo`, `cispo` and `advantages` have the names of the modules that
define them. As attributes of this package these names are the functions.

To add an objective: write one file, add one line to this table, and one member to the config union.
"""

from collections.abc import Callable, Mapping

from sapo_jax.batch import Array
from sapo_jax.objectives.advantages import advantages
from sapo_jax.objectives.cispo import cispo
from sapo_jax.objectives.correction import CORRECTIONS
from sapo_jax.objectives.grpo import grpo
from sapo_jax.objectives.gspo import gspo
from sapo_jax.objectives.kl import KL_ESTIMATORS
from sapo_jax.objectives.sapo import sapo
from sapo_jax.objectives.weights import token_weights

# (log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT) -> (surrogate_BT, diagnostics)
Objective = Callable[..., tuple[Array, Mapping[str, Array]]]

OBJECTIVES: dict[str, Objective] = {"sapo": sapo, "grpo": grpo, "gspo": gspo, "cispo": cispo}

__all__ = [
    "CORRECTIONS",
    "KL_ESTIMATORS",
    "OBJECTIVES",
    "Objective",
    "advantages",
    "cispo",
    "grpo",
    "gspo",
    "sapo",
    "token_weights",
]
