"""Result files: JSON with a format version, read back with :func:`load_result`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from quire.loadtest.environment import Environment
from quire.loadtest.records import RequestRecord
from quire.loadtest.result_file import FORMAT_VERSION, load
from quire.loadtest.stats import Distribution, LoadSummary
from quire.loadtest.workloads import WorkloadSpec


class LoadResult(msgspec.Struct, tag="load", tag_field="kind"):
    """One workload on one server."""

    model: str
    server: str | None  # the Server header
    workload: WorkloadSpec
    clients: int
    warmup: int
    temperature: float
    ignore_eos: bool
    summary: LoadSummary
    records: list[RequestRecord]
    environment: Environment
    command: str
    format_version: int = FORMAT_VERSION
    prefix_cache: bool = True  # False: every request had a cache_salt of its own


class StallResult(msgspec.Struct, tag="stall", tag_field="kind"):
    """What a long prompt does to the streams that are already running, on one server."""

    model: str
    server: str | None
    streams: int
    prompt_chars: int
    prompt_tokens: int | None  # from the usage block
    long_ttft_ms: float
    gap_before_ms: Distribution  # between chunks of the running streams, before the prompt is sent
    longest_gap_ms: float  # of any running stream, from then until the prompt's first token
    longest_gap_by_stream_ms: list[float]
    records: list[RequestRecord]  # the running streams, then the long prompt
    environment: Environment
    command: str
    format_version: int = FORMAT_VERSION


class ServerSetup(msgspec.Struct, frozen=True):
    """How a server under comparison was started."""

    name: str
    command: str
    preload: str | None  # LD_PRELOAD
    blas_core: str | None = None  # OPENBLAS_CORETYPE, the same for both servers


class ComparedRun(msgspec.Struct):
    """One run on a freshly started server.

    ``failure`` says why ``result`` is missing, or why it cannot be trusted.
    """

    server: str
    workload: str
    round: int
    seed: int
    result: LoadResult | StallResult | None = None
    failure: str | None = None


class CompareResult(msgspec.Struct, tag="compare", tag_field="kind"):
    """The same traffic on several servers, alternating, each run on a freshly started server."""

    servers: list[ServerSetup]
    runs: list[ComparedRun]
    environment: Environment
    command: str
    format_version: int = FORMAT_VERSION


Result = LoadResult | StallResult | CompareResult


def load_result(path: Path) -> Result:
    """Read a result file. Raises :class:`ResultError` naming the file and what is wrong."""
    result: Result = load(path, Result, "load test result")
    return result
