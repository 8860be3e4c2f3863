"""Whether a soak shows that nothing grew and nothing was lost."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import msgspec

from quire.loadtest.soak_samples import ProcessSample, Sample
from quire.loadtest.soak_traffic import Tally

ALLOWED = 0.02
_PARTS = 10  # the first and the last tenth of the samples are compared


class Trend(msgspec.Struct):
    """A quantity after the warm-up: medians of the first and of the last samples, and extremes."""

    name: str
    first: float
    last: float
    least: float
    most: float

    @property
    def change(self) -> float:
        return self.last / self.first - 1 if self.first else 0.0


class Check(msgspec.Struct):
    name: str
    holds: bool
    what: str


def trends(samples: Sequence[Sample], roles: Sequence[str]) -> list[Trend]:
    """Of samples after the warm-up, oldest first; sizes in MiB."""
    kinds: dict[str, Callable[[ProcessSample], float]] = {
        "memory": lambda process: process.anonymous / 1024,
        "resident": lambda process: process.rss / 1024,
        "threads": lambda process: process.threads,
        "descriptors": lambda process: process.descriptors,
    }
    found: list[Trend] = []
    for role in roles:
        for kind, of in kinds.items():
            values = [sum(map(of, own)) for sample in samples if (own := sample.of(role))]
            found += _trend(f"{role}: {kind}", values)
    found += _trend("step, ms", [s.step_ms for s in samples if s.step_ms is not None])
    if "worker" in roles:
        found += _trend("step, ms of a CPU", [*_cpu_of_steps(samples)])
    return found


def _cpu_of_steps(samples: Sequence[Sample]) -> Iterator[float]:
    """ms a step that the worker computed, between samples: what else the machine does counts
    little."""
    for before, after in pairwise(samples):
        steps = after.series["quire_steps_total"] - before.series["quire_steps_total"]
        workers = before.of("worker"), after.of("worker")
        if steps > 0 and all(workers) and workers[0][0].pid == workers[1][0].pid:
            yield 1e3 * (workers[1][0].cpu_seconds - workers[0][0].cpu_seconds) / steps


def _trend(name: str, values: Sequence[float]) -> Iterator[Trend]:
    if values:
        part = max(1, len(values) // _PARTS)
        first, last = statistics.median(values[:part]), statistics.median(values[-part:])
        yield Trend(name, first, last, min(values), max(values))


def flat(found: Sequence[Trend]) -> Iterator[Check]:
    """Memory, threads and descriptors; times depend on what else the machine does."""
    for trend in found:
        what = f"{trend.first:.1f} then {trend.last:.1f} ({trend.change:+.1%})"
        if trend.name.endswith("memory"):
            yield Check(trend.name, abs(trend.change) <= ALLOWED, what)
        elif trend.name.endswith(("threads", "descriptors")):
            # A connection more or less is open at the moment of a sample.
            yield Check(trend.name, abs(trend.last - trend.first) <= 2, what)


def same_counts(tally: Tally, counted: dict[str, float], scrapes: int) -> Iterator[Check]:
    """Clients' counts beside the server's; ``counted`` has what each series grew by.

    ``scrapes`` are those of the sampler.
    """
    seen = dict(tally.responses)
    key = "GET /metrics 200"
    seen[key] = seen.get(key, 0) + scrapes
    served = dict(_responses(counted))
    differing = {k: (seen.get(k, 0), served.get(k, 0)) for k in seen.keys() | served.keys()}
    differing = {key: pair for key, pair in differing.items() if pair[0] != pair[1]}
    total = sum(seen.values())
    yield Check("HTTP answers", not differing, f"{total} of them; other: {differing or 'none'}")
    left = counted["quire_client_disconnects_total"]
    what = f"clients {tally.hang_ups}, server {left:g}"
    yield Check("clients that left", left == tally.hang_ups, what)


def same_tokens(tally: Tally, counted: dict[str, float]) -> Iterator[Check]:
    """Like :func:`same_counts`, where no worker died; what nobody saw leaves a range."""
    name = 'quire_requests_total{finish_reason="%s"}'
    served = {r: counted[name % r] for r in ("stop", "length", "abort", "error")}
    equal = all(tally.finishes.get(reason, 0) == count for reason, count in served.items())
    yield Check("finish reasons", equal, f"clients {tally.finishes}, server {served}")
    for what, count, seen, unseen in (
        ("prompt", "prompt_tokens", tally.prompt_tokens, tally.unseen_prompt_tokens),
        ("generated", "generated_tokens", tally.generated_tokens, tally.unseen_tokens),
    ):
        own = counted[f"quire_{count}_total"]
        text = f"clients {seen} to {seen + unseen}, server {own:g}"
        yield Check(f"{what} tokens", seen <= own <= seen + unseen, text)


def _responses(counted: dict[str, float]) -> Iterator[tuple[str, int]]:
    for name, count in counted.items():
        if name.startswith("quire_http_requests_total") and count:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
            yield f"{labels['method']} {labels['route']} {labels['code']}", int(count)
