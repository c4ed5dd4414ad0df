"""The small parts of a Qwen3 block. Parameters are float32 and carry logical dim names; compute is in `dtype`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sapo_jax.batch import Array
from sapo_jax.ops.matmul import decode_matmul, linear


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str | None, ...], stddev: float
) -> nnx.Param:
    """A float32 parameter drawn from N(0, stddev^2), with the logical names of its dims as metadata."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32), dims=dims)


def zeros(shape: tuple[int, ...], dims: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter that starts at 0: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), dims=dims)


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
        return linear(jax.nn.silu(linear(x_BTD, gate)) * linear(x_BTD, up), down)

    def decoder(self, dtype) -> Callable:
        """`__call__` for one token per row, x_BD -> y_BD; gate and up are put side by side here, once."""
        joined_DcF = jnp.stack([self.gate[...], self.up[...]], axis=1).astype(dtype)
        wide = decode_matmul(joined_DcF, None, None, "decode_mlp", rows="decode_tokens")
        down = decode_matmul(self.down[...].astype(dtype), "decode_mlp", None, rows="decode_tokens")

        def mlp(x_BD: Array) -> Array:
            y_BcF = wide(x_BD)
            return down(jax.nn.silu(y_BcF[:, 0]) * y_BcF[:, 1])

        return mlp
