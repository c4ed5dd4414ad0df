"""Whether a policy that is about to be saved is still a policy: a question to its newest tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from sapo_jax.batch import Batch, Params
from sapo_jax.distributed.processes import all_gather
from sapo_jax.distributed.sharding import host_rows, put_batch
from sapo_jax.learner.scoring import ScorerOutput

ScorerFn = Callable[[Params, Batch], ScorerOutput]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens that the policy wrote before its last updates: what does it say of them now?

    A finite but ruined policy gives itself away here, also where its parameters look sound: norm
    layers hide their scale, and a step that turns them around does not make them larger. It costs
    one scoring pass over a mini-batch, by the program that the step has compiled anyway.
    """

    batch: Batch  # of a mini-batch, on the host
    old_logp_BT: np.ndarray  # before the updates
    scorer: ScorerFn
    mesh: jax.sharding.Mesh

    def __call__(self, params: Params) -> float:
        """mean(old logp - logp) over the tokens, nats: an estimate of KL(old || now) per token.

        A collective. 0 where there are no tokens.
        """
        scored = host_rows(self.scorer(params, put_batch(self.batch, self.mesh)), self.mesh)
        drop_N = (self.old_logp_BT - np.asarray(scored.logp_BT))[self.batch.mask_BT]
        parts = all_gather({"sum": float(drop_N.sum()), "count": drop_N.size})
        count = sum(part["count"] for part in parts)
        return sum(part["sum"] for part in parts) / max(count, 1)
