"""What a server and its processes take, read from Linux's /proc and from /metrics."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from quire.loadtest.http import BaseURL, send

_TICKS = os.sysconf("SC_CLK_TCK")
KEPT = (
    *("quire_requests_running", "quire_requests_waiting", "quire_steps_total"),
    *('quire_memory_bytes{kind="active"}', 'quire_memory_bytes{kind="cache"}'),
    *('quire_memory_bytes{kind="peak"}', "quire_worker_restarts_total"),
)
_SAMPLE = re.compile(r"(\w+)(\{.*\})? (\S+)")


class ProcessSample(msgspec.Struct):
    """One process. Sizes in KiB, as in /proc/PID/smaps_rollup."""

    role: str  # "front end", "worker" or "helper"
    pid: int
    rss: int
    pss: int
    anonymous: int
    threads: int
    descriptors: int
    cpu_seconds: float


class Sample(msgspec.Struct):
    seconds: float  # since the soak began
    processes: list[ProcessSample]
    series: dict[str, float]  # those of KEPT, summed over models
    step_ms: float | None  # mean of the steps since the last sample; None where there was none

    def of(self, role: str) -> list[ProcessSample]:
        return [process for process in self.processes if process.role == role]


class Sampler:
    """Samples of the server whose front end is process ``pid``.

    Raises OSError where there is no /proc.
    """

    def __init__(self, base: BaseURL, pid: int, headers: Mapping[str, str]) -> None:
        self._base = base
        self._headers = headers
        self._pid = pid
        self._began = time.monotonic()
        self._steps = self._step_seconds = 0.0
        self.scrapes = 0

    async def scrape(self) -> dict[str, float]:
        """All series but buckets, without the label of the model, over which they are summed."""
        self.scrapes += 1
        async with send(self._base, "GET", "/metrics", headers=self._headers) as response:
            text = (await response.read()).decode()
        series: dict[str, float] = {}
        for line in text.splitlines():
            if (found := _SAMPLE.fullmatch(line)) and not found[1].endswith("_bucket"):
                labels = re.sub(r'model="[^"]*",?', "", found[2] or "").replace(",}", "}")
                name = found[1] + labels.replace("{}", "")
                series[name] = series.get(name, 0.0) + float(found[3])
        return series

    async def sample(self) -> Sample:
        series = await self.scrape()
        steps = series["quire_step_duration_seconds_count"]
        seconds = series["quire_step_duration_seconds_sum"]
        # A new worker counts from 0.
        ran, took = steps - self._steps, seconds - self._step_seconds
        step_ms = 1e3 * took / ran if ran > 0 and took > 0 else None
        self._steps, self._step_seconds = steps, seconds
        processes = [_read(pid, role) for pid, role in family(self._pid).items()]
        found = [process for process in processes if process is not None]
        kept = {name: series[name] for name in KEPT}
        return Sample(round(time.monotonic() - self._began, 1), found, kept, step_ms)


def family(pid: int) -> dict[int, str]:
    """The front end, its workers and its helpers, by process id."""
    roles = {pid: "front end"}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        roles[int(child)] = "worker" if b"quire.engine.worker" in command else "helper"
    return roles


def _read(pid: int, role: str) -> ProcessSample | None:
    """None if the process is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        memory = (folder / "smaps_rollup").read_text()
        threads = len(os.listdir(folder / "task"))
        descriptors = len(os.listdir(folder / "fd"))
        times = (folder / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {name: int(kib) for name, kib in re.findall(r"(\w+): +(\d+) kB", memory)}
    if "Rss" not in sizes:
        return None  # a zombie
    cpu = (int(times[11]) + int(times[12])) / _TICKS  # utime and stime
    anonymous = sizes.get("Anonymous", 0)
    return ProcessSample(
        role, pid, sizes["Rss"], sizes["Pss"], anonymous, threads, descriptors, cpu
    )
