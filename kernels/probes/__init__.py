"""A probe for any shape of any operation."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.choice.shapes import (
    AnyShape,
    DecodeShape,
    DenseShape,
    GateShape,
    GatherShape,
    MatmulShape,
    MixedShape,
    NormShape,
    PromptShape,
    RotateShape,
    RotatingDecodeShape,
    RowsShape,
    SharedShape,
    WriteShape,
)
from quire.kernels.probes.attention import decode_probe, prompt_probe
from quire.kernels.probes.block import gate_probe, norm_probe, rotate_probe
from quire.kernels.probes.matmul import dense_probe, matmul_probe
from quire.kernels.probes.mixed import mixed_probe
from quire.kernels.probes.probe import Probe
from quire.kernels.probes.rotating import rotating_decode_probe
from quire.kernels.probes.rows import gather_probe, rows_probe, sample_probe, write_probe
from quire.kernels.probes.shared import shared_probe


def make_probe(shape: AnyShape, dtype: mx.Dtype, seed: int = 0, *, ragged: bool = False) -> Probe:
    """Random inputs of ``shape`` on the default device; ``ragged``: contexts of all lengths."""
    match shape:
        case DecodeShape():
            return decode_probe(shape, dtype, seed, ragged=ragged)
        case SharedShape():
            return shared_probe(shape, dtype, seed, ragged=ragged)
        case PromptShape():
            return prompt_probe(shape, dtype, seed)
        case MixedShape():
            return mixed_probe(shape, dtype, seed, ragged=ragged)
        case WriteShape():
            return write_probe(shape, dtype, seed)
        case GatherShape():
            return gather_probe(shape, dtype, seed)
        case RowsShape():
            return rows_probe(shape, dtype, seed)
        case RotateShape():
            return rotate_probe(shape, dtype, seed)
        case RotatingDecodeShape():
            return rotating_decode_probe(shape, dtype, seed, ragged=ragged)
        case NormShape():
            return norm_probe(shape, dtype, seed)
        case GateShape():
            return gate_probe(shape, dtype, seed)
        case DenseShape():
            return dense_probe(shape, dtype, seed)
        case MatmulShape():
            return matmul_probe(shape, dtype, seed)
    return sample_probe(shape, dtype, seed)
