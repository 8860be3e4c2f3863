"""Steps of models in published sizes, beside what memory allows: `python -m quire.loadtest.shapes`.

    python -m quire.loadtest.shapes "Qwen3.5-9B" "Qwen3.6-35B-A3B:20" "Qwen3.5-9B:32:4"

A model is NAME, NAME:LAYERS or NAME:LAYERS:BITS of those in :mod:`quire.loadtest.published`, made
in the device's memory with random weights (BITS may also be mxfp4, nvfp4 or mxfp8). All are started
together and measured one at a time.

A decode step can take no less than the bytes that it has to move over the bandwidth of a copy,
measured in the same process: weights (of experts those that so many rows are expected to choose if
all are as likely), states read and written, and keys and values read. A prompt can be no faster
than its matrix products, timed alone, layer by layer, as mlx-lm's own modules compute them.
Beside both stands mlx-lm's own model, over caches of its own; of its prompts one chunk is timed,
since its recurrences by single tokens take a tenth of a second for each thousand and layer. On an
NVIDIA GPU `--kernels` says where the time of the engine's steps goes.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from quire.engine.startup.boot import prepare_mlx
from quire.loadtest import environment
from quire.loadtest.cuda_kernels import KernelRecords, KernelTime
from quire.loadtest.engine_steps import MAX_TOKEN, EngineSteps, Plan, Times, time_calls
from quire.loadtest.environment import Environment
from quire.loadtest.model_folder import write_tokenizer
from quire.loadtest.pairs import StepProcess
from quire.loadtest.published import published
from quire.loadtest.random_models import Model, floats, make_model
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.stats import Median, number

if TYPE_CHECKING:
    from quire.engine.model.paged_model import PagedModel
    from quire.engine.startup.loader import LoadedModel

_SHOWN_KERNELS, _NAME_WIDTH = 16, 100
_CHUNK = 2048  # tokens of a prompt in one step, mlx-lm's own default


class Shape(msgspec.Struct):
    """What was measured of one model; all times in ms."""

    model: str
    copy_gb_per_s: float
    weight_bytes: int
    page_bytes: int  # of all pools, as allocated
    step_bytes: dict[str, int]  # that a decode step has to move
    mlx_lm: Times
    engine: Times
    products: Times  # of all matrix products of a step, one layer after the other
    memory: dict[str, int]
    kernels: dict[str, list[KernelTime]] = {}  # of the engine's steps, if they were asked for

    def bound(self, what: str) -> float:
        """ms that a decode step takes at least."""
        return self.step_bytes[what] / self.copy_gb_per_s / 1e6

    def rows(self) -> Iterator[tuple[str, ...]]:
        """What was run, the engine's ms, mlx-lm's, its products', the least, and the engine's over
        that."""
        for what, times in self.engine.items():
            engine = Median.of(times).value
            products = self._median(self.products, what)
            if what in self.step_bytes:
                least = self.bound(what)
            else:
                chunk = Median.of(self.products[f"prompts {_CHUNK}"]).value
                least = products = chunk * int(what.split()[-1]) / _CHUNK
            theirs = self._median(self.mlx_lm, what)
            shown = (number(each) for each in (engine, theirs, products, least))
            yield what, *shown, f"{engine / least:.2f}"

    @staticmethod
    def _median(times: Times, what: str) -> float | None:
        return Median.of(times[what]).value if what in times else None


class ShapesResult(msgspec.Struct, tag="shapes", tag_field="kind"):
    command: str
    shapes: list[Shape]
    failed: list[str]
    environment: Environment
    note: str = ""
    format_version: int = FORMAT_VERSION


def _products(loaded: LoadedModel) -> Iterator[tuple[Any, int]]:
    """Each matrix of a model but its embeddings, and how many experts it holds (0: it is none)."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    for name, module in loaded.model.named_modules():
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            yield module, module.weight.shape[0]
        elif isinstance(module, nn.Linear | nn.QuantizedLinear) and "lm_head" not in name:
            yield module, 0


def _chosen(config: dict[str, Any]) -> int:
    return int(config.get("num_experts_per_tok") or config.get("top_k_experts") or 1)


def touched_weights(loaded: LoadedModel, config: dict[str, Any], rows: int) -> int:
    """Bytes of weights that a step of so many decodes reads."""
    from mlx.utils import tree_flatten

    total = loaded.weight_bytes
    for module, experts in _products(loaded):
        if experts:
            unused = (1 - _chosen(config) / experts) ** rows
            total -= round(unused * sum(a.nbytes for _, a in tree_flatten(module.parameters())))
    if any("lm_head" in name for name, _ in loaded.model.named_modules()):
        # Then embeddings are only looked up.
        total -= sum(
            array.nbytes
            for name, array in tree_flatten(loaded.model.parameters())
            if "embed" in name
        )
    return total


def kept_bytes(paged: PagedModel, batch: int, context: int) -> int:
    """Bytes of states, read and written, and of keys and values, read, in a step of decodes."""
    seen = min(context, paged.window or context)
    tokens = context * paged.bytes_per_token + seen * paged.bytes_per_window_token
    return batch * (tokens + 2 * paged.bytes_per_state)


def time_products(
    loaded: LoadedModel, config: dict[str, Any], num_rows: int, runs: int
) -> list[float]:
    """ms of all matrix products of a step but its logits', one layer after the other."""
    import mlx.core as mx

    width = {}
    for module, _ in _products(loaded):
        columns = module.weight.shape[-1] * 32 // getattr(module, "bits", 32)
        width[columns] = mx.random.normal((1, num_rows, columns)).astype(floats())
    mx.eval(width)

    def step() -> None:
        for module, experts in _products(loaded):
            x = width[module.weight.shape[-1] * 32 // getattr(module, "bits", 32)]
            if not experts:
                mx.async_eval(module(x))
                continue
            chosen = mx.random.randint(0, experts, (num_rows * _chosen(config),))
            rows = mx.repeat(x[0], _chosen(config), axis=0)[:, None, :]
            mx.async_eval(module(rows, mx.sort(chosen), sorted_indices=True))
        mx.synchronize()

    return time_calls(step, runs)


def time_mlx_lm(loaded: LoadedModel, plan: Plan) -> Times:
    """Batches of equal length need no padding, so mlx-lm's caches of one sequence hold them."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from quire.loadtest.bare import time_decodes

    model: Any = loaded.model
    times = time_decodes(model, lambda batch: make_prompt_cache(model), plan.decode, plan.steps)
    tokens = mx.random.randint(0, MAX_TOKEN, (1, _CHUNK))

    def prompt() -> None:
        cache = make_prompt_cache(model)
        model(tokens, cache=cache)
        mx.eval([layer.state for layer in cache])

    times[f"prompts {_CHUNK}"] = time_calls(prompt, 1)
    mx.clear_cache()
    return times


def _run(
    model: Model, plan: Plan, kv_cache_memory: int, with_mlx_lm: bool, with_kernels: bool
) -> None:
    """One model's process: made, asked for mlx-lm's times, started, asked for its own."""
    prepare_mlx()
    import mlx.core as mx

    from quire.engine.startup.start import start_engine
    from quire.loadtest.kernels.device import copy_bandwidth, use_device

    def say(answer: object) -> None:
        print(msgspec.json.encode(answer).decode(), flush=True)

    device = use_device("auto")
    config = published(model.name, model.layers)
    loaded = make_model(model)
    weights = {batch: touched_weights(loaded, config, batch) for batch, _ in plan.decode}
    say(f"{model}: {loaded.weight_bytes / 1e9:.1f} GB made")
    sys.stdin.readline()
    copy = copy_bandwidth(device)
    products = {
        f"decode {batch}x{context}": time_products(loaded, config, batch, plan.steps)
        for batch, context in plan.decode
    }
    products[f"prompts {_CHUNK}"] = time_products(loaded, config, _CHUNK, plan.prompt_runs)
    mx.clear_cache()
    mlx_lm = time_mlx_lm(loaded, plan) if with_mlx_lm else {}
    mx.clear_cache()
    say(f"{model}: measured without the engine")
    sys.stdin.readline()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder, "tokenizer.json"))
        worker = plan.worker_config(folder, kv_cache_memory)
        worker = msgspec.structs.replace(
            worker, max_num_batched_tokens=_CHUNK, max_model_len=max(map(sum, plan.prompts)) + 64
        )
        startup = start_engine(worker, [], lambda *_: None, lambda *_: loaded)
    say(f"{model}: started")
    sys.stdin.readline()
    paged = startup.engine.model
    moved = {
        f"decode {batch}x{context}": weights[batch]
        + kept_bytes(paged, batch, context + plan.steps // 2)
        for batch, context in plan.decode
    }
    steps = EngineSteps(startup, plan, KernelRecords if with_kernels else None)
    times, memory = steps.measure()
    pages = startup.ready.kv_cache_bytes + startup.ready.states.nbytes
    say(
        Shape(
            str(model),
            copy / 1e9,
            loaded.weight_bytes,
            pages,
            moved,
            mlx_lm,
            times,
            products,
            memory,
            steps.kernels,
        )
    )


def measure(
    models: Sequence[Model],
    options: Sequence[str],
    on_shape: Callable[[ShapesResult], None] = lambda so_far: None,
) -> ShapesResult:
    """A model whose process ends is named in the result. ``on_shape`` hears of each measured."""
    base = ["-m", "quire.loadtest.shapes", *options, "--only"]
    processes = {
        str(model): StepProcess([*base, ":".join(str(part or "") for part in model)])
        for model in models
    }
    failed: list[str] = []

    def each(act: Callable[[StepProcess], Any]) -> Iterator[Any]:
        for name, process in processes.items():
            if name not in failed:
                try:
                    yield act(process)
                except (RuntimeError, OSError) as error:
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
                    failed.append(name)

    result = ShapesResult(environment.command_line(), [], failed, environment.describe())
    try:
        for act in (StepProcess.answer, StepProcess.measure, StepProcess.ask, StepProcess.answer):
            print("; ".join(f"{answer}" for answer in each(act) if answer), flush=True)
        for answer in each(StepProcess.measure):
            result.shapes.append(msgspec.convert(answer, Shape))
            _print(result.shapes[-1])
            on_shape(result)
    finally:
        for process in processes.values():
            process.stop()
    return result


def _print(shape: Shape) -> None:
    print(f"{shape.model}: {shape.weight_bytes / 1e9:.1f} GB, copy {shape.copy_gb_per_s:,.0f} GB/s")
    for what, engine, theirs, products, least, ratio in shape.rows():
        beside = f"mlx-lm {theirs}, products {products}, at least {least}"
        print(f"  {what}: {engine} ms, {beside}: {ratio}", flush=True)
        for kernel in shape.kernels.get(what, [])[:_SHOWN_KERNELS]:
            name = kernel.name[:_NAME_WIDTH]
            print(f"    {kernel.us:9.1f} us, {kernel.calls:6.1f} x {name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.shapes")
    parser.add_argument("models", nargs="*", type=Model.parse, metavar="NAME[:LAYERS[:BITS]]")
    parser.add_argument("--context", type=int, default=1024, help="of decodes (1024)")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens (8192)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kv-cache-memory", type=int, default=12 << 30, metavar="BYTES")
    parser.add_argument(
        "--without-mlx-lm", action="store_true", help="do not time mlx-lm's own model, for minutes"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="record each kernel's time too (needs CUPTI)"
    )
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, help="write all times as JSON")
    parser.add_argument("--only", type=Model.parse, help=argparse.SUPPRESS)
    args = parser.parse_args()
    decode = [(batch, args.context) for batch in args.batches]
    prompts = [[_CHUNK], [args.prompt]] if args.prompt != _CHUNK else [[_CHUNK]]
    plan = Plan(decode, prompts, steps=args.steps, prompt_runs=3)
    if args.only is not None:
        _run(args.only, plan, args.kv_cache_memory, not args.without_mlx_lm, args.kernels)
        return 0
    names = ("context", "prompt", "steps", "kv_cache_memory")
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    options += ["--without-mlx-lm"] * args.without_mlx_lm + ["--kernels"] * args.kernels

    def heard(so_far: ShapesResult) -> None:
        so_far.note = args.note
        if args.out:
            save(args.out, so_far)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes its processes along
    result = measure(args.models, [*options, "--batches", *map(str, args.batches)], heard)
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
