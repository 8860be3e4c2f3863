"""One query per sequence over its pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from quire.kernels.attention_problem import (
    BY_SDPA,
    WIDE_LIMITS,
    PagedProblem,
    Pages,
    fits_memory,
    head_numbers,
    spread,
    surveyed_shapes,
    windows,
)
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, ints
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    Default,
    Group,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.decode_plan import DecodePlan, DecodeSettings, default_settings, plan_on_device
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import fits_lanes, paged_decode
from quire.kernels.ragged import DecodeGroup, RaggedBatch


class DecodeVariant(Enum):
    PAGED_KERNEL = "paged_kernel"
    REFERENCE = "reference"


class DecodeShape(NamedTuple):
    rows: int
    context: int  # tokens that a row sees, on average
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    window: bool = False
    sinks: bool = False
    softcap: bool = False
    extra_dim: int = 0  # of keys beside those whose pages hold the values too

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> DecodeShape:
        """Key heads count as rows: to a device, rows x key heads is what there is to share out."""
        rows, context = round_up(self.rows * self.kv_heads), round_up(self.context)
        return DecodeShape(rows, context, self.group, 1, *self[4:])


class DecodeProblem(PagedProblem):
    def __init__(
        self, shape: DecodeShape, lengths: Sequence[int], dtype: mx.Dtype, seed: int
    ) -> None:
        self.shape = shape
        self.pages = Pages(shape, lengths, dtype, seed, len(lengths))
        self.num_bytes = self.pages.num_bytes
        self.flops = 4 * sum(lengths) * shape.heads * shape.key_dim
        self.lengths = np.array(lengths, np.int32)
        self.tables = ints(self.pages.tables)
        mx.eval(self.tables)
        self.batch = RaggedBatch([DecodeGroup(0, self.lengths, self.pages.tables)], [])
        self.default = default_settings(
            self.lengths, self.pages.window, shape.kv_heads, shape.group
        )
        self._plans: dict[DecodeSettings, DecodePlan] = {}

    def plan(self, settings: Settings) -> DecodePlan:
        """A step has one for all of its layers: it is not part of what is timed."""
        chosen = self.default._replace(**settings)
        if chosen not in self._plans:
            self._plans[chosen] = plan_on_device(self.lengths, self.pages.window, chosen)
        return self._plans[chosen]

    def expected(self) -> list[Float64Array]:
        return self.pages.last_rows()


def _in_pages(problem: DecodeProblem, settings: Settings) -> list[mx.array]:
    pages = problem.pages
    output = paged_decode(
        pages.queries,
        pages.arrays,
        problem.tables,
        problem.plan(settings),
        pages.scoring,
        extra=pages.extra,
    )
    return [output]


def _reference(problem: DecodeProblem, settings: Settings) -> list[mx.array]:
    pages = problem.pages
    batch, scoring = problem.batch, pages.scoring
    return [paged_attention(pages.queries, pages.arrays, batch, scoring, pages.extra)]


def fits_decode(shape: DecodeShape, dtype: str) -> bool:
    """Whether the keys that a simdgroup loads at a time lie in one block."""
    dims = (shape.key_dim, shape.value_dim)
    return fits_lanes(dims, getattr(mx, dtype), shape.block_size)


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[DecodeShape]:
    if sizes.attention is None:
        return
    on_cpu = device == "cpu"
    for window in windows(sizes.attention):
        for rows in (1, 8) if on_cpu else (1, 4, 16, 64):
            for context in (512, 2048) if on_cpu else (1024, 4096, 16384):
                if fits_memory(sizes.attention, sizes.dtype, rows * context, device):
                    numbers = head_numbers(sizes.attention, block_size)
                    yield DecodeShape(rows, context, *numbers, window=window)


_COMMON = DecodeShape(8, 1024, 32, 8, 128, 128, 16)

PAGED_DECODE = Spec(
    name="paged_decode",
    shape=DecodeShape,
    variants={
        DecodeVariant.PAGED_KERNEL: Variant(
            _in_pages,
            limits={**WIDE_LIMITS, "extra_dim": Limit(max=64, multiple_of=8)},
            fits=fits_decode,
            settings={
                "simdgroups": (2, 4, 8),
                "unroll_keys": (2, 4, 8),
                "split": (128, 256, 512, 1024, 2048, 4096),
            },
        ),
        DecodeVariant.REFERENCE: Variant(_reference, Kind.STEPS, ANYWHERE),
    },
    reference=DecodeVariant.REFERENCE,
    defaults=(Default(DecodeVariant.PAGED_KERNEL, GPUS),),
    problem=lambda shape, dtype, seed, ragged: DecodeProblem(
        shape, spread(shape.context, shape.rows, ragged), dtype, seed
    ),
    # Odd groups, unequal head sizes, partly filled blocks, contexts cut in several pieces.
    checked=(
        DecodeShape(3, 300, 8, 2, 128, 128, 16),
        DecodeShape(2, 70, 4, 4, 64, 64, 8, window=True),
        DecodeShape(3, 90, 14, 2, 96, 96, 32, sinks=True),
        DecodeShape(2, 50, 16, 1, 192, 128, 16),
        DecodeShape(2, 40, 4, 2, 256, 256, 16, softcap=True),
        DecodeShape(2, 60, 10, 2, 512, 512, 16),
        DecodeShape(3, 90, 5, 1, 512, 512, 16, extra_dim=64),
    ),
    surveyed={
        **surveyed_shapes(_COMMON),
        "Qwen3.5 9B, 64 rows": DecodeShape(64, 1024, 16, 4, 256, 256, 16),
        "latent attention": _COMMON._replace(kv_heads=1, key_dim=512, value_dim=512, extra_dim=64),
        **{f"block_size {n}": _COMMON._replace(block_size=n) for n in (4, 8, 16, 32, 64)},
    },
    tuned=_tuned,
    baselines=BY_SDPA,
    group=Group.PAGES,
    untimed=("sinks", "softcap"),
)
