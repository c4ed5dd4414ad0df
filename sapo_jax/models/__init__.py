"""The functional face of a policy model: nnx defines it once, everything else handles a plain dict of arrays.

`nnx.split` happens once; the training step is then `jax.jit` / `jax.grad` over `params` (nnx.jit costs 16x the
dispatch). `bind(params)` puts the arrays back under the module's methods; inside a jitted function it costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from sapo_jax.batch import Params
from sapo_jax.config.schema import Model
from sapo_jax.models.attention import KVCache
from sapo_jax.models.qwen3 import Forward, Qwen3

__all__ = ["Forward", "KVCache", "Policy", "Qwen3", "make_policy"]


@dataclasses.dataclass(
    frozen=True, eq=False, repr=False
)  # equal only to itself: hashable, a static jit argument
class Policy:
    cfg: Model
    graphdef: Any
    state: Any  # nnx state of ShapeDtypeStructs: the template that `bind` fills
    shapes: Params  # dict of ShapeDtypeStruct
    logical_axes: (
        Params  # dict of tuples: the logical names of every parameter's dims (see sharding.RULES)
    )

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32. Jit it with out_shardings to have them made in place on a mesh."""
        return nnx.to_pure_dict(nnx.state(Qwen3(self.cfg, rngs=nnx.Rngs(params=key)), nnx.Param))

    def bind(self, params: Params) -> Qwen3:
        """The model with these parameters."""
        state = jax.tree.map(lambda x: x, self.state)  # a copy: replace_by_pure_dict writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)


def make_policy(cfg: Model) -> Policy:
    """Trace the model abstractly: nothing is allocated. cfg.vocab_size must be filled in (from the tokenizer)."""
    if cfg.vocab_size == 0:
        raise ValueError(
            "model.vocab_size is 0: fill it in from the tokenizer before making the policy"
        )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(cfg, rngs=nnx.Rngs(params=0))))
    shapes = nnx.to_pure_dict(state)

    def dims_of(path: tuple, variable: nnx.Param) -> tuple[str | None, ...]:
        return ("layers",) * (path[0] == "layers") + variable.get_metadata()[
            "dims"
        ]  # stacked: see qwen3

    flat = {path: dims_of(path, variable) for path, variable in nnx.to_flat_state(state)}
    return Policy(cfg, graphdef, state, shapes, _nest(flat))


def _nest(flat: dict[tuple, Any]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
