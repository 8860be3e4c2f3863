"""A soak: a mixed load on `quire serve` for hours, to see whether anything grows or is lost.

`python -m quire.loadtest.soak --minutes 120 --out soak.json --plot soak.svg` leaves one worker
alone. With `--faults` there are two models of which one fits at a time: they are swapped and
unloaded by hand, and a worker is killed every five minutes. Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import ServerError
from quire.loadtest.environment import Environment
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.servers import ServerProcess, ServerSpec, copy_demo, find_openblas, running
from quire.loadtest.soak_faults import ADMIN_KEY, Faults, Pace
from quire.loadtest.soak_plot import save_plot
from quire.loadtest.soak_samples import Sample, Sampler
from quire.loadtest.soak_traffic import Tally, Traffic
from quire.loadtest.soak_verdict import Check, Trend, flat, same_counts, same_tokens, trends

_MODELS = "quire-demo", "other"
_MAX_RUNNING = 12  # requests
_READY_SECONDS = 300.0
_SETTLE_SECONDS = 120.0


class Options(msgspec.Struct, frozen=True):
    minutes: float
    rate: float  # requests a second
    every: float  # seconds between samples
    warmup: float  # minutes that are not judged
    seed: int
    faults: bool
    kill_every: float  # minutes
    swap_every: float  # seconds, on average


class SoakResult(msgspec.Struct, tag="soak", tag_field="kind"):
    command: str
    minutes: float  # that it took
    tally: Tally
    faults: dict[str, int]  # what was done to the server
    trends: list[Trend]
    checks: list[Check]
    samples: list[Sample]
    environment: Environment
    format_version: int = FORMAT_VERSION


async def soak(options: Options) -> SoakResult:
    """Raises ServerError where the server does not start, and OSError where there is no /proc."""
    with tempfile.TemporaryDirectory() as folder:
        folders = copy_demo(Path(folder), _MODELS) if options.faults else {}
        with running(_spec(folders)) as server:
            return await _soak(options, server, folders)


def _spec(folders: Mapping[str, Path]) -> ServerSpec:
    command = [sys.executable, "-m", "quire.serve.cli", "serve", "--kv-cache-memory", "16MiB"]
    if folders:
        command += ["--model", str(folders[_MODELS[0]]), "--max-loaded-models", "1"]
        command += ["--models", f"{_MODELS[1]}={folders[_MODELS[1]]}", "--admin-key", ADMIN_KEY]
    return ServerSpec("quire", tuple(command), model=_MODELS[0], preload=find_openblas())


async def _soak(options: Options, server: ServerProcess, folders: dict[str, Path]) -> SoakResult:
    key = ADMIN_KEY if options.faults else ""
    traffic = Traffic(server.base, _MODELS[0], options.seed, key, workers_die=options.faults)
    await _wait_ready(server, traffic)
    sampler = Sampler(server.base, server.pid, traffic.headers)
    before = await sampler.scrape()
    pace = Pace(options.kill_every * 60, options.swap_every)
    faults = Faults(traffic, server.base, server.pid, folders, pace)
    samples: list[Sample] = []
    tasks = [asyncio.create_task(_sample(sampler, options.every, samples))]
    if options.faults:
        tasks.append(asyncio.create_task(faults.run()))
    began = time.monotonic()
    try:
        await _send_all(traffic, options)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    minutes = (time.monotonic() - began) / 60
    checks = [Check("beside the load", False, repr(e)) for e in ended if isinstance(e, Exception)]
    after = await _settle(sampler)
    counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
    judged = [sample for sample in samples if sample.seconds >= options.warmup * 60]
    # Workers and their models' helpers come and go with the faults.
    roles = ("front end",) if options.faults else ("front end", "worker", "helper")
    found = trends(judged, roles)
    checks += [*flat(found), *same_counts(traffic.tally, counted, sampler.scrapes - 1)]
    if not options.faults:
        checks += same_tokens(traffic.tally, counted)
    checks += await _works(traffic, options)
    exited = server.exit_message()
    checks.append(Check("the server runs", exited is None, exited or ""))
    samples.append(await sampler.sample())
    return SoakResult(
        command=shlex.join(["python", "-m", "quire.loadtest.soak", *sys.argv[1:]]),
        minutes=round(minutes, 1),
        tally=traffic.tally,
        faults=dict(faults.done),
        trends=found,
        checks=checks,
        samples=samples,
        environment=environment.describe(),
    )


async def _wait_ready(server: ServerProcess, traffic: Traffic) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    status = 0
    while status != 200:
        if (message := server.exit_message()) is not None or time.monotonic() > deadline:
            raise ServerError(message or f"not ready in {_READY_SECONDS:g} s")
        with suppress(OSError):
            status = await traffic.still_answers()
        await asyncio.sleep(0.2)


async def _send_all(traffic: Traffic, options: Options) -> None:
    """Requests at random moments, whatever becomes of those before; waits for the last ones."""
    draw = Random(options.seed)
    end = time.monotonic() + options.minutes * 60
    tasks: set[asyncio.Task[None]] = set()
    while time.monotonic() < end:
        await asyncio.sleep(draw.expovariate(options.rate))
        if len(tasks) >= _MAX_RUNNING:
            traffic.tally.skipped += 1
            continue
        tasks.add(task := asyncio.create_task(traffic.one()))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def _sample(sampler: Sampler, every: float, samples: list[Sample]) -> None:
    while True:
        samples.append(await sampler.sample())
        await asyncio.sleep(every)


async def _settle(sampler: Sampler) -> dict[str, float]:
    """The series once no request is left. Raises ServerError if that never happens."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        await asyncio.sleep(2.0)
        series = await sampler.scrape()
        names = "quire_requests_running", "quire_requests_waiting", 'quire_kv_blocks{state="used"}'
        if not any(series[name] for name in names):
            return series
    raise ServerError(f"requests are left {_SETTLE_SECONDS:g} s after the last client has gone")


async def _works(traffic: Traffic, options: Options) -> list[Check]:
    """Whether each model answers once all is over, and what was wrong before."""
    problems = traffic.tally.problems
    checks = [Check("every answer is as it must be", not problems, "; ".join(problems[:5]))]
    for model in _MODELS if options.faults else _MODELS[:1]:
        traffic.model = model
        status = await traffic.still_answers()
        checks.append(Check(f"{model} answers in the end", status == 200, f"status {status}"))
    return checks


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second (1)")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between samples (20)")
    parser.add_argument("--warmup", type=float, default=10.0, help="minutes not judged (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true", help="two models, swaps and kills")
    parser.add_argument("--kill-every", type=float, default=5.0, help="minutes (5)")
    parser.add_argument("--swap-every", type=float, default=37.5, help="seconds (37.5)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    parser.add_argument("--plot", type=Path, help="SVG or PNG (needs matplotlib)")
    return parser.parse_args()


def main() -> int:
    """Returns 1 if a check does not hold."""
    arguments = vars(_arguments())
    out, plot = arguments.pop("out"), arguments.pop("plot")
    options = Options(**arguments)
    result = asyncio.run(soak(options))
    if out is not None:
        save(out, result)
    if plot is not None:
        title = f"{result.minutes:g} minutes, {sum(result.tally.kinds.values()):,} requests"
        save_plot(plot, result.samples, title)
    for trend in result.trends:
        print(
            f"{trend.name}: {trend.first:.1f} to {trend.last:.1f} ({trend.change:+.1%}), "
            f"{trend.least:.1f} to {trend.most:.1f} in all"
        )
    for check in result.checks:
        print(f"{'yes' if check.holds else 'NO '}  {check.name}: {check.what}")
    return 0 if all(check.holds for check in result.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
