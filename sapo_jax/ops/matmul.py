"""Products with weights: `linear` for whole rows of tokens, `decode_matmul` for a decode step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sapo_jax.distributed.sharding import constrain_if_divisible, on_tpu, single_device

# Elements of a weight from which `linear` has a gradient rule of its own. For a weight of 64 x 192
# that rule is slower than autodiff.
LARGE = 2**16


def linear(x: Array, w: Array, over: int = 1) -> Array:
    """x w: the sum over the last `over` dims of x, which are the first `over` dims of w.

    Where w has at least LARGE elements the gradient of w has a rule of its own, made for CPUs.
    There, one of x and the cotangent has to be laid out anew for that gradient, tokens last.
    Autodiff has XLA do so with the cotangent, which is computed once more for that, element by
    element. The rule takes the narrower of the two (for 256 x 768 this saves a fifth of an update).
    """
    if w.size >= LARGE:
        return _linear(x, w, over)
    return jnp.tensordot(x, w, over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, w: Array, over: int) -> Array:
    return jnp.tensordot(x, w, over)


def _linear_forward(x: Array, w: Array, over: int) -> tuple[Array, tuple[Array, Array]]:
    return jnp.tensordot(x, w, over), (x, w)


def _linear_backward(over: int, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    """d_x = d_out w^T and d_w = x^T d_out, the latter as (d_out^T x)^T where d_out is narrower."""
    x, w = saved
    token_dims = tuple(range(x.ndim - over))
    num_output_dims = w.ndim - over
    output_dims = tuple(range(-num_output_dims, 0))
    d_x = jnp.tensordot(d_out, w, (output_dims, output_dims))
    input_width = math.prod(w.shape[:over])
    output_width = math.prod(w.shape[over:])
    if input_width <= output_width:
        d_w = jnp.tensordot(x, d_out, (token_dims, token_dims))
    else:
        d_w_transposed = jnp.tensordot(d_out, x, (token_dims, token_dims))
        d_w = jnp.moveaxis(d_w_transposed, range(num_output_dims), output_dims)
    return d_x, d_w


_linear.defvjp(_linear_forward, _linear_backward)


def decode_matmul(
    w: Array,
    *logical_axes: str | None,
    batch_axis: str | None = "batch",
    over: int = 1,
    dtype: DTypeLike | None = None,
) -> Callable[[Array], Array]:
    """Prepares the product with w for a decode loop: a function x [B, D] -> x w [B, ...].

    w is [D, ...], laid out here once and not in each step. The first `over` dims of w stand for D,
    and as many of x. dtype: that of the result.

    On a mesh w is split by `logical_axes`, the names of its dims, and the dim B of x and of the
    result by `batch_axis` (None: each device has all of it); see sharding.constrain_if_divisible.

    On a single CPU the product is computed as (w^T x^T)^T. XLA packs the right operand of a product
    anew each time, and of the two operands x is the small one. Measured with 16 rows and a weight
    that is not in the processor's cache, this takes 0.5 to 0.8 of the time.
    """
    if not single_device() or on_tpu():
        w = constrain_if_divisible(w, *logical_axes)
        input_axes = logical_axes[:over]
        output_axes = logical_axes[over:]

        def matmul_on_mesh(x: Array) -> Array:
            x = constrain_if_divisible(x, batch_axis, *input_axes)
            y = jnp.tensordot(x, w, over, preferred_element_type=dtype)
            return constrain_if_divisible(y, batch_axis, *output_axes)

        return matmul_on_mesh

    # The barriers keep XLA from undoing the transpositions.
    output_shape = w.shape[over:]
    w_ND = w.reshape(math.prod(w.shape[:over]), -1).T
    w_ND = jax.lax.optimization_barrier(w_ND)

    def matmul_on_cpu(x: Array) -> Array:
        x_BD = x.reshape(len(x), -1)
        y_NB = jnp.einsum("nd,bd->nb", w_ND, x_BD, preferred_element_type=dtype)
        y_NB = jax.lax.optimization_barrier(y_NB)
        return y_NB.T.reshape(-1, *output_shape)

    return matmul_on_cpu
