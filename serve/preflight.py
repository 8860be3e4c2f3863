"""Settings that cannot work with a model, told before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from quire.engine.memory.budget import DeviceName as Device
from quire.serve.memory_plan import memory
from quire.serve.model_facts import read_facts
from quire.serve.served_model import ModelFilesError
from quire.serve.settings import ServeSettings, SettingsError

# The names that config files give a model's own context.
_CONTEXT: Final = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"),
)
_OTHER_LAYERS: Final = ("layer_types", "full_att", "linear_", "mamba", "ssm", "conv", "text_config")
_LEAST_TOKENS: Final = 64  # in a KV cache


def check_settings(settings: ServeSettings, folder: Path) -> None:
    """Raise :class:`SettingsError` for what would only fail once the model is in memory.

    What the files do not say is left to the worker.
    """
    budget = settings.max_num_batched_tokens
    if budget is not None and budget <= settings.max_num_seqs:
        raise SettingsError(
            f"--max-num-batched-tokens {budget} must be larger than --max-num-seqs "
            f"{settings.max_num_seqs}, or decodes leave no room for prompts"
        )
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"Cannot read {folder / 'config.json'}: {error}") from error
    context = _own_context(config)
    wanted = settings.max_model_len
    if wanted is not None and context is not None and wanted > context:
        raise SettingsError(
            f"--max-model-len {wanted} is more than the model's context of {context}"
        )
    if settings.kv_cache_memory is not None and not _has_other_layers(config):
        _check_kv_cache(settings.kv_cache_memory, wanted, settings.device, folder)


def _own_context(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for scope in (config, text if isinstance(text, dict) else {}):
        for name in _CONTEXT:
            if isinstance(value := scope.get(name), int):
                return value
    return None


def _has_other_layers(config: Mapping[str, Any]) -> bool:
    """Whether some layers may keep less of a token than others, or nothing."""
    return any(word in json.dumps([*config]) for word in _OTHER_LAYERS)


def _check_kv_cache(size: int, wanted: int | None, device: str, folder: Path) -> None:
    try:
        facts = read_facts(folder)
    except ModelFilesError:
        return
    # The least that a token may take: half precision, unless the CPU is asked for by name.
    kind: Device = "cpu" if device == "cpu" else "metal"
    per_token = memory(facts, kind, 1, 1).kv_per_token
    tokens = size // per_token
    if tokens < _LEAST_TOKENS:
        raise SettingsError(
            f"--kv-cache-memory holds {tokens} tokens at {per_token} bytes each; a server needs "
            f"room for {_LEAST_TOKENS}"
        )
    if wanted is not None and tokens < wanted:
        raise SettingsError(
            f"--kv-cache-memory holds {tokens} tokens at {per_token} bytes each, fewer than "
            f"--max-model-len {wanted}: raise the one or lower the other"
        )
