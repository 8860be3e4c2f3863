"""Loading a model folder: mlx-lm's own model classes and loader, safetensors only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_mlx_lm_model

from quire.engine.errors import ModelLoadError
from quire.engine.memory.budget import DeviceName
from quire.engine.memory.fit import too_heavy

# Weights are read from disk in portions of about this size, so that progress can be shown.
_PORTION_BYTES = 256 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module
    name: str  # config.json's model_type
    max_position_embeddings: int | None
    dtype: str  # of the weights, or e.g. "4-bit"
    weight_bytes: int
    widened: bool  # half-precision weights were made float32


# Path, device, limit in bytes, progress.
Loader = Callable[[Path, DeviceName, int, Progress], LoadedModel]


def load_model(path: Path, device: DeviceName, limit: int, progress: Progress) -> LoadedModel:
    """Load the weights under ``path`` into memory, of which they may take ``limit`` bytes.

    Raises:
        ModelLoadError: the folder is incomplete or broken, or the weights do not fit.
    """
    size = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    if size > limit:
        raise ModelLoadError(too_heavy(size, None, limit))
    try:
        # Never from a hub, never with code from the folder.
        model, config = load_mlx_lm_model(path, lazy=True, strict=True, trust_remote_code=False)
    except (Exception, SystemExit) as error:
        # mlx-lm raises whatever its model files and mlx.core raise; one of them exits.
        raise ModelLoadError(f"cannot load {path}: {_one_line(error)}") from error
    # MLX's CPU backend multiplies half-precision matrices 15 to 30 times slower than float32 ones.
    widened = device == "cpu" and _widen(model)
    parameters = [array for _, array in tree_flatten(model.parameters())]
    total = sum(array.nbytes for array in parameters)
    if total > limit:
        raise ModelLoadError(too_heavy(total, _dtype_name(config, parameters), limit))
    try:
        _read(parameters, total, progress)
    except RuntimeError as error:
        raise ModelLoadError(f"cannot read the weights of {path}: {_one_line(error)}") from error
    model.eval()
    return LoadedModel(
        model=model,
        name=str(config["model_type"]),
        max_position_embeddings=_context_length(config),
        dtype=_dtype_name(config, parameters),
        weight_bytes=total,
        widened=widened,
    )


def _read(parameters: list[mx.array], total: int, progress: Progress) -> None:
    progress("loading weights", 0, total)
    done = 0
    portion: list[mx.array] = []
    size = 0
    for array in parameters:
        portion.append(array)
        size += array.nbytes
        if size >= _PORTION_BYTES:
            mx.eval(portion)
            done += size
            portion, size = [], 0
            progress("loading weights", done, total)
    mx.eval(portion)
    progress("loading weights", total, total)


def _widen(model: nn.Module) -> bool:
    half = (mx.float16, mx.bfloat16)
    if not any(array.dtype in half for _, array in tree_flatten(model.parameters())):
        return False
    model.apply(lambda array: array.astype(mx.float32) if array.dtype in half else array)
    return True


def _dtype_name(config: dict[str, Any], parameters: list[mx.array]) -> str:
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    if bits := quantization.get("bits"):
        return f"{bits}-bit"
    floating = [array for array in parameters if mx.issubdtype(array.dtype, mx.floating)]
    largest = max(floating, key=lambda array: array.size)
    return str(largest.dtype).removeprefix("mlx.core.")


def _context_length(config: dict[str, Any]) -> int | None:
    """The model's own context length under any of the names config files give it."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
    for scope in (config, config.get("text_config") or {}):
        for name in names:
            if isinstance(scope.get(name), int):
                return int(scope[name])
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300]}" if text else type(error).__name__
