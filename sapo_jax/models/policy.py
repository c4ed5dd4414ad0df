"""The functional face of a policy model: nnx defines it, everything else handles a dict of arrays.

`nnx.split` happens once. The training step is then plain `jax.jit` and `jax.grad` over `params`,
because nnx.jit costs 16 times the dispatch. `bind(params)` puts the arrays back under the methods
of the module; inside a jitted function that costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx, traverse_util

from sapo_jax.batch import Params
from sapo_jax.config.schema import Model
from sapo_jax.models.qwen3 import Qwen3


# A policy is equal only to itself (eq=False), so that it is hashable: a static argument of jit.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Policy:
    """A model without its parameters; `make_policy` makes it."""

    cfg: Model
    graphdef: Any  # nnx's description of the module
    state: Any  # nnx state of ShapeDtypeStructs: the template that `bind` fills
    shapes: Params  # dict of ShapeDtypeStructs
    logical_axes: Params  # dict of tuples, one name for each dim of a parameter: sharding.RULES

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32. Jit it with out_shardings to have them made on a mesh."""
        model = Qwen3(self.cfg, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def bind(self, params: Params) -> Qwen3:
        """The model with these parameters."""
        state = jax.tree.map(lambda x: x, self.state)  # a copy: replace_by_pure_dict writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)


def make_policy(cfg: Model) -> Policy:
    """Traces the model abstractly, so that nothing is allocated.

    cfg.vocab_size must be filled in, from the tokenizer; raises ValueError if it is 0.
    """
    if cfg.vocab_size == 0:
        raise ValueError(
            "model.vocab_size is 0: fill it in from the tokenizer before making the policy"
        )

    def make_model() -> Qwen3:
        return Qwen3(cfg, rngs=nnx.Rngs(params=0))

    graphdef, state = nnx.split(nnx.eval_shape(make_model))
    axes_of_path = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata()["logical_axes"]
        if path[0] == "layers":
            axes = ("layers", *axes)  # parameters of layers are stacked, see Qwen3
        axes_of_path[path] = axes
    return Policy(
        cfg=cfg,
        graphdef=graphdef,
        state=state,
        shapes=nnx.to_pure_dict(state),
        logical_axes=traverse_util.unflatten_dict(axes_of_path),
    )
