"""Policy-gradient objectives, and what turns rewards and log-probabilities into a loss.

An objective is a pure function of the log-ratio, the advantage and the mask of every token:

    objective(log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT=None, old_logp_BT=None)
        -> (surrogate_BT, diagnostics)

- `log_ratio_BT` is log pi - log pi_old, `adv_BT` the advantage of the token's sequence, `mask_BT`
  (bool) is True on the tokens that are trained on. `cfg` is the objective's own dataclass of
  `config.objective`. Its numbers are read by attribute and may be traced JAX scalars: no function
  branches on the value of one, only on whether it is None.
- `segment_ids_BT` tells apart the sequences that are packed into one row: 0 on padding, 1, 2, ...
  on the sequences.
- `old_logp_BT` is log pi_old itself. It is there for objectives whose trust region is one of
  probabilities and not of ratios (`dppo`); the others leave it.
- `surrogate_BT` is to be maximised: loss = -sum(weight_BT * surrogate_BT), with the weights of
  `token_weights`. It is 0 where the mask is False, and what the inputs hold there (NaN too) never
  reaches a value or a gradient.
- `diagnostics` holds the arrays of `ratios.token_diagnostics`.
- Outputs are float32, or float64 for float64 inputs.

The functions `sapo`, `grpo`, `gspo`, `cispo`, `vespo`, `dppo`, `topr` and `advantages` have the
names of the modules that define them. As attributes of this package these names are the functions.

To add an objective: write one file, add one line to this table, and one member to the config union.
"""

from collections.abc import Callable, Mapping

from sapo_jax.batch import Array
from sapo_jax.objectives.advantages import advantages
from sapo_jax.objectives.cispo import cispo
from sapo_jax.objectives.correction import CORRECTIONS
from sapo_jax.objectives.dppo import dppo
from sapo_jax.objectives.grpo import grpo
from sapo_jax.objectives.gspo import gspo
from sapo_jax.objectives.kl import KL_ESTIMATORS
from sapo_jax.objectives.sapo import sapo
from sapo_jax.objectives.topr import topr
from sapo_jax.objectives.vespo import vespo
from sapo_jax.objectives.weights import token_weights

# (log_ratio_BT, adv_BT, mask_BT, cfg, *, segment_ids_BT, old_logp_BT)
#     -> (surrogate_BT, diagnostics)
Objective = Callable[..., tuple[Array, Mapping[str, Array]]]

OBJECTIVES: dict[str, Objective] = {
    "sapo": sapo,
    "grpo": grpo,
    "gspo": gspo,
    "cispo": cispo,
    "vespo": vespo,
    "dppo": dppo,
    "topr": topr,
}

__all__ = [
    "CORRECTIONS",
    "KL_ESTIMATORS",
    "OBJECTIVES",
    "Objective",
    "advantages",
    "cispo",
    "dppo",
    "grpo",
    "gspo",
    "sapo",
    "token_weights",
    "topr",
    "vespo",
]
