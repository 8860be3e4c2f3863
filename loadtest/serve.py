"""One workload on a server that is already running."""

from __future__ import annotations

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import Target, find_model, probe
from quire.loadtest.http import BaseURL
from quire.loadtest.load import run_load
from quire.loadtest.results import LoadResult
from quire.loadtest.stats import summarize
from quire.loadtest.workloads import WorkloadSpec, conversations

# Warm-up prompts come from a seed no one passes, so they leave nothing useful in a prefix cache.
WARMUP_SEED_OFFSET = 1 << 32


class LoadOptions(msgspec.Struct, frozen=True):
    workload: WorkloadSpec
    clients: int = 8
    warmup: int = 0  # requests sent before the measurement
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout: float = 600.0  # seconds for one request
    prefix_cache: bool = True  # False: a salt for each request, so that none finds another's prefix
    count_cacheable: bool = False  # of prompts' tokens; asks for token ids


async def find_target(
    base: BaseURL,
    model: str | None,
    options: LoadOptions,
    headers: dict[str, str] | None = None,
) -> tuple[Target, str | None]:
    """A target that has answered one request, and the server's Server header.

    Raises :class:`quire.loadtest.chat.ServerError` where it does not answer one.
    """
    target = Target(
        base=base,
        model=model or await find_model(base, headers or {}),
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        token_ids=options.count_cacheable,
        own_salts=not options.prefix_cache,
        timeout=options.timeout,
        headers=headers or {},
    )
    target, received = await probe(target)
    return target, received.get("server")


async def measure_load(target: Target, server: str | None, options: LoadOptions) -> LoadResult:
    """Warm up, run the workload, and summarize it; ``server`` is the Server header to record.

    Raises ValueError for an impossible workload. Requests that fail are counted in the result.
    """
    spec = options.workload
    if options.clients < 1:
        raise ValueError("--clients must be at least 1")
    traffic = conversations(spec)
    if options.warmup:
        warmup = msgspec.structs.replace(
            spec, requests=options.warmup, seed=spec.seed + WARMUP_SEED_OFFSET
        )
        await run_load(target, conversations(warmup), options.clients)
    records, wall_s = await run_load(target, traffic, options.clients)
    return LoadResult(
        model=target.model,
        server=server,
        workload=spec,
        clients=options.clients,
        warmup=options.warmup,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        prefix_cache=options.prefix_cache,
        summary=summarize(records, wall_s, sum(len(c.turns) for c in traffic)),
        records=records,
        environment=environment.describe(),
        command=environment.command_line(),
    )
