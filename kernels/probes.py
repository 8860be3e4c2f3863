"""A probe for any shape of any operation."""

from __future__ import annotations

import mlx.core as mx

from quire.kernels.probe import Probe
from quire.kernels.probe_attention import decode_probe, prompt_probe
from quire.kernels.probe_matmul import matmul_probe
from quire.kernels.probe_rows import sample_probe, write_probe
from quire.kernels.shapes import AnyShape, DecodeShape, MatmulShape, PromptShape, WriteShape


def make_probe(shape: AnyShape, dtype: mx.Dtype, seed: int = 0, *, ragged: bool = False) -> Probe:
    """Random inputs of ``shape`` on the default device; ``ragged``: contexts of all lengths."""
    if isinstance(shape, DecodeShape):
        return decode_probe(shape, dtype, seed, ragged=ragged)
    if isinstance(shape, PromptShape):
        return prompt_probe(shape, dtype, seed)
    if isinstance(shape, WriteShape):
        return write_probe(shape, dtype, seed)
    if isinstance(shape, MatmulShape):
        return matmul_probe(shape, dtype, seed)
    return sample_probe(shape, dtype, seed)
