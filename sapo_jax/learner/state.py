"""Parameters and train states on a mesh: made, or described without being made."""

from __future__ import annotations

from typing import Any

import jax
import optax

from sapo_jax.batch import Params, TrainState
from sapo_jax.distributed import sharding
from sapo_jax.learner.update import init_state, state_shardings
from sapo_jax.models import Policy


def abstract_params(policy: Policy, mesh: jax.sharding.Mesh) -> Params:
    """Shape, dtype and sharding of every parameter, as jax.ShapeDtypeStruct."""
    placed = sharding.shardings(mesh, policy.logical_axes)
    return _with_shardings(policy.shapes, placed)


def random_params(policy: Policy, mesh: jax.sharding.Mesh, key: jax.Array) -> Params:
    """Fresh parameters, float32, each made in its place on the mesh."""
    placed = sharding.shardings(mesh, policy.logical_axes)
    return jax.jit(policy.init, out_shardings=placed)(key)


def fresh_state(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    params: Params,
) -> TrainState:
    """The state at step 0. It takes over `params`: their buffers are donated."""
    placed = state_shardings(policy, optimizer, mesh)

    def make(params: Params) -> TrainState:
        return init_state(params, optimizer)

    return jax.jit(make, donate_argnums=0, out_shardings=placed)(params)


def abstract_state(
    policy: Policy, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shape, dtype and sharding of every array of the state, as jax.ShapeDtypeStruct."""

    def make(params: Params) -> TrainState:
        return init_state(params, optimizer)

    shapes = jax.eval_shape(make, policy.shapes)
    return _with_shardings(shapes, state_shardings(policy, optimizer, mesh))


def _with_shardings(shapes: Any, placed: Any) -> Any:
    def place(shape: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(place, shapes, placed)
