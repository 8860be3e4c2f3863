"""From a worker configuration to a warmed-up engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from quire.engine.device import DeviceName, select_device, usable_memory
from quire.engine.engine import Engine, EngineConfig
from quire.engine.errors import EngineError, UnsupportedModel
from quire.engine.grammar import GrammarCompiler
from quire.engine.grammar_tokens import make_tokenizer
from quire.engine.messages import Ready, WorkerConfig
from quire.engine.model.flat_linear import flatten_quantized_linears
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.startup.kernel_check import avoid_dropped, check_kernels
from quire.engine.startup.loader import LoadedModel, Progress, load_model
from quire.engine.startup.self_check import check_against_plain_forward
from quire.engine.startup.warm_up import WarmedUp, warm_up

# Seen to give other tokens from run to run; refused until the cause is found.
_UNRELIABLE = {("cuda", "gpt_oss"): "its output on NVIDIA GPUs is not reproducible yet"}

_DEFAULT_CONTEXT = 4096  # tokens, for models whose config does not say
# A step's tokens unless told otherwise: what keeps the gaps between a stream's tokens short while a
# prompt is computed beside it.
_BATCHED_TOKENS: dict[DeviceName, int] = {"cpu": 512, "metal": 512, "cuda": 2048}
_MIN_POOL_TOKENS = 64
# Weights, pages and activations stay below this share of what the device recommends.
_GPU_MEMORY_SHARE = 0.85
# A Mac's memory is also its owner's: by default pages take half of what the rest leaves.
_METAL_POOL_SHARE = 0.5
# On the CPU the machine's memory is everybody's: by default take at most this, and no more than
# so many sequences of full length could fill.
_CPU_POOL_BYTES = 2 << 30
_CPU_POOL_SHARE = 0.5
_CPU_CACHE_BYTES = 1 << 30
_CPU_POOL_SEQUENCES = 16


@dataclass(frozen=True)
class Startup:
    engine: Engine
    ready: Ready


def start_engine(config: WorkerConfig, notes: list[str], progress: Progress) -> Startup:
    """Load, probe, check, size and warm up, on the thread whose MLX streams the engine will use.

    Raises:
        EngineError: the model cannot be served; the message says why.
    """
    device = select_device(config.device)
    budget = config.max_num_batched_tokens
    if budget is None:
        budget = max(_BATCHED_TOKENS[device], 2 * config.max_num_seqs)
    if budget <= config.max_num_seqs:
        raise EngineError(
            f"--max-num-batched-tokens {budget} must be larger than "
            f"--max-num-seqs {config.max_num_seqs}, or decodes leave no room for prompts"
        )
    _limit_memory(device)
    loaded = load_model(Path(config.model_path), device, progress)
    if reason := _UNRELIABLE.get((device, loaded.name)):
        raise UnsupportedModel(loaded.name, reason)
    if loaded.widened:
        notes = [*notes, "half-precision weights are computed as float32 on the CPU"]
    flatten_quantized_linears(loaded.model)
    if device != "cpu":
        progress("checking kernels", 0, 1)
        check_kernels(device, loaded.model)
    progress("warming up", 0, 1)
    paged = page_model(loaded.model, loaded.name)
    notes = [*notes, *avoid_dropped(device, paged)]
    engine_config = EngineConfig(
        num_blocks=0,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        eviction_policy=config.eviction_policy,
    )
    wanted_len = _wanted_context(config, loaded)
    warmed = _warm_up(paged, engine_config, wanted_len, device)
    num_blocks = _size_pool(config, loaded, paged, device, wanted_len, warmed.activation_bytes)
    max_model_len = min(wanted_len, (num_blocks - 1) * config.block_size)
    if max_model_len < wanted_len:
        if config.max_model_len is not None:
            raise EngineError(
                f"the KV cache holds {max_model_len} tokens, fewer than --max-model-len "
                f"{config.max_model_len}: raise --kv-cache-memory or lower --max-model-len"
            )
        notes = [
            *notes,
            f"context limited to {max_model_len} of {wanted_len} tokens by --kv-cache-memory",
        ]
    grammars = None
    try:
        grammars = _grammars(config, paged.vocab_size)
    except ValueError as error:
        notes = [*notes, f"structured output is not available: {error}"]
    mixed = warmed.mixed_prompt_tokens
    engine = Engine(
        paged,
        replace(engine_config, num_blocks=num_blocks, mixed_prompt_tokens=mixed),
        grammars=grammars,
    )
    mx.reset_peak_memory()
    progress("warming up", 1, 1)
    return Startup(
        engine,
        Ready(
            architecture=loaded.name,
            device=device,
            dtype=loaded.dtype,
            vocab_size=paged.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            block_size=config.block_size,
            num_blocks=num_blocks,
            weight_bytes=loaded.weight_bytes,
            kv_cache_bytes=num_blocks * config.block_size * paged.bytes_per_token,
            notes=notes,
            grammars=grammars is not None,
        ),
    )


def _grammars(config: WorkerConfig, vocab_size: int) -> GrammarCompiler:
    """Made at the start: to read a large vocabulary holds up all threads for a second.

    Raises ``ValueError`` for tokenizers that llguidance does not know.
    """
    file = Path(config.model_path) / "tokenizer.json"
    return GrammarCompiler(make_tokenizer(str(file), config.eos_token_ids, vocab_size))


def _limit_memory(device: DeviceName) -> None:
    if device == "cpu":
        # MLX's default keeps 32 MiB of freed buffers. A step frees and takes far more, and getting
        # it from the system anew costs page faults: 134 instead of 48 ms at 8 x 896 tokens.
        mx.set_cache_limit(min(_CPU_CACHE_BYTES, usable_memory(device) // 8))
    if device == "metal":
        # Keeps weights and pages resident; beyond what the system recommends it risks a panic.
        mx.set_wired_limit(usable_memory(device))


def _wanted_context(config: WorkerConfig, loaded: LoadedModel) -> int:
    own = loaded.max_position_embeddings
    if config.max_model_len is None:
        return own or _DEFAULT_CONTEXT
    if own is not None and config.max_model_len > own:
        raise EngineError(
            f"--max-model-len {config.max_model_len} is more than the model's context of {own}"
        )
    return config.max_model_len


def _warm_up(paged: PagedModel, config: EngineConfig, context: int, device: DeviceName) -> WarmedUp:
    """Check the model and run steps over a small pool, which is gone afterwards."""
    # Learned position embeddings end with the context.
    prompt_length = max(2, min(config.max_num_batched_tokens, context - 4))
    num_blocks = max(_MIN_POOL_TOKENS, 2 * prompt_length) // config.block_size + 4
    engine = Engine(paged, replace(config, num_blocks=num_blocks))
    check_against_plain_forward(paged, num_blocks)
    # On CUDA kernels differ with the number of rows, and each takes seconds to compile.
    every_kernel = device == "cuda" and paged.in_place
    return warm_up(engine, prompt_length, paged.vocab_size, every_kernel=every_kernel)


def _size_pool(
    config: WorkerConfig,
    loaded: LoadedModel,
    paged: PagedModel,
    device: DeviceName,
    context: int,
    activation_bytes: int,
) -> int:
    """Blocks for the final pool, the scratch block included."""
    block_bytes = config.block_size * paged.bytes_per_token
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
    elif device == "cpu":
        sequences = min(_CPU_POOL_SEQUENCES, config.max_num_seqs)
        enough = block_bytes * (1 + -(-context // config.block_size) * sequences)
        spare = int(_CPU_POOL_SHARE * usable_memory(device))
        budget = min(_CPU_POOL_BYTES, spare, enough)
    else:
        limit = int(_GPU_MEMORY_SHARE * usable_memory(device))
        budget = limit - loaded.weight_bytes - activation_bytes
        if device == "metal":
            budget = int(_METAL_POOL_SHARE * budget)
    num_blocks = budget // block_bytes
    if (num_blocks - 1) * config.block_size < _MIN_POOL_TOKENS:
        raise EngineError(
            f"{max(budget, 0) / 2**20:.0f} MiB for the KV cache hold fewer than "
            f"{_MIN_POOL_TOKENS} tokens at {paged.bytes_per_token} bytes each: raise "
            "--kv-cache-memory or serve a smaller model"
        )
    return num_blocks
