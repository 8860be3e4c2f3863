"""The engine's loop beside the bare model: `python -m quire.engine.step_benchmark MODEL`.

Both decode greedily at the same batch size and context. The bare model is mlx-lm's own forward pass
over its own cache, with no scheduler, no pages and no requests. Each runs in a process of its own,
in turns, on the same BLAS.
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

from quire.engine.messages import GenerateRequest, SamplingParams, WorkerConfig
from quire.engine.openblas import load_openblas

_WARM_UP = 5  # steps


def time_engine(model: str, batch: int, context: int, steps: int) -> list[float]:
    """Milliseconds of each step of :class:`Engine` with ``batch`` sequences decoding."""
    from quire.engine.startup import start_engine

    config = WorkerConfig(model, "", "", max_num_seqs=max(64, batch))
    engine = start_engine(config, [], lambda stage, done, total: None).engine
    draw = random.Random(0)
    for request_id in range(batch):
        prompt = [draw.randrange(200) for _ in range(context)]
        engine.submit(
            GenerateRequest(request_id, prompt, steps + 100, SamplingParams(temperature=0))
        )
    while len(engine.step()) < batch:
        pass
    return _times(engine.step, steps)


def time_bare(model: str, batch: int, context: int, steps: int) -> list[float]:
    """Milliseconds of each forward pass of mlx-lm's model over its own KV cache, with argmax."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model))
    cache = make_prompt_cache(loaded)
    mx.random.seed(0)
    tokens = mx.random.randint(0, 200, (batch, context))
    state = mx.argmax(loaded(tokens, cache=cache)[:, -1:], axis=-1)

    def step() -> None:
        nonlocal state
        state = mx.argmax(loaded(state, cache=cache), axis=-1)
        mx.eval(state)

    return _times(step, steps)


def _times(step: Callable[[], object], steps: int) -> list[float]:
    for _ in range(_WARM_UP):
        step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.engine.step_benchmark")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write all step times as JSON")
    parser.add_argument("--only", choices=("engine", "bare"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        note = load_openblas() if sys.platform == "linux" else "Accelerate"
        measure = time_engine if args.only == "engine" else time_bare
        times = measure(args.model, args.batch, args.context, args.steps)
        json.dump({"blas": note, "ms": times}, sys.stdout)
        return 0
    runs: dict[str, list[list[float]]] = {"engine": [], "bare": []}
    note = ""
    for _ in range(args.rounds):
        for kind, results in runs.items():
            command = [sys.executable, "-m", "quire.engine.step_benchmark", *sys.argv[1:]]
            child = subprocess.run([*command, "--only", kind], stdout=subprocess.PIPE, check=True)
            answer = json.loads(child.stdout)
            results.append(answer["ms"])
            note = answer["blas"]
    medians = {kind: [statistics.median(run) for run in results] for kind, results in runs.items()}
    ratios = [e / b for e, b in zip(medians["engine"], medians["bare"], strict=True)]
    print(f"batch {args.batch}, context {args.context}, {args.steps} steps; {note}")
    for kind, values in medians.items():
        print(f"{kind:7} median ms a step, each round: {' '.join(f'{v:.2f}' for v in values)}")
    print(f"engine / bare: median {statistics.median(ratios):.3f} of {args.rounds} rounds")
    if args.out is not None:
        record = {
            "command": "python -m quire.engine.step_benchmark " + " ".join(sys.argv[1:]),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "blas": note,
            "ms": runs,
            "median_ms": medians,
            "ratio": statistics.median(ratios),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
