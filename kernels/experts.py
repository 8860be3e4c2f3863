"""Products with the matrices of experts: few rows of any, and many of quantised ones.

Each row goes to a few of many experts, and the matrices of all that are wanted have to be read
once. MLX's product of many pairs, made for long prompts, multiplies tiles of 256 rows on CUDA and
reads at a sixth of the memory's speed. Here nothing is sorted: each threadgroup looks for the rows
of its expert itself. MLX's product of quantised matrices reads them on CUDA again for each row that
wants them: so many rows go likewise there, and a sort says where an expert's are.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from quire.kernels.gpu_kernel import GpuKernel, TemplateValue
from quire.kernels.padding import CONSTANT_SIZE

MAX_PAIRS = 1024  # that a threadgroup keeps the places of
SORTED_PAIRS = 64  # from so many on mlx-lm sorts them

_dense = GpuKernel(
    "expert_matmul",
    ("x", "w", "experts"),
    ("output",),
    headers=("fragments", "dense_fragments", "dense_product", "tile_sums", "experts"),
)
_quantized = GpuKernel(
    "expert_quantized_matmul",
    ("x", "w", "scales", "biases", "pairs", "starts"),
    ("output",),
    headers=(
        *("fragments", "quantized_fragments", "fp4_fragments", "codes", "quantized_product"),
        *("tile_sums", "experts"),
    ),
)


class ExpertSettings(NamedTuple):
    """What may be tuned; results differ by rounding only."""

    tiles: int = 2  # of 16 columns of the result, in one simdgroup
    simdgroups: int = 8  # of a threadgroup, which share K
    depth: int = 2  # slices of K, or quantisation groups, under way in a lane


class Quantized(NamedTuple):
    """Matrices of experts: (E, N, K * bits / 32) uint32, and (E, N, K / group_size) scales and, in
    the mode "affine", biases."""

    w: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str = "affine"  # or "mxfp4", in groups of 32


class Pairs(NamedTuple):
    """Of rows and their experts.

    Attributes:
        experts: (P,) uint32
        order: (P,) uint32, in the order of their experts; None: not sorted.
        starts: (E + 1,) int32 or more, where those of each expert begin.
    """

    experts: mx.array
    order: mx.array | None = None
    starts: mx.array | None = None


def sort_pairs(experts: mx.array, num_experts: int) -> Pairs:
    """(P,) uint32 experts, sorted."""
    numbers = mx.arange(max(num_experts + 1, CONSTANT_SIZE))
    starts = (experts[None] < numbers[:, None]).sum(axis=1)
    return Pairs(experts, mx.argsort(experts), starts.astype(mx.int32))


def expert_matmul(
    x: mx.array,
    weight: mx.array | Quantized,
    pairs: Pairs,
    each: int,
    settings: ExpertSettings | None = None,
) -> mx.array:
    """x[p / each] @ W[experts[p]]^T by matrix units.

    Args:
        x: (P / each, K) float16 or bfloat16
        weight: (E, N, K) in the dtype of ``x``, K a multiple of 32, or quantised
        each: pairs of each row of ``x``.
        pairs: P of them; not sorted, they are at most :data:`MAX_PAIRS`. Sorted ones go with
            quantised matrices only.

    Returns:
        (P, N) in the dtype of ``x``.
    """
    count, is_sorted = pairs.experts.size, pairs.order is not None
    matrices = weight.w if isinstance(weight, Quantized) else weight
    num_experts, outputs = matrices.shape[:2]
    given = pairs.experts if pairs.order is None else pairs.order
    if count < CONSTANT_SIZE:
        given = mx.pad(given, (0, CONSTANT_SIZE - count), constant_values=num_experts)
    settings = settings or _settings(count, num_experts, x.shape[1])
    template: dict[str, TemplateValue] = {
        "T": x.dtype,
        "TILES": settings.tiles,
        "INPUT_TILES": _input_tiles(count, num_experts),
        "SIMDGROUPS": settings.simdgroups,
        "DEPTH": settings.depth,
        "EACH": each,
        "MOST": MAX_PAIRS,
    }
    if isinstance(weight, Quantized):
        template |= {"GROUP": weight.group_size, "BITS": weight.bits, "SORTED": is_sorted}
        template["FP4"] = weight.mode == "mxfp4"
        kernel = _quantized
        inputs = [x, weight.w, weight.scales, weight.biases, given, pairs.starts]
    else:
        assert not is_sorted, "MLX multiplies many rows with dense matrices well"
        kernel, inputs = _dense, [x, weight, given]
    columns = -(-outputs // (16 * settings.tiles))
    groups = num_experts if is_sorted else min(given.size, num_experts)
    return kernel(
        inputs,
        template=template,
        groups=(groups * columns, 1, 1),
        threads=32 * settings.simdgroups,
        output_shapes=[(count, outputs)],
        output_dtypes=[x.dtype],
    )[0]


def _input_tiles(pairs: int, num_experts: int) -> int:
    """Of 8 rows: few texts, and rows of an expert that are hardly more."""
    return 1 if pairs <= num_experts else 2 if pairs <= MAX_PAIRS else 4


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
    order = mx.argsort(experts) if pairs >= SORTED_PAIRS else None
    if order is not None:
        rows, experts = rows[order], experts[order]
    given = x[:, None][rows]  # MLX misreads rows that an axis is put into last (its issue 4253)
    is_sorted = order is not None
    if isinstance(weight, Quantized):
        product = mx.gather_qmm(
            given,
            weight.w,
            weight.scales,
            weight.biases,
            rhs_indices=experts,
            transpose=True,
            group_size=weight.group_size,
            bits=weight.bits,
            mode=weight.mode,
            sorted_indices=is_sorted,
        )
    else:
        transposed = weight.swapaxes(-1, -2)
        if mx.default_device() == mx.cpu:  # MLX multiplies nothing else there
            given, transposed = given.astype(mx.float32), transposed.astype(mx.float32)
        product = mx.gather_mm(given, transposed, rhs_indices=experts, sorted_indices=is_sorted)
    product = product[:, 0].astype(x.dtype)
    return product if order is None else product[mx.argsort(order)]
