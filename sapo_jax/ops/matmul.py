"""Products with weights: in training, with a gradient rule for CPU; and of few rows, in decoding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.distributed.sharding import constrain_if_divisible, on_tpu, single_device

LARGE = 2**16  # elements of a weight, see `product`


def linear(x: Array, w: Array, over: int = 1) -> Array:
    """x w: the sum over the last `over` dims of x, which are the first of w; with a gradient rule of its own where w
    is LARGE.

    For w's gradient one of x and the cotangent has to be laid out anew on CPU, tokens last. Autodiff has XLA do so with
    the cotangent, which is computed once more for that, element by element; the rule here takes the narrower of the two
    (256 x 768: a fifth of the update). For a w of 64 x 192 that is slower.
    """
    return _linear(x, w, over) if w.size >= LARGE else jnp.tensordot(x, w, over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, w: Array, over: int) -> Array:
    return jnp.tensordot(x, w, over)


def _linear_backward(over: int, kept, d_out: Array) -> tuple[Array, Array]:
    x, w = kept
    tokens, results = (
        tuple(range(x.ndim - over)),
        w.ndim - over,
    )  # the dims of tokens; how many those of a result are
    last = tuple(range(-results, 0))
    d_x = jnp.tensordot(d_out, w, (last, last))
    if math.prod(w.shape[:over]) <= math.prod(w.shape[over:]):
        return d_x, jnp.tensordot(x, d_out, (tokens, tokens))
    return d_x, jnp.moveaxis(jnp.tensordot(d_out, x, (tokens, tokens)), range(results), last)


_linear.defvjp(lambda x, w, over: (jnp.tensordot(x, w, over), (x, w)), _linear_backward)


def decode_matmul(
    w: Array, *dims: str | None, rows: str | None = "batch", over: int = 1, dtype=None
) -> Callable[[Array], Array]:
    """x [B, D] -> x w [B, ...], w [D, ...], for a decode loop; w is laid out here, once. dtype: of the result.

    over: so many dims of w stand for D.
    On a mesh by `dims`, its logical dims; `rows` is the one of B, in x and in the result (see
    sharding.constrain_if_divisible; None: each device has all). On a CPU alone the product is (w^T x^T)^T: XLA packs the right operand of a product anew each
    time, of these two the small one. Measured with 16 rows and a weight that is not in the processor's cache: 0.5 to
    0.8 of the time.
    """
    if not single_device() or on_tpu():
        w = constrain_if_divisible(w, *dims)

        def matmul_on_mesh(x: Array) -> Array:
            x = constrain_if_divisible(x, rows, *dims[:over])
            y = jnp.tensordot(x, w, over, preferred_element_type=dtype)
            return constrain_if_divisible(y, rows, *dims[over:])

        return matmul_on_mesh

    w_ND = jax.lax.optimization_barrier(w.reshape(math.prod(w.shape[:over]), -1).T)

    def matmul_on_cpu(x: Array) -> Array:
        y_NB = jnp.einsum("nd,bd->nb", w_ND, x.reshape(len(x), -1), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y_NB).T.reshape(-1, *w.shape[over:])

    return matmul_on_cpu
