"""Products with weight matrices, sampling, and KV writes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from quire.kernels.choice.timing import Function
from quire.kernels.kv_write_spec import KV_WRITE, WriteProblem, WriteShape, WriteVariant
from quire.kernels.matmul_spec import MATMUL, DenseProblem, DenseShape
from quire.kernels.quantized_matmul_spec import QUANTIZED_MATMUL, MatmulShape, QuantizedProblem
from quire.kernels.sampling_spec import SAMPLE, SampleProblem, SampleShape
from quire.loadtest.kernels.case import Case, Profile, specified_variants
from quire.loadtest.kernels.paged_cases import Heads

_GROUP_SIZE = 64
_BITS = (4, 8)
# (outputs, inputs) of Qwen3-8B: attention's queries or output, keys or values, gate or up, down and
# the head.
_MATRICES = {
    "gpu": ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288), (151_936, 4096)),
    "cpu": ((512, 512), (512, 1536)),
}
_ROWS = {"gpu": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 8)}
_DENSE_ROWS = {"gpu": (1, 4, 16, 64), "cpu": (1, 8)}
# (outputs, inputs, bias) of Qwen2.5-0.5B, one row: gate and up together, down, and QKV together.
_SINGLE_ROW = ((9728, 896, False), (896, 4864, False), (1152, 896, True))


def quantized_cases(profile: Profile) -> Iterator[Case]:
    """From one row to a small batch on the matrices of a model, at 4 and 8 bits."""
    place = "gpu" if profile.gpu else "cpu"
    matrices = _MATRICES[place][:1] if profile.quick else _MATRICES[place]
    for bits in _BITS[:1] if profile.quick else _BITS:
        for outputs, inputs in matrices:
            for rows in _ROWS[place]:
                yield _quantized("quantized_matmul", profile, rows, outputs, inputs, bits)


def matmul_cases(profile: Profile) -> Iterator[Case]:
    """One row on the matrices of a very small model: dense, 4-bit and 8-bit. Then from one row to a
    small batch on larger dense matrices."""
    for outputs, inputs, has_bias in _SINGLE_ROW[-1:] if profile.quick else _SINGLE_ROW:
        yield _dense(profile, 1, outputs, inputs, has_bias)
        for bits in _BITS:
            yield _quantized("matmul", profile, 1, outputs, inputs, bits, has_bias)
    place = "gpu" if profile.gpu else "cpu"
    for outputs, inputs in _MATRICES[place][:1] if profile.quick else _MATRICES[place]:
        for rows in _DENSE_ROWS[place]:
            yield _dense(profile, rows, outputs, inputs)


class _Quantized(QuantizedProblem):
    """With the numbers that the codes stand for."""

    def __init__(self, shape: MatmulShape, dtype: mx.Dtype, has_bias: bool, seed: int) -> None:
        super().__init__(shape, dtype, seed, False, has_bias)
        self.dense = self.dequantized()
        mx.eval(self.dense)

    def dequantized(self) -> mx.array:
        shape = self.shape
        return mx.dequantize(*self.matrix, group_size=shape.group_size, bits=shape.bits)

    def by_mlx(self) -> mx.array:
        packed, scales, biases = self.matrix
        shape = self.shape
        return mx.quantized_matmul(
            self.x, packed, scales, biases, group_size=shape.group_size, bits=shape.bits
        )


def _with_bias(product: mx.array, x: _Quantized | DenseProblem) -> list[mx.array]:
    return [product if x.bias is None else product + x.bias]


def _dense_by_mlx(x: DenseProblem) -> list[mx.array]:
    if x.bias is None:
        return [x.x @ x.transposed]
    return [mx.addmm(x.bias, x.x, x.transposed)]


_QUANTIZED: dict[str, Function] = {
    "mlx": lambda x: _with_bias(x.by_mlx(), x),
    # The whole matrix in memory as numbers, then the dense product.
    "dequantize": lambda x: _with_bias(x.x @ x.dequantized().T, x),
    "dense": lambda x: _with_bias(x.x @ x.dense.T, x),
}
_DENSE: dict[str, Function] = {"mlx": _dense_by_mlx}
# Every product in memory, then their sums.
_SUMS: dict[str, Function] = {
    "naive": lambda x: _with_bias((x.x[:, None] * x.weight).sum(axis=-1), x)
}


def _quantized(
    operation: str,
    profile: Profile,
    rows: int,
    outputs: int,
    inputs: int,
    bits: int,
    has_bias: bool = False,
) -> Case:
    size = profile.dtype.size
    activations = (rows * (inputs + outputs) + outputs * has_bias) * size
    packed = outputs * inputs * bits // 8 + 2 * outputs * inputs // _GROUP_SIZE * size
    dense = outputs * inputs * size
    shape = MatmulShape(rows, outputs, inputs, bits, _GROUP_SIZE)
    ours, label = specified_variants(profile, QUANTIZED_MATMUL, shape)
    return Case(
        operation=operation,
        name=f"{rows} x {outputs} x {inputs}{' + bias' * has_bias} {bits}-bit",
        labels={**_labels(rows, outputs, inputs, has_bias), "bits": bits, **label},
        inputs=partial(_Quantized, shape, profile.dtype, has_bias),
        variants={**_QUANTIZED, **ours},
        baselines=tuple(_QUANTIZED),
        bytes_moved=packed + activations,
        variant_bytes={"dense": dense + activations},
        flops=2 * rows * outputs * inputs,
        tolerance=0.05,  # the dense variants round the numbers that the codes stand for
        memory=packed + 3 * dense,
    )


def _dense(
    profile: Profile, rows: int, outputs: int, inputs: int, has_bias: bool | None = None
) -> Case:
    """With ``has_bias`` told, of a single row, also by sums of products in memory."""
    size, dense = profile.dtype.size, outputs * inputs * profile.dtype.size
    bias = bool(has_bias)
    shape = DenseShape(rows, outputs, inputs)
    ours, label = specified_variants(profile, MATMUL, shape)
    others = _DENSE if has_bias is None else {**_DENSE, **_SUMS}
    return Case(
        operation="matmul",
        name=f"{rows} x {outputs} x {inputs}{' + bias' * bias}",
        labels={**_labels(rows, outputs, inputs, bias), **label},
        inputs=lambda seed: DenseProblem(shape, profile.dtype, seed, False, bias),
        variants={**others, **ours},
        baselines=tuple(others),
        bytes_moved=dense + (rows * (inputs + outputs) + outputs * bias) * size,
        flops=2 * rows * outputs * inputs,
        memory=4 * dense,
    )


def _labels(rows: int, outputs: int, inputs: int, has_bias: bool) -> dict[str, int | str]:
    labels: dict[str, int | str] = {"rows": rows, "outputs": outputs, "inputs": inputs}
    return {**labels, "bias": "yes"} if has_bias else labels


_VOCAB = {"gpu": 151_936, "cpu": 32_000}
_SAMPLED = {"gpu": (1, 16, 64), "cpu": (1, 8)}


def sample_cases(profile: Profile) -> Iterator[Case]:
    """Rows with filters of all kinds over a whole vocabulary, then of likeliest tokens; one
    sequence's logits, then those of whole batches."""
    place = "gpu" if profile.gpu else "cpu"
    vocab = _VOCAB[place]
    for rows in _SAMPLED[place][:1] if profile.quick else _SAMPLED[place]:
        yield _sample(profile, SampleShape(rows, vocab), {"sort": _sort})
        greedy = SampleShape(rows, vocab, filtered=False, greedy=True)
        yield _sample(profile, greedy, {"argmax": _argmax})


def _argmax(x: SampleProblem) -> list[mx.array]:
    return [mx.argmax(x.logits, axis=-1).astype(mx.int32)]


def _sort(x: SampleProblem) -> list[mx.array]:
    """Everything in order of probability, cut where each row's filters say, and one draw."""
    draws, vocab = x.draws, x.shape.vocab
    columns = (draws.temperature, np.where(draws.top_k, draws.top_k, vocab), draws.top_p)
    temperature, top_k, top_p, min_p, uniform = (
        mx.array(np.asarray(column, np.float32))[:, None]
        for column in (*columns, draws.min_p, draws.uniform)
    )
    order = mx.argsort(-x.logits, axis=-1)
    scaled = mx.take_along_axis(x.logits, order, axis=-1).astype(mx.float32) / temperature
    chances = mx.softmax(mx.where(mx.arange(vocab) < top_k, scaled, -mx.inf), axis=-1)
    kept = (mx.cumsum(chances, axis=-1) - chances < top_p) & (chances >= min_p * chances[:, :1])
    reached = mx.cumsum(mx.where(kept, chances, 0.0), axis=-1)
    place = (reached <= reached[:, -1:] * uniform).sum(axis=-1)
    return [mx.take_along_axis(order, place[:, None], axis=-1)[:, 0]]


def _sample(profile: Profile, shape: SampleShape, baseline: dict[str, Function]) -> Case:
    logits = shape.rows * shape.vocab * profile.dtype.size
    ours, label = specified_variants(profile, SAMPLE, shape)
    kind: dict[str, int | str] = {"greedy": "yes"} if shape.greedy else {"filters": "all"}
    return Case(
        operation="sample",
        name=f"{shape.rows} x {shape.vocab}{' greedy' * shape.greedy}",
        labels={"rows": shape.rows, "vocab": shape.vocab, **kind, **label},
        inputs=lambda seed: SampleProblem(shape, profile.dtype, seed, False),
        variants={**baseline, **ours},
        baselines=tuple(baseline),
        bytes_moved=logits,
        # The order of the tokens differs in a sort, and with it what a number draws.
        tolerance=0.0 if shape.greedy else None,
        memory=16 * logits,
    )


# Blocks of the pool: more than a cache holds, so that the slots are not all in it.
_BLOCKS = {"gpu": 2048, "cpu": 256}


def write_cases(profile: Profile) -> Iterator[Case]:
    """A decode step's rows and a prompt's."""
    heads, dtype = Heads.of(profile), profile.dtype
    blocks = _BLOCKS["gpu" if profile.gpu else "cpu"]
    _, kv_heads, key_dim, value_dim, block_size = heads.numbers
    for rows in (64,) if profile.quick else (64, 2048):
        shape = WriteShape(rows, kv_heads, key_dim, value_dim, block_size)
        ours, label = specified_variants(profile, KV_WRITE, shape)
        baseline = {"scatter": KV_WRITE.variants[WriteVariant.SCATTER].with_settings({})}
        yield Case(
            operation="kv_write",
            name=f"{rows} rows",
            labels={"rows": rows, **label},
            inputs=partial(_writes, shape, dtype, blocks),
            variants=baseline | (ours if profile.gpu else {}),
            baselines=tuple(baseline),
            # Rows read, slots written.
            bytes_moved=2 * heads.kv_bytes(rows, dtype),
            tolerance=0.0,
            memory=4 * heads.kv_bytes(blocks * block_size, dtype),
        )


def _writes(shape: WriteShape, dtype: mx.Dtype, blocks: int, seed: int) -> WriteProblem:
    return WriteProblem(shape, dtype, seed, num_blocks=blocks)
