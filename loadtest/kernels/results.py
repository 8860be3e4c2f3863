"""Results of ``quire bench kernels``: JSON with every sample."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from quire.loadtest.environment import Environment
from quire.loadtest.result_file import FORMAT_VERSION, load


class VariantResult(msgspec.Struct):
    """One way of doing a case. The samples are microseconds per call."""

    name: str
    is_baseline: bool  # others are compared with it
    bytes_moved: int
    latency_us: list[float] = []  # each call evaluated alone
    throughput_us: list[float] = []  # many calls, then one wait
    host_us: list[float] = []  # building one call's graph and handing it over
    calls_per_sample: int = 0  # of throughput_us
    difference: float | None = None  # from the first baseline, relative to its largest value
    failure: str | None = None  # why there are no samples, or why they cannot be trusted

    @property
    def latency(self) -> float:
        return statistics.median(self.latency_us)

    @property
    def throughput(self) -> float:
        return statistics.median(self.throughput_us)

    @property
    def host(self) -> float:
        return statistics.median(self.host_us)

    @property
    def gb_per_s(self) -> float:
        return self.bytes_moved / self.throughput / 1e3


class CaseResult(msgspec.Struct):
    """One operation at one shape.

    Throughput is ``chained``: each call takes the result of the one before, in one graph that is
    built before the clock starts. In older files it may be of calls handed over one by one.
    """

    operation: str
    name: str
    labels: dict[str, int | str]
    flops: int
    variants: list[VariantResult]
    chained: bool = False

    def variant(self, name: str) -> VariantResult | None:
        """The variant of that name, if it has figures."""
        return next((v for v in self.variants if v.name == name and not v.failure), None)

    def is_baseline(self, name: str) -> bool:
        return any(v.name == name and v.is_baseline for v in self.variants)

    def speed_against(self, baseline: str, variant: VariantResult) -> float | None:
        """How many times as fast as ``baseline`` the variant is, by throughput."""
        other = self.variant(baseline)
        return None if other is None or variant.failure else other.throughput / variant.throughput


class KernelsResult(msgspec.Struct, tag="kernels", tag_field="kind"):
    """All operations on one device, in one run."""

    device: str  # cpu, metal or cuda
    chip: str
    copy_gb_per_s: float  # of a large copy, reads and writes counted
    quick: bool
    runs: int  # samples of each figure
    cases: list[CaseResult]
    skipped: list[str]  # cases that do not fit in memory
    blas: str | None  # loaded for products on the CPU; None leaves MLX's own
    environment: Environment
    command: str
    format_version: int = FORMAT_VERSION

    @property
    def failures(self) -> list[str]:
        return [
            f"{case.operation} {case.name} {variant.name}: {variant.failure}"
            for case in self.cases
            for variant in case.variants
            if variant.failure
        ]


def load_kernels(path: Path) -> KernelsResult:
    """Read a result. Raises :class:`ResultError` naming the file and what is wrong."""
    result: KernelsResult = load(path, KernelsResult, "kernel benchmark")
    return result
