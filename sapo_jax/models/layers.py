"""The small parts of a Qwen3 block: parameters, RMSNorm, SwiGLU.

Parameters are float32 and carry the logical axes of their dims; the compute dtype is that of the
activations.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sapo_jax.ops.matmul import decode_matmul, linear

LogicalAxes = tuple[str | None, ...]


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], logical_axes: LogicalAxes, stddev: float
) -> nnx.Param:
    """A float32 parameter drawn from N(0, stddev^2), with its logical axes as metadata."""
    values = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(values, logical_axes=logical_axes)


def zeros(shape: tuple[int, ...], logical_axes: LogicalAxes) -> nnx.Param:
    """A float32 parameter that starts at 0: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=logical_axes)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, in float32.

    Zhang & Sennrich, arXiv 1910.07467. This is not flax's nnx.RMSNorm, for two reasons. That one
    multiplies x by the product of 1 / sqrt(...) and scale. In float32 this differs in the last bit,
    for a third of random values, from (x / sqrt(...)) * scale, the order of Hugging Face's Qwen3.
    And it draws a random key for the scale, although that starts at 1, which would change the
    initial values of all parameters that are drawn after it.
    """

    def __init__(self, size: int, eps: float, logical_axis: str | None = "embed"):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), logical_axes=(logical_axis,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True)
        normed = x_f32 * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: (silu(x Wg) * (x Wu)) Wd (Shazeer, arXiv 2002.05202)."""

    def __init__(self, D: int, F: int, stddev: float, *, rngs: nnx.Rngs):
        self.gate = parameter(rngs, (D, F), ("embed", "mlp"), stddev)
        self.up = parameter(rngs, (D, F), ("embed", "mlp"), stddev)
        self.down = parameter(rngs, (F, D), ("mlp", "embed"), stddev)

    def __call__(self, x_BTD: Array) -> Array:
        gate_DF = self.gate[...].astype(x_BTD.dtype)
        up_DF = self.up[...].astype(x_BTD.dtype)
        down_FD = self.down[...].astype(x_BTD.dtype)
        hidden_BTF = jax.nn.silu(linear(x_BTD, gate_DF)) * linear(x_BTD, up_DF)
        return linear(hidden_BTF, down_FD)

    def decoder(self, dtype: DTypeLike) -> Callable[[Array], Array]:
        """`__call__` for one token per row, x_BD -> y_BD, in a decode loop.

        The weights are cast, and gate and up put side by side, here and once.
        """
        gate_up_DcF = jnp.stack([self.gate[...], self.up[...]], axis=1).astype(dtype)  # c = 2
        down_FD = self.down[...].astype(dtype)
        multiply_gate_up = decode_matmul(
            gate_up_DcF, None, None, "decode_mlp", batch_axis="decode_tokens"
        )
        multiply_down = decode_matmul(down_FD, "decode_mlp", None, batch_axis="decode_tokens")

        def decode_mlp(x_BD: Array) -> Array:
            y_BcF = multiply_gate_up(x_BD)
            hidden_BF = jax.nn.silu(y_BcF[:, 0]) * y_BcF[:, 1]
            return multiply_down(hidden_BF)

        return decode_mlp
