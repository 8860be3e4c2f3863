"""The steps of one engine, timed: decodes, prompts, and prompts beside decodes.

Also a program: `python -P engine_steps.py SETTINGS` starts an engine, writes a line when it is
ready, and then, for each line that it reads, times everything once and writes the times. Run by its
path under another version of Quire it times that one, so of Quire it imports only what an engine
needs.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.engine.messages import GenerateRequest, SamplingParams, WorkerConfig
from quire.engine.startup.boot import prepare_mlx
from quire.loadtest.cuda_kernels import KernelRecords, KernelTime, by_kernel

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.engine.startup.start import Startup

WARM_UP = 8  # steps
_RECORDED_STEPS = 10
PROMPT_RUNS = 10
_SWITCH_INTERVAL = 100e-6  # seconds, a worker's
MAX_TOKEN = 200  # in every model's vocabulary

Times = dict[str, list[float]]  # milliseconds, by what was run
Memory = dict[str, int]  # bytes


@dataclass(frozen=True)
class Plan:
    """What is timed. A mixed step is one of ``batch`` decodes and a whole prompt."""

    decode: list[tuple[int, int]] = field(default_factory=list)  # batch and context
    prompts: list[list[int]] = field(default_factory=list)  # lengths of those of one step
    mixed: list[tuple[int, int, int]] = field(default_factory=list)  # batch, context, prompt
    steps: int = 60
    prompt_runs: int = PROMPT_RUNS

    def worker_config(self, model: str, kv_cache_memory: int | None = None) -> WorkerConfig:
        batches = [batch for batch, *_ in [*self.decode, *self.mixed]]
        largest = max([*batches, *map(len, self.prompts), 63]) + 1
        whole = [*map(sum, self.prompts), *(batch + prompt for batch, _, prompt in self.mixed)]
        return WorkerConfig(
            model,
            "",
            "",
            max_num_seqs=largest,
            max_num_batched_tokens=max([*whole, largest + 1, 512]),
            kv_cache_memory=kv_cache_memory,
        )


class EngineSteps:
    """
    Attributes:
        kernels: how long each ran in a step, by what was run, if they were recorded.
    """

    def __init__(
        self, startup: Startup, plan: Plan, record: Callable[[], KernelRecords] | None = None
    ) -> None:
        """With ``record`` everything is run once more, behind all that is timed: CUPTI,
        once loaded, may keep the host longer at each kernel."""
        self.engine: Engine = startup.engine
        self.kernels: dict[str, list[KernelTime]] = {}
        self._record = record
        self.plan = plan
        _lift_limit(self.engine)
        self._draw = random.Random(0)
        self._next_id = 0

    def measure(self) -> tuple[Times, Memory]:
        """Every step of the plan, and the device's peak memory in each.

        Where steps are encoded ahead another thread does that, as in a worker.
        """
        from quire.engine.device_thread import DeviceThread

        if not self.engine.encodes_ahead:
            return self._measure()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        device: DeviceThread = DeviceThread()
        self.engine.encode_on(device)
        return device.run_beside(self._measure)

    def _measure(self) -> tuple[Times, Memory]:
        import mlx.core as mx

        times: Times = {}
        peaks: Memory = {}
        for name, step, count in self._steps():
            mx.reset_peak_memory()
            times[name] = time_calls(step, count)
            peaks[f"peak, {name}"] = mx.get_peak_memory()
        if self._record is not None:
            records = self._record()
            for name, step, _ in self._steps():
                self.kernels[name] = self._recorded(records, step)
        return times, peaks

    def _steps(self) -> Iterator[tuple[str, Callable[[], object], int]]:
        """What is run, by its name, and how often, while the engine is ready for it."""
        for batch, context in self.plan.decode:
            ids = self._decoding(batch, context)
            yield f"decode {batch}x{context}", self.engine.step, self.plan.steps
            self._drain(ids)
        for batch, context, length in self.plan.mixed:
            ids = self._decoding(batch, context)
            step = partial(self._step_with, length)
            yield f"mixed {batch}x{context}+{length}", step, self.plan.steps
            self._drain(ids)
        for lengths in self.plan.prompts:
            step = partial(self._whole, lengths)
            yield f"prompts {name_of(lengths)}", step, self.plan.prompt_runs

    def _recorded(self, records: KernelRecords, step: Callable[[], object]) -> list[KernelTime]:
        import mlx.core as mx

        with records.recording() as take:
            step()
            take()
            for _ in range(_RECORDED_STEPS):
                step()
            mx.synchronize()
            return by_kernel(take(), _RECORDED_STEPS)

    def _submit(self, lengths: Sequence[int], max_tokens: int) -> list[int]:
        ids = []
        for length in lengths:
            prompt = [self._draw.randrange(MAX_TOKEN) for _ in range(length)]
            sampling = SamplingParams(temperature=0)
            self.engine.submit(GenerateRequest(self._next_id, prompt, max_tokens, sampling))
            ids.append(self._next_id)
            self._next_id += 1
        return ids

    def _decoding(self, batch: int, context: int) -> list[int]:
        """That many sequences of which each has its first token."""
        ids = self._submit([context] * batch, self.plan.steps + 100)
        for _ in range(self.plan.steps + 100):
            if len(self.engine.step()) >= batch:
                return ids
        raise RuntimeError(
            f"{batch} sequences of {context} tokens never decoded together: does the KV cache, "
            "states included, hold them?"
        )

    def _step_with(self, length: int) -> None:
        self._submit([length], 1)
        self.engine.step()

    def _whole(self, lengths: Sequence[int]) -> None:
        self._submit(lengths, 1)
        while self.engine.has_work:
            self.engine.step()

    def _drain(self, ids: Sequence[int]) -> None:
        for each in ids:
            self.engine.abort(each)
        while self.engine.has_work:
            self.engine.step()


def _lift_limit(engine: Engine) -> None:
    """Let a step that also decodes hold a prompt whole, however long the decodes wait for it."""
    engine.scheduler.limits.mixed_prompt_tokens = None


def time_calls(step: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each call, after a few that are not counted."""
    for _ in range(WARM_UP if count > WARM_UP else 1):
        step()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return times


def name_of(lengths: Sequence[int]) -> str:
    same = len(set(lengths)) == 1 and len(lengths) > 1
    return f"{len(lengths)}x{lengths[0]}" if same else "+".join(map(str, lengths))


def settings(model: str, plan: Plan, kv_cache_memory: int | None) -> str:
    """The program's argument."""
    return json.dumps({"model": model, "kv_cache_memory": kv_cache_memory, "plan": asdict(plan)})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    blas = prepare_mlx()
    from quire.engine.startup.start import start_engine

    plan = Plan(**given["plan"])
    began = time.perf_counter()
    config = plan.worker_config(given["model"], given["kv_cache_memory"])
    startup = start_engine(config, [], lambda stage, done, total: None)
    steps = EngineSteps(startup, plan)
    ready = startup.ready
    _say(
        {
            "blas": blas,
            "start_s": time.perf_counter() - began,
            "weights": ready.weight_bytes,
            "pages": ready.kv_cache_bytes,
        }
    )
    for _ in sys.stdin:
        times, peaks = steps.measure()
        _say({"ms": times, "memory": peaks})


if __name__ == "__main__":
    main()
