"""The engine's steps beside the bare model's: `python -m quire.loadtest.steps MODEL`.

Decoding, greedily, at some batch sizes and contexts; prompts, whole or several in one step; and, of
the engine alone, prompts beside decodes. The
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
import statistics
import subprocess
import sys
from pathlib import Path

from quire.engine.startup.boot import prepare_mlx
from quire.loadtest.engine_steps import (
    MAX_TOKEN,
    PROMPT_RUNS,
    EngineSteps,
    Memory,
    Plan,
    Times,
    name_of,
    time_calls,
)


def time_engine(args: argparse.Namespace) -> tuple[Times, Memory]:
    """Each step of :class:`Engine`, and its memory."""
    from quire.engine.startup.start import start_engine

    plan = Plan(args.decode, args.prompts, args.mixed, args.steps)
    config = plan.worker_config(str(args.model), args.kv_cache_memory)
    startup = start_engine(config, [], lambda stage, done, total: None)
    times, peaks = EngineSteps(startup, plan).measure()
    ready = startup.ready
    return times, {"weights": ready.weight_bytes, "pages": ready.kv_cache_bytes, **peaks}


def time_bare(args: argparse.Namespace) -> tuple[Times, Memory]:
    """The same of mlx-lm's model: its batch step, and one prompt of as many tokens."""
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
    from mlx_lm.utils import load_model

    from quire.loadtest.bare import time_decodes

    model, _ = load_model(Path(args.model))
    layers = len(make_prompt_cache(model))
    times = time_decodes(
        model,
        lambda batch: [BatchKVCache([0] * batch) for _ in range(layers)],
        args.decode,
        args.steps,
    )
    for lengths in args.prompts:
        tokens = mx.random.randint(0, MAX_TOKEN, (1, sum(lengths)))

        def prompt(tokens: mx.array = tokens) -> None:
            cache = make_prompt_cache(model)
            # Logits of all rows, which nobody needs, are never evaluated; nor is the last row's.
            model(tokens, cache=cache)
            mx.eval([layer.state for layer in cache])

        times[f"prompts {name_of(lengths)}"] = time_calls(prompt, PROMPT_RUNS)
    return times, {}


def _print_times(runs: dict[str, list[Times]]) -> None:
    print(f"{'medians, ms':44} {'engine':>8} {'mlx-lm':>8}  mlx-lm / engine, each round")
    for name in runs["engine"][0]:
        engine = [statistics.median(run[name]) for run in runs["engine"]]
        line = f"{name:44} {statistics.median(engine):8.2f}"
        if "bare" in runs and name in runs["bare"][0]:
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


def _mixed(text: str) -> tuple[int, int, int]:
    decodes, _, prompt = text.partition("+")
    return *_decode(decodes), int(prompt)


def _prompts(text: str) -> list[int]:
    count, _, length = text.rpartition("x")
    return [int(each) for each in length.split("+")] * int(count or 1)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options that say what is timed."""
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
    parser.add_argument(
        "--mixed",
        type=_mixed,
        nargs="*",
        default=[],
        metavar="BxC+N",
        help="a prompt beside so many decodes, such as 64x128+512",
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kv-cache-memory", type=int, metavar="BYTES", help="the engine's")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.steps")
    parser.add_argument("model", help="a model folder")
    add_plan(parser)
    parser.add_argument("--rounds", type=int, default=5)
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
