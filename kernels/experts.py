"""Products with the matrices of experts, for the few rows of a decode step.

Each row goes to a few of many experts, and the matrices of all that are wanted have to be read
once. MLX's product of many pairs, made for long prompts, multiplies tiles of 256 rows on CUDA and
reads at a fifth of the memory's speed. Here nothing is sorted: each threadgroup looks for the rows
of its expert itself.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.padding import CONSTANT_SIZE

MAX_PAIRS = 1024  # that a threadgroup keeps the places of

_dense = GpuKernel(
    "expert_matmul",
    ("x", "w", "experts"),
    ("output",),
    headers=("fragments", "dense_fragments", "dense_product", "tile_sums", "experts"),
)
_quantized = GpuKernel(
    "expert_quantized_matmul",
    ("x", "w", "scales", "biases", "experts"),
    ("output",),
    headers=("fragments", "quantized_fragments", "quantized_product", "tile_sums", "experts"),
)


class ExpertSettings(NamedTuple):
    """What may be tuned; results differ by rounding only."""

    tiles: int = 2  # of 16 columns of the result, in one simdgroup
    simdgroups: int = 8  # of a threadgroup, which share K
    depth: int = 2  # slices of K, or quantisation groups, under way in a lane


class Quantized(NamedTuple):
    """Matrices of experts in MLX's affine mode: (E, N, K * bits / 32) uint32 and two of
    (E, N, K / group_size)."""

    w: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


def expert_matmul(
    x: mx.array,
    weight: mx.array | Quantized,
    experts: mx.array,
    each: int,
    settings: ExpertSettings | None = None,
) -> mx.array:
    """x[p / each] @ W[experts[p]]^T by matrix units.

    Args:
        x: (P / each, K) float16 or bfloat16
        weight: (E, N, K) in the dtype of ``x``, K a multiple of 32, or quantised
        experts: (P,) uint32, P at most :data:`MAX_PAIRS`

    Returns:
        (P, N) in the dtype of ``x``.
    """
    pairs, (num_experts, outputs) = experts.size, _arrays(weight)[0].shape[:2]
    if pairs < CONSTANT_SIZE:
        experts = mx.pad(experts, (0, CONSTANT_SIZE - pairs), constant_values=num_experts)
    settings = settings or _settings(experts.size, num_experts, x.shape[1])
    template: dict[str, TemplateValue] = {
        "T": x.dtype,
        "TILES": settings.tiles,
        "INPUT_TILES": 1 if experts.size <= num_experts else 2,
        "SIMDGROUPS": settings.simdgroups,
        "DEPTH": settings.depth,
        "EACH": each,
        "MOST": MAX_PAIRS,
    }
    if isinstance(weight, Quantized):
        template |= {"BITS": weight.bits, "GROUP": weight.group_size}
    columns = -(-outputs // (16 * settings.tiles))
    kernel = _quantized if isinstance(weight, Quantized) else _dense
    return kernel(
        [x, *_arrays(weight), experts],
        template=template,
        groups=(min(experts.size, num_experts) * columns, 1, 1),
        threads=32 * settings.simdgroups,
        output_shapes=[(pairs, outputs)],
        output_dtypes=[x.dtype],
    )[0]


def _arrays(weight: mx.array | Quantized) -> tuple[mx.array, ...]:
    return weight[:3] if isinstance(weight, Quantized) else (weight,)


def _settings(pairs: int, num_experts: int, depth: int) -> ExpertSettings:
    """Narrow tiles make more threadgroups where few experts are wanted; a short K is not shared by
    many simdgroups."""
    return ExpertSettings(
        tiles=1 if pairs <= num_experts else 2, simdgroups=8 if depth > 1024 else 4
    )


def gather_matmul(
    x: mx.array, weight: mx.array | Quantized, experts: mx.array, each: int
) -> mx.array:
    """The same product by MLX's own, as mlx-lm calls it: of many pairs in the order of experts."""
    pairs = experts.size
    rows = mx.arange(pairs) // each
    order = mx.argsort(experts) if pairs >= _SORTED_PAIRS else None
    if order is not None:
        rows, experts = rows[order], experts[order]
    given = x[rows][:, None]
    is_sorted = order is not None
    if isinstance(weight, Quantized):
        product = mx.gather_qmm(
            given,
            *weight[:3],
            rhs_indices=experts,
            transpose=True,
            group_size=weight.group_size,
            bits=weight.bits,
            sorted_indices=is_sorted,
        )
    else:
        transposed = weight.swapaxes(-1, -2)
        if mx.default_device() == mx.cpu:  # MLX multiplies nothing else there
            given, transposed = given.astype(mx.float32), transposed.astype(mx.float32)
        product = mx.gather_mm(given, transposed, rhs_indices=experts, sorted_indices=is_sorted)
    product = product[:, 0].astype(x.dtype)
    return product if order is None else product[mx.argsort(order)]


_SORTED_PAIRS = 64
