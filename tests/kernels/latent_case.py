"""Latent attention (MLA) of decodes, small enough to simulate."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from decode_case import BF16, LIMITS, to_float64

from quire.kernels.paged_decode_spec import (
    PAGED_DECODE,
    DecodeProblem,
    DecodeShape,
    DecodeVariant,
)

SHAPE = DecodeShape(3, 90, 5, 1, 512, 512, 16, extra_dim=64)


@dataclass(frozen=True)
class LatentCase:
    """Heads that share one key, of which the values are a part."""

    dtype: mx.Dtype = BF16
    shape: DecodeShape = SHAPE
    settings: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{str(self.dtype)[9:]}-{self.settings}"

    def _problem(self) -> DecodeProblem:
        return DecodeProblem(self.shape, [1, 37, self.shape.context], self.dtype, 0)

    def run(self) -> mx.array:
        (result,) = PAGED_DECODE.variants[DecodeVariant.PAGED_KERNEL].run(
            self._problem(), self.settings
        )
        return result

    def check(self) -> None:
        (expected,) = self._problem().expected()
        error = np.abs(to_float64(self.run()) - expected).max()
        assert error <= LIMITS[self.dtype] * np.abs(expected).max()
