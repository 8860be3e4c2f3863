"""``quire tune``: measures the variants of each operation on this machine, once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.engine.errors import EngineError
from quire.engine.messages import WorkerConfig
from quire.engine.startup.boot import add_device_argument, start_device

if TYPE_CHECKING:
    from quire.engine.memory.budget import DeviceName
    from quire.kernels.choice.record import Timing
    from quire.kernels.choice.sizes import ModelSizes

_DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_argument(parser)
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="measure the shapes of this model (default: shapes of common sizes)",
    )
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="measure this operation only; repeatable"
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=WorkerConfig("", "", "").block_size,
        metavar="TOKENS",
        help="tokens in one KV block (default: %(default)s, as in `quire serve`)",
    )
    parser.add_argument(
        "--force", action="store_true", help="measure again what has been measured before"
    )


def run(args: argparse.Namespace) -> int:
    """0 if everything asked for is measured, now or before; 1 if it cannot be; 2 for bad usage."""
    try:
        device, _ = start_device(args.device)
        return _tune(args, device)
    except (EngineError, OSError) as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1


def _tune(args: argparse.Namespace, device: DeviceName) -> int:
    from quire.kernels.choice.check import checked_variants
    from quire.kernels.choice.record import record_path
    from quire.kernels.choice.sizes import typical_sizes
    from quire.kernels.choice.tuning import tasks_for, tune, tuned_operations

    known_operations = tuned_operations()
    operations = args.op or known_operations
    for name in operations:
        if name not in known_operations:
            known = ", ".join(known_operations)
            print(f"quire: error: --op must be one of {known}, not {name}", file=sys.stderr)
            return 2
    sizes = typical_sizes(device) if args.model is None else _read_sizes(args.model, device)
    tasks = list(tasks_for(sizes, device, args.block_size, operations))
    record = checked_variants(device, [sizes.dtype])
    measured: list[Timing] = []

    def report(timing: Timing) -> None:
        measured.append(timing)
        print(_describe(timing), flush=True)

    record = tune(device, record, tasks, force=args.force, report=report)
    where = f"{record.key.chip} ({device}), MLX {record.key.mlx}"
    if measured:
        print(f"Measured {len(measured)} shapes on {where}: {record_path(record.key)}")
    elif tasks and not args.force:
        print(
            f"Nothing to measure on {where}: {len(tasks)} shapes are known from before "
            "(--force measures again)"
        )
    else:
        print(f"Nothing to measure on {where}: there is nothing to choose between")
    return 0


def _describe(timing: Timing) -> str:
    from quire.kernels.choice.spec import describe, describe_settings
    from quire.kernels.specs import find_spec

    settings = describe_settings(timing.settings)
    chosen = f"{timing.variant} ({settings})" if settings else timing.variant
    shape = describe(find_spec(timing.operation).shape(*timing.shape))
    text = f"{timing.operation} [{shape}] {timing.dtype}: "
    if timing.time == timing.default_time:
        return text + f"{chosen} stays, {timing.time:.1f} us"
    return text + f"{chosen}, {timing.time:.1f} us (default: {timing.default_time:.1f} us)"


def _read_sizes(folder: Path, device: DeviceName) -> ModelSizes:
    """A model's sizes from its config.json.

    Raises:
        EngineError: the file is missing, or lacks what every model has.
    """
    from quire.kernels.choice.sizes import AttentionSizes, ModelSizes

    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization") or {}
        config = config | config.get("text_config", {})
        heads = config["num_attention_heads"]
        hidden = config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        attention: AttentionSizes | None = AttentionSizes(
            heads,
            config.get("num_key_value_heads") or heads,
            head_dim,
            head_dim,
            bool(config.get("sliding_window")) and config.get("use_sliding_window", True),
        )
        if "kv_lora_rank" in config:
            attention = None  # its pages hold latents, whose sizes are the model file's own
        is_affine = quantization.get("mode", "affine") == "affine"
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return ModelSizes(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            dtype="float32" if device == "cpu" or dtype not in _DTYPES else dtype,
            attention=attention,
            bits=quantization.get("bits") if is_affine else None,
            group_size=quantization.get("group_size", 64),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"cannot read sizes from {folder / 'config.json'}: {error!r}") from error
