"""Linears over flattened rows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from quire.kernels.linear import quantized_matmul, quantized_matmul_by_head


class FlatQuantizedLinear(nn.QuantizedLinear):
    """Takes all rows as one matrix, where the model passes (T, 1, K).

    MLX's CUDA backend takes the number of rows from the second-last axis: T products of one row
    each read the weights T times, 17 times slower at 2,048 rows. On the CPU, too, the variants that
    unpack the weights once for many rows need to see the rows.
    """

    def __call__(self, x: mx.array) -> mx.array:
        output = _multiply(self, x)
        return output + self["bias"] if "bias" in self else output


class FlatQuantizedEmbedding(nn.QuantizedEmbedding):
    """The same where the embedding is the head too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _multiply(self, x)


class FlatMultiLinear(MultiLinear):
    """A matrix for each head (MLA's absorbed projections), times the rows of that head.

    The model passes (T, heads, 1, K), which MLX takes for T products of one row: each reads the
    weights again, three quarters of a prompt's time on a GPU.
    """

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        is_flat = _is_flat(x)
        output: mx.array = super().__call__(x.swapaxes(0, 2) if is_flat else x, transpose)
        return output.swapaxes(0, 2) if is_flat else output


class FlatQuantizedMultiLinear(QuantizedMultiLinear):
    """The same of quantised matrices."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if not (_is_flat(x) and transpose):
            output: mx.array = super().__call__(x, transpose)
            return output
        product = quantized_matmul_by_head(
            x.squeeze(2).swapaxes(0, 1),
            self["weight"],
            self["scales"],
            self.get("biases"),
            bits=self.bits,
            group_size=self.group_size,
            mode=self.mode,
        )
        return product.swapaxes(0, 1)[:, :, None]


_FLAT: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: FlatQuantizedLinear,
    nn.QuantizedEmbedding: FlatQuantizedEmbedding,
    MultiLinear: FlatMultiLinear,
    QuantizedMultiLinear: FlatQuantizedMultiLinear,
}


def flatten_linears(model: nn.Module) -> None:
    for module in model.modules():
        module.__class__ = _FLAT.get(type(module), type(module))


def _is_flat(x: mx.array) -> bool:
    return x.ndim == 4 and x.shape[2] == 1 < x.shape[0]


def flat_product(
    rows: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    bits: int,
    group_size: int,
    mode: str,
) -> mx.array:
    """(T, inputs) times a quantised (outputs, inputs) matrix, transposed, as a layer keeps it."""
    if mode == "affine":
        assert biases is not None, "affine weights have biases"
        return quantized_matmul(rows, weight, scales, biases, group_size=group_size, bits=bits)
    return mx.quantized_matmul(
        rows, weight, scales, biases, group_size=group_size, bits=bits, mode=mode
    )


def _multiply(layer: Any, x: mx.array) -> mx.array:
    product = flat_product(
        x.reshape(-1, x.shape[-1]),
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        bits=layer.bits,
        group_size=layer.group_size,
        mode=layer.mode,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])
