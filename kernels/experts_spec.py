"""Rows times the matrices of the experts they go to, dense and quantised."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, Problem, normal, to_float64
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    HALF,
    Default,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.experts import (
    MAX_PAIRS,
    ExpertSettings,
    Pairs,
    Quantized,
    expert_matmul,
    gather_matmul,
    sort_pairs,
)
from quire.kernels.quantized_matmul_spec import unpack

# Of mxfp4: what codes mean, and what a scale's exponent is counted from.
_FP4 = np.array([*(sign * v for sign in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6))])
_FP4_EXPONENT = 127


class ExpertVariant(Enum):
    BY_EXPERT = "by_expert"
    MLX = "mlx"


class QuantizedExpertVariant(Enum):
    BY_EXPERT = "by_expert"
    SORTED = "sorted"  # pairs are, by another operation
    MLX = "mlx"


class ExpertShape(NamedTuple):
    pairs: int  # of rows and experts
    each: int  # experts that a row of the input goes to
    experts: int
    outputs: int
    dim: int

    def bucket(self) -> ExpertShape:
        pairs, each, experts, outputs, dim = self
        return ExpertShape(round_up(pairs), each, round_up(experts), round_up(outputs), dim)


class QuantizedExpertShape(NamedTuple):
    pairs: int
    each: int
    experts: int
    outputs: int
    dim: int
    bits: int
    group_size: int
    mxfp4: bool = False  # else MLX's affine mode

    def bucket(self) -> QuantizedExpertShape:
        return QuantizedExpertShape(*ExpertShape(*self[:5]).bucket(), *self[5:])


class ExpertProblem(Problem):
    """Each pair's expert is drawn from all, whichever row it is of."""

    waits = "x"

    def __init__(
        self,
        shape: ExpertShape | QuantizedExpertShape,
        dtype: mx.Dtype,
        seed: int,
        ragged: bool = False,
    ) -> None:
        self.shape = shape
        random = mx.random.split(mx.random.key(seed), 2)
        self.x = normal((shape.pairs // shape.each, shape.dim), dtype, random[0])
        weight = normal((shape.experts, shape.outputs, shape.dim), dtype, random[1])
        chosen = np.random.default_rng(seed).integers(0, shape.experts, shape.pairs)
        self.experts = mx.array(chosen.astype(np.uint32))
        self.weight: mx.array | Quantized = weight
        arrays: tuple[mx.array, ...] = (weight,)
        if isinstance(shape, QuantizedExpertShape):
            mode = "mxfp4" if shape.mxfp4 else "affine"
            arrays = mx.quantize(weight, shape.group_size, shape.bits, mode=mode)
            w, scales, biases = (*arrays, None)[:3]
            self.weight = Quantized(w, scales, biases, shape.group_size, shape.bits, mode)
        mx.eval(self.experts, *arrays)
        wanted = len(set(chosen.tolist()))
        self.flops = 2 * shape.pairs * shape.outputs * shape.dim
        self.num_bytes = sum(array.nbytes for array in arrays) * wanted // shape.experts
        self.num_bytes += self.x.nbytes + shape.pairs * shape.outputs * dtype.size

    def expected(self) -> list[Float64Array]:
        shape, (x,) = self.shape, to_float64([self.x])
        rows = x[np.arange(shape.pairs) // shape.each]
        matrices = self._matrices()[np.array(self.experts)]
        return [np.einsum("pk,pnk->pn", rows, matrices)]

    def _matrices(self) -> Float64Array:
        if not isinstance(self.weight, Quantized):
            return to_float64([self.weight])[0]
        w, scales, biases, size, bits, _ = self.weight
        codes = unpack(np.array(w.reshape(-1, w.shape[2])), bits).reshape(*scales.shape, size)
        values: Float64Array
        if biases is None:
            powers = np.array(scales).astype(np.float64) - _FP4_EXPONENT
            values = _FP4[codes] * np.exp2(powers)[..., None]
        else:
            scale, bias = to_float64([scales, biases])
            values = codes * scale[..., None] + bias[..., None]
        return values.reshape(*w.shape[:2], -1)


def run_experts(
    variant: ExpertVariant | QuantizedExpertVariant,
    settings: Settings,
    x: mx.array,
    weight: mx.array | Quantized,
    pairs: Pairs,
    each: int,
) -> mx.array:
    """:func:`quire.kernels.experts.expert_matmul` by one variant; without settings it takes its
    own. ``pairs`` are those of :func:`pairs_for`."""
    if variant in (ExpertVariant.MLX, QuantizedExpertVariant.MLX):
        return gather_matmul(x, weight, pairs.experts, each)
    chosen = ExpertSettings(**settings) if settings else None
    return expert_matmul(x, weight, pairs, each, chosen)


def pairs_for(
    variant: ExpertVariant | QuantizedExpertVariant, experts: mx.array, num_experts: int
) -> Pairs:
    """(P,) uint32 experts as a variant needs them."""
    is_sorted = variant is QuantizedExpertVariant.SORTED
    return sort_pairs(experts, num_experts) if is_sorted else Pairs(experts)


def _run(
    variant: ExpertVariant | QuantizedExpertVariant, problem: ExpertProblem, settings: Settings
) -> list[mx.array]:
    pairs = pairs_for(variant, problem.experts, problem.shape.experts)
    given = problem.x, problem.weight, pairs, problem.shape.each
    return [run_experts(variant, settings, *given)]


def _kernel(
    variant: ExpertVariant | QuantizedExpertVariant, limits: dict[str, Limit]
) -> Variant[Any, ExpertProblem]:
    settings = {"tiles": (1, 2), "simdgroups": (4, 8), "depth": (2, 4)}
    return Variant(partial(_run, variant), dtypes=HALF, limits=limits, settings=settings)


_MLX: Variant[Any, ExpertProblem] = Variant(partial(_run, ExpertVariant.MLX), Kind.STEPS, ANYWHERE)
_PAIRS = Limit(max=MAX_PAIRS)
# On an H200, of 8 to 512 pairs, dense products take 0.2 to 0.9 of the time of MLX's own, those of 4
# bits 0.3 to 0.6, and sorting pays at 512 (h200-expert-kernels.json). MLX's product of many pairs
# is made for long prompts, that of quantised matrices reads an expert's again for each of its rows.
# Nothing has been measured of 8 bits and mxfp4, nor on Metal.
_MEASURED = {"pairs": Limit(min=8)}
_FEW = {"pairs": Limit(min=8, max=256)}
_MODES = {"bits": Limit(values=(4, 8)), "group_size": Limit(values=(32, 64, 128))}
# Qwen3 30B-A3B's, whose sizes most others share: into its experts, and out of them.
_INTO, _OUT = ExpertShape(128, 8, 128, 768, 2048), ExpertShape(128, 1, 128, 2048, 768)
_QUANTIZED = 4, 64  # bits and group size
_CHECKED = (
    ExpertShape(2, 2, 5, 40, 64),  # fewer pairs than Metal takes as any others
    ExpertShape(12, 4, 16, 72, 160),
    ExpertShape(120, 3, 4, 50, 352),  # more rows of an expert than are computed at a time
    ExpertShape(300, 1, 8, 16, 64),  # more pairs than a threadgroup has threads
)


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[ExpertShape]:
    if device == "cpu":  # where nothing is to choose
        yield _INTO._replace(pairs=8, experts=16, outputs=192, dim=512)
        return
    for rows in (1, 4, 16, 64):
        for shape in (_INTO, _OUT):
            yield shape._replace(pairs=rows * _INTO.each)


def _tuned_quantized(
    sizes: ModelSizes, device: DeviceName, block_size: int
) -> Iterator[QuantizedExpertShape]:
    if sizes.bits is not None:
        for shape in _tuned(sizes, device, block_size):
            yield QuantizedExpertShape(*shape, sizes.bits, sizes.group_size)


EXPERT_MATMUL = Spec(
    name="expert_matmul",
    shape=ExpertShape,
    variants={
        ExpertVariant.BY_EXPERT: _kernel(
            ExpertVariant.BY_EXPERT, {"pairs": _PAIRS, "dim": Limit(multiple_of=32)}
        ),
        ExpertVariant.MLX: _MLX,
    },
    reference=ExpertVariant.MLX,
    defaults=(Default(ExpertVariant.BY_EXPERT, ("cuda",), _MEASURED),),
    problem=ExpertProblem,
    checked=_CHECKED,
    surveyed={"into": _INTO, "out": _OUT},
    tuned=_tuned,
)

QUANTIZED_EXPERT_MATMUL = Spec(
    name="quantized_expert_matmul",
    shape=QuantizedExpertShape,
    variants={
        QuantizedExpertVariant.BY_EXPERT: _kernel(
            QuantizedExpertVariant.BY_EXPERT, {"pairs": _PAIRS, **_MODES}
        ),
        QuantizedExpertVariant.SORTED: _kernel(QuantizedExpertVariant.SORTED, _MODES),
        QuantizedExpertVariant.MLX: _MLX,
    },
    reference=QuantizedExpertVariant.MLX,
    defaults=(
        Default(QuantizedExpertVariant.BY_EXPERT, ("cuda",), _FEW),
        Default(QuantizedExpertVariant.SORTED, ("cuda",), _MEASURED),
    ),
    problem=ExpertProblem,
    checked=(
        QuantizedExpertShape(*_CHECKED[0], 4, 64),
        QuantizedExpertShape(*_CHECKED[1][:4], 256, 8, 32),
        QuantizedExpertShape(*_CHECKED[2][:4], 384, 4, 128),
        QuantizedExpertShape(*_CHECKED[3], 4, 32),
        QuantizedExpertShape(*_CHECKED[1][:4], 96, 4, 32, mxfp4=True),
        QuantizedExpertShape(*_CHECKED[2][:4], 96, 4, 32, mxfp4=True),
    ),
    surveyed={
        "into": QuantizedExpertShape(*_INTO, *_QUANTIZED),
        **{f"{bits} bits": QuantizedExpertShape(*_INTO, bits, 64) for bits in (3, 4, 6, 8)},
        "mxfp4": QuantizedExpertShape(*_INTO, 4, 32, mxfp4=True),
    },
    tuned=_tuned_quantized,
)
