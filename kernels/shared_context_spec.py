"""One query per sequence, of sequences that begin with the same pages."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.attention_problem import (
    BY_SDPA,
    PAGED_LIMITS,
    PagedProblem,
    Pages,
    head_numbers,
    spread,
)
from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.problem import Float64Array, ints
from quire.kernels.choice.sizes import ModelSizes
from quire.kernels.choice.spec import (
    ANYWHERE,
    GPUS,
    HALF,
    Default,
    Group,
    Kind,
    Limit,
    Settings,
    Spec,
    Variant,
    round_up,
)
from quire.kernels.decode_plan import DecodePlan, default_settings, plan_on_device
from quire.kernels.paged_attention import paged_attention
from quire.kernels.paged_decode import fits_lanes, paged_decode
from quire.kernels.ragged import DecodeGroup, RaggedBatch, SharedRun
from quire.kernels.shared_context import attend_shared, plan_shared


class SharedVariant(Enum):
    CASCADE = "cascade"  # what they share once for all of them, as rows of matrix products
    PER_ROW = "per_row"  # all of its context for each row, as if nothing were shared
    REFERENCE = "reference"


class SharedShape(NamedTuple):
    rows: int
    context: int  # tokens that all rows share
    own: int  # tokens of a row behind them, on average
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> SharedShape:
        """Key heads count as rows, as in `DecodeShape.bucket`."""
        rows = round_up(self.rows * self.kv_heads)
        context, own = round_up(self.context), round_up(self.own)
        return SharedShape(rows, context, own, self.group, 1, *self[5:])


class SharedProblem(PagedProblem):
    def __init__(self, shape: SharedShape, dtype: mx.Dtype, seed: int, ragged: bool) -> None:
        """The whole blocks of ``context``, at least one, and behind them ``own`` tokens of each
        row, or ``ragged``: of all lengths up to it."""
        self.shape = shape
        blocks = max(1, shape.context // shape.block_size)
        own = np.array(spread(shape.own, shape.rows, ragged))
        self.lengths = (blocks * shape.block_size + own).astype(np.int32)
        self.pages = Pages(shape, self.lengths.tolist(), dtype, seed, shape.rows, blocks)
        self.num_bytes = self.pages.num_bytes
        self.flops = 4 * int(self.lengths.sum()) * shape.heads * shape.key_dim
        self.tables = ints(self.pages.tables)
        mx.eval(self.tables)
        # A step has one plan for all of its layers: it is not part of what is timed.
        run = SharedRun(0, shape.rows, blocks * shape.block_size)
        self.plans = {
            SharedVariant.CASCADE: _plan(shape, self.lengths, [run]),
            SharedVariant.PER_ROW: _plan(shape, self.lengths, []),
        }
        group = DecodeGroup(0, self.lengths, self.pages.tables, blocks)
        self.batch = RaggedBatch([group], [])

    def expected(self) -> list[Float64Array]:
        return self.pages.last_rows()

    def decode(self, variant: SharedVariant) -> list[mx.array]:
        pages = self.pages
        plan, scoring = self.plans[variant], pages.scoring
        decoding = pages.queries, pages.arrays, self.tables, plan, scoring
        return [paged_decode(*decoding, shared=attend_shared(*decoding))]


def _plan(shape: SharedShape, lengths: npt.NDArray[np.int32], runs: list[SharedRun]) -> DecodePlan:
    """As the engine plans a step: what a row reads by itself decides the settings."""
    shared, own = None, lengths
    if runs:
        shared = plan_shared(runs, shape.rows, shape.heads, shape.kv_heads)
        own = lengths - shared.num_tokens
    settings = default_settings(own, None, shape.kv_heads, shape.group)
    return plan_on_device(lengths, None, settings, shared)


def _reference(problem: SharedProblem, settings: Settings) -> list[mx.array]:
    pages = problem.pages
    return [paged_attention(pages.queries, pages.arrays, problem.batch, pages.scoring)]


def _fits(shape: SharedShape, dtype: str) -> bool:
    return fits_lanes((shape.key_dim, shape.value_dim), getattr(mx, dtype), shape.block_size)


def _tuned(sizes: ModelSizes, device: DeviceName, block_size: int) -> Iterator[SharedShape]:
    if sizes.attention is not None:
        for rows in (8, 64):
            yield SharedShape(rows, 1024, 256, *head_numbers(sizes.attention, block_size))


_COMMON = SharedShape(64, 1024, 256, 32, 8, 128, 128, 16)

SHARED_CONTEXT = Spec(
    name="shared_context",
    shape=SharedShape,
    variants={
        SharedVariant.CASCADE: Variant(
            lambda problem, settings: problem.decode(SharedVariant.CASCADE),
            dtypes=HALF,
            limits=PAGED_LIMITS,
            fits=_fits,
            needs=Group.PAGES,
        ),
        SharedVariant.PER_ROW: Variant(
            lambda problem, settings: problem.decode(SharedVariant.PER_ROW),
            limits=PAGED_LIMITS,
            fits=_fits,
            needs=Group.PAGES,
        ),
        SharedVariant.REFERENCE: Variant(_reference, Kind.STEPS, ANYWHERE),
    },
    reference=SharedVariant.REFERENCE,
    # What many rows read at the same time stays in an H200's second-level cache, so `per_row` is
    # slower only for much of it: there, 32 and 8 heads of 128, bfloat16, 8 x (1,024 + 128) tokens
    # took 22.6 us, and 26.3 by `cascade` (`quire bench kernels --op shared_context --quick`).
    # On Metal nothing has been measured.
    defaults=(
        Default(
            SharedVariant.CASCADE, ("cuda",), {"rows": Limit(min=512), "context": Limit(min=1024)}
        ),
        Default(SharedVariant.PER_ROW, GPUS),
    ),
    problem=SharedProblem,
    # Own parts that are cut, that are not, and cut ones with sinks.
    checked=(
        SharedShape(3, 300, 150, 8, 2, 128, 128, 16),
        SharedShape(5, 140, 40, 14, 2, 96, 96, 32, sinks=True),
        SharedShape(9, 70, 200, 4, 2, 192, 128, 8, sinks=True),
    ),
    surveyed={"sinks": _COMMON._replace(sinks=True), "64 rows": _COMMON},
    tuned=_tuned,
    baselines=BY_SDPA,
    untimed=("sinks",),
)
