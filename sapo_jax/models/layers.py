"""The small parts of a Qwen3 block. Parameters are float32 and carry logical dim names; compute is in `dtype`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sapo_jax.kernels import few_rows_product
from sapo_jax.types import Array

LARGE = 2**16  # elements of a weight, see `product`


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str | None, ...], stddev: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, stddev^2), with the logical names of its dims as metadata."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32), dims=dims)


def zeros(shape: tuple[int, ...], dims: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter that starts at 0: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), dims=dims)


def product(x: Array, w: Array, over: int = 1) -> Array:
    """x w: the sum over the last `over` dims of x, which are the first of w; with a gradient rule of its own where w
    is LARGE.

    For w's gradient one of x and the cotangent has to be laid out anew on CPU, tokens last. Autodiff has XLA do so with
    the cotangent, which is computed once more for that, element by element; the rule here takes the narrower of the two
    (256 x 768: a fifth of the update). For a w of 64 x 192 that is slower.
    """
    return _product(x, w, over) if w.size >= LARGE else jnp.tensordot(x, w, over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, over: int) -> Array:
    return jnp.tensordot(x, w, over)


def _product_backward(over: int, kept, d_out: Array) -> tuple[Array, Array]:
    x, w = kept
    tokens, results = tuple(range(x.ndim - over)), w.ndim - over  # the dims of tokens; how many those of a result are
    last = tuple(range(-results, 0))
    d_x = jnp.tensordot(d_out, w, (last, last))
    if math.prod(w.shape[:over]) <= math.prod(w.shape[over:]):
        return d_x, jnp.tensordot(x, d_out, (tokens, tokens))
    return d_x, jnp.moveaxis(jnp.tensordot(d_out, x, (tokens, tokens)), range(results), last)


_product.defvjp(lambda x, w, over: (jnp.tensordot(x, w, over), (x, w)), _product_backward)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, dim: str | None = "embed"):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), dims=(dim,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: (silu(x Wg) * (x Wu)) Wd (Shazeer, arXiv 2002.05202)."""

    def __init__(self, D: int, F: int, stddev: float, *, rngs: nnx.Rngs):
        self.gate = parameter(rngs, (D, F), ("embed", "mlp"), stddev)
        self.up = parameter(rngs, (D, F), ("embed", "mlp"), stddev)
        self.down = parameter(rngs, (F, D), ("mlp", "embed"), stddev)

    def __call__(self, x_BTD: Array) -> Array:
        gate, up, down = (p[...].astype(x_BTD.dtype) for p in (self.gate, self.up, self.down))
        return product(jax.nn.silu(product(x_BTD, gate)) * product(x_BTD, up), down)

    def decoder(self, dtype) -> Callable:
        """`__call__` for one token per row, x_BD -> y_BD; gate and up are put side by side here, once."""
        joined_DcF = jnp.stack([self.gate[...], self.up[...]], axis=1).astype(dtype)
        wide = few_rows_product(joined_DcF, None, None, "decode_mlp", rows="decode_tokens")
        down = few_rows_product(self.down[...].astype(dtype), "decode_mlp", None, rows="decode_tokens")

        def mlp(x_BD: Array) -> Array:
            y_BcF = wide(x_BD)
            return down(jax.nn.silu(y_BcF[:, 0]) * y_BcF[:, 1])

        return mlp
