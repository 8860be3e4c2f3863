"""The engine's steps beside the bare model's: `python -m quire.loadtest.steps MODEL`.

Decoding, greedily, at some batch sizes and contexts; and prompts, whole or several in one step. The
bare model is mlx-lm's own forward pass over its own batch cache, one step ahead as mlx-lm runs it,
with no scheduler, no pages, no requests, and MLX's settings as they come. Each runs in a process
of its own, in turns, on the same BLAS. The engine's memory is given too: weights, pages, and the
peak of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.engine.messages import GenerateRequest, SamplingParams, WorkerConfig
from quire.engine.startup.boot import prepare_mlx

_WARM_UP = 8  # steps
_PROMPT_RUNS = 10
_MAX_TOKEN = 200  # in every model's vocabulary
_BARE_ROWS = 2048  # of one call that fills the bare model's cache

Times = dict[str, list[float]]  # milliseconds, by what was run
Memory = dict[str, int]  # bytes


def time_engine(args: argparse.Namespace) -> tuple[Times, Memory]:
    """Each step of :class:`Engine`: with all sequences decoding, and with prompts alone."""
    import mlx.core as mx

    from quire.engine.startup.start import start_engine

    largest = max([batch for batch, _ in args.decode] + [len(p) for p in args.prompts] + [64])
    budget = max([sum(lengths) for lengths in args.prompts] + [largest + 1, 512])
    config = WorkerConfig(
        str(args.model),
        "",
        "",
        max_num_seqs=largest,
        max_num_batched_tokens=budget,
        kv_cache_memory=args.kv_cache_memory,
    )
    startup = start_engine(config, [], lambda stage, done, total: None)
    engine, ready = startup.engine, startup.ready
    memory = {"weights": ready.weight_bytes, "pages": ready.kv_cache_bytes}
    draw, request_id = random.Random(0), 0

    def submit(lengths: list[int], max_tokens: int) -> list[int]:
        nonlocal request_id
        ids = []
        for length in lengths:
            prompt = [draw.randrange(_MAX_TOKEN) for _ in range(length)]
            sampling = SamplingParams(temperature=0)
            engine.submit(GenerateRequest(request_id, prompt, max_tokens, sampling))
            ids.append(request_id)
            request_id += 1
        return ids

    def drain(ids: list[int]) -> None:
        for each in ids:
            engine.abort(each)
        while engine.has_work:
            engine.step()

    times: Times = {}
    for batch, context in args.decode:
        ids = submit([context] * batch, args.steps + 100)
        while len(engine.step()) < batch:
            pass
        name = f"decode {batch}x{context}"
        mx.reset_peak_memory()
        times[name] = _times(engine.step, args.steps)
        memory[f"peak, {name}"] = mx.get_peak_memory()
        drain(ids)
    for lengths in args.prompts:

        def run(lengths: list[int] = lengths) -> None:
            submit(lengths, 1)
            while engine.has_work:
                engine.step()
            mx.synchronize()

        name = f"prompts {_name(lengths)}"
        mx.reset_peak_memory()
        times[name] = _times(run, _PROMPT_RUNS)
        memory[f"peak, {name}"] = mx.get_peak_memory()
    return times, memory


def time_bare(args: argparse.Namespace) -> tuple[Times, Memory]:
    """The same of mlx-lm's model: its batch step, and one prompt of as many tokens."""
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(args.model))
    times: Times = {}
    for batch, context in args.decode:
        cache: list[Any] = [BatchKVCache([0] * batch) for _ in make_prompt_cache(model)]
        piece = max(1, _BARE_ROWS // batch)
        for start in range(0, context, piece):
            tokens = mx.random.randint(0, _MAX_TOKEN, (batch, min(piece, context - start)))
            state = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
            mx.eval(state)
        before = state

        def step(cache: list[Any] = cache) -> None:
            nonlocal state, before
            before, state = state, mx.argmax(model(state, cache=cache), axis=-1)
            mx.async_eval(state)
            mx.eval(before)

        times[f"decode {batch}x{context}"] = _times(step, args.steps)
    for lengths in args.prompts:
        tokens = mx.random.randint(0, _MAX_TOKEN, (1, sum(lengths)))

        def prompt(tokens: mx.array = tokens) -> None:
            cache = make_prompt_cache(model)
            # Logits of all rows, which nobody needs, are never evaluated; nor is the last row's.
            model(tokens, cache=cache)
            mx.eval([layer.state for layer in cache])

        times[f"prompts {_name(lengths)}"] = _times(prompt, _PROMPT_RUNS)
    return times, {}


def _times(step: Callable[[], object], count: int) -> list[float]:
    for _ in range(_WARM_UP):
        step()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _print_times(runs: dict[str, list[Times]]) -> None:
    print(f"{'medians, ms':44} {'engine':>8} {'mlx-lm':>8}  mlx-lm / engine, each round")
    for name in runs["engine"][0]:
        engine = [statistics.median(run[name]) for run in runs["engine"]]
        line = f"{name:44} {statistics.median(engine):8.2f}"
        if "bare" in runs:
            bare = [statistics.median(run[name]) for run in runs["bare"]]
            ratios = [b / e for e, b in zip(engine, bare, strict=True)]
            line += f" {statistics.median(bare):8.2f}  " + " ".join(f"{r:.2f}" for r in ratios)
        print(line)


def _print_memory(memory: Memory) -> None:
    """The engine's in its last round."""
    steady = memory["weights"] + memory["pages"]
    print(f"weights {memory['weights'] / 1e9:.2f} GB, pages {memory['pages'] / 1e9:.2f} GB")
    for name, size in memory.items():
        if name.startswith("peak"):
            print(f"{name:44} {size / 1e9:.2f} GB, {size / steady - 1:+.1%} of both")


def _decode(text: str) -> tuple[int, int]:
    batch, context = text.split("x")
    return int(batch), int(context)


def _prompts(text: str) -> list[int]:
    count, _, length = text.rpartition("x")
    return [int(each) for each in length.split("+")] * int(count or 1)


def _name(lengths: list[int]) -> str:
    same = len(set(lengths)) == 1 and len(lengths) > 1
    return f"{len(lengths)}x{lengths[0]}" if same else "+".join(map(str, lengths))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.steps")
    parser.add_argument("model", help="a model folder")
    parser.add_argument(
        "--decode",
        type=_decode,
        nargs="*",
        default=[(8, 128)],
        metavar="BxC",
        help="batch and context, such as 64x2048",
    )
    parser.add_argument(
        "--prompts",
        type=_prompts,
        nargs="*",
        default=[],
        metavar="N",
        help="lengths of prompts in one step, such as 2048, 8x256 or 100+412",
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache-memory", type=int, metavar="BYTES", help="the engine's")
    parser.add_argument("--without-mlx-lm", action="store_true", help="time the engine alone")
    parser.add_argument("--out", type=Path, help="write all times as JSON")
    parser.add_argument("--only", choices=("engine", "bare"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        note = prepare_mlx(settings=args.only == "engine") or "Accelerate"
        times, memory = (time_engine if args.only == "engine" else time_bare)(args)
        json.dump({"blas": note, "ms": times, "memory": memory}, sys.stdout)
        return 0
    runs: dict[str, list[Times]] = {"engine": []}
    if not args.without_mlx_lm:
        runs["bare"] = []
    note, memory = "", {}
    for _ in range(args.rounds):
        for kind, results in runs.items():
            command = [sys.executable, "-m", "quire.loadtest.steps", *sys.argv[1:]]
            child = subprocess.run([*command, "--only", kind], stdout=subprocess.PIPE, check=True)
            answer = json.loads(child.stdout)
            results.append(answer["ms"])
            note, memory = answer["blas"], answer["memory"] or memory
    print(note)
    _print_times(runs)
    _print_memory(memory)
    if args.out is not None:
        record = {
            "command": "python -m quire.loadtest.steps " + " ".join(sys.argv[1:]),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "blas": note,
            "ms": runs,
            "memory": memory,
        }
        args.out.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
