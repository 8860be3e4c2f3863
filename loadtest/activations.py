"""What prompt steps need beside weights and pages: `python -m quire.loadtest.activations MODEL`.

Prompts whose chunks fill steps of some sizes, each handed to the device whole, in pieces of so many
layers, and as the engine would choose; in turns, in one process. The time is that of all steps of a
prompt, from one thread as on the CPU or from two as a worker has on GPUs; the peak is MLX's own
counter, less what was taken before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.startup.boot import add_device_argument, start_device

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.engine.model.paged_model import PagedModel

_CHUNKS = 3  # of a prompt
_WAYS = ("whole", "1", "2", "4", "chosen")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.activations")
    parser.add_argument("model", type=Path, help="a model folder")
    add_device_argument(parser)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[512, 2048], help="of a step (512 2048)"
    )
    parser.add_argument(
        "--layers",
        nargs="*",
        default=list(_WAYS),
        metavar="N|whole|chosen",
        help="that are handed over at once (whole 1 2 4 chosen)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    device, blas = start_device(args.device)
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>7} {'layers at once':>14} {'peak, MiB':>10} {'prompt, ms':>11}", flush=True)
    paged = _load(args.model, device)
    for tokens in args.tokens:
        rows += _measure(paged, tokens, args)
    record = {
        "command": f"python -m quire.loadtest.activations MODEL --tokens {args.tokens}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}",
        "blas": blas,
        "chunks": _CHUNKS,
        "rows": rows,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(record) + "\n")
    return 0


def _load(folder: Path, device: Any) -> PagedModel:
    from quire.engine.memory.budget import Budget
    from quire.engine.memory.limits import limit_loading
    from quire.engine.memory.machine import usable_memory
    from quire.engine.model.flat_linear import flatten_linears
    from quire.engine.model.paging import page_model
    from quire.engine.startup.loader import load_model

    budget = Budget(device, usable_memory(device), None)
    limit_loading(budget)
    loaded = load_model(folder, device, budget.limit, lambda stage, done, total: None)
    flatten_linears(loaded.model)
    return page_model(loaded.model, loaded.name)


def _measure(paged: PagedModel, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    from quire.engine.config import EngineConfig
    from quire.engine.engine import Engine

    config = EngineConfig(
        num_blocks=_CHUNKS * tokens // 16 + 40, max_num_seqs=4, max_num_batched_tokens=tokens
    )
    engine = Engine(paged, config)
    chosen = paged.layers_at_once(tokens)
    counts = {"whole": None, "chosen": chosen}
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in args.layers}
    ids = itertools.count()
    # The first round is not counted: kernels are compiled, and buffers cached.
    for turn in range(args.rounds + 1):
        for name, (sizes, seconds) in found.items():
            count = counts[name] if name in counts else int(name)
            paged.layers_at_once = partial(_say, count)  # type: ignore[method-assign]
            peak, elapsed = _run(engine, tokens, next(ids))
            if turn:
                sizes.append(peak)
                seconds.append(elapsed)
    del paged.layers_at_once
    rows = []
    for name, (peaks, times) in found.items():
        label = f"{name}: {chosen or 'whole'}" if name == "chosen" else name
        peak_mib, ms = max(peaks) / 2**20, 1000 * statistics.median(times)
        print(f"{tokens:7} {label:>14} {peak_mib:10.0f} {ms:11.1f}", flush=True)
        rows.append({"tokens": tokens, "layers": label, "peak_bytes": peaks, "seconds": times})
    return rows


def _say(count: int | None, num_rows: int, attended: int = 0) -> int | None:
    return count


def _run(engine: Engine, tokens: int, request_id: int) -> tuple[int, float]:
    """Bytes and seconds of one prompt that nobody has cached."""
    import mlx.core as mx

    from quire.engine.device_thread import DeviceThread, do_now

    draw = random.Random(request_id)
    prompt = [draw.randrange(200) for _ in range(_CHUNKS * tokens)]
    engine.submit(GenerateRequest(request_id, prompt, 1, SamplingParams(temperature=0)))
    mx.synchronize()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()

    def drain() -> None:
        while engine.has_work:
            engine.step()

    if engine.encodes_ahead:
        device = DeviceThread()
        engine.encode_on(device)
        device.run_beside(drain)
        engine._encoder.submit = do_now
    else:
        drain()
    mx.synchronize()
    return mx.get_peak_memory() - before, time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
