"""From a worker configuration to a warmed-up engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import msgspec

from quire.engine.config import EngineConfig
from quire.engine.device import select_device
from quire.engine.engine import Engine
from quire.engine.errors import EngineError, is_out_of_memory
from quire.engine.grammar import GrammarCompiler
from quire.engine.grammar_tokens import make_tokenizer
from quire.engine.lookups import lookups_unheard
from quire.engine.memory.budget import MAX_ATTENDED, STEP_TOKENS, Budget, DeviceName
from quire.engine.memory.fit import Demand, size_pools
from quire.engine.memory.limits import limit_loading, limit_serving
from quire.engine.memory.machine import usable_memory
from quire.engine.messages import Abilities, Ready, StateSlots, WorkerConfig
from quire.engine.model.block_weights import standard_part
from quire.engine.model.experts import adapt_experts
from quire.engine.model.flat_linear import flatten_linears
from quire.engine.model.joined import join_linears
from quire.engine.model.mixtures import adapt_mixtures
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.model.residual import adapt_blocks
from quire.engine.model.rotated_attention import adapt_attention
from quire.engine.startup.kernel_check import avoid_dropped, check_kernels
from quire.engine.startup.loader import LoadedModel, Loader, Progress, load_model
from quire.engine.startup.self_check import check_against_plain_forward
from quire.engine.startup.warm_up import (
    Load,
    make_ready,
    measure_activations,
    run_everything,
)
from quire.kernels.cuda_cache import KernelCache, open_cache

_DEFAULT_CONTEXT = 4096  # tokens, for models whose config does not say
_MIN_POOL_TOKENS = 64  # of the pool for the warm-up
_WARM_UP_SLOTS = 9  # for the states of the few sequences that run in it


@dataclass(frozen=True)
class Startup:
    engine: Engine
    ready: Ready


def start_engine(
    config: WorkerConfig, notes: list[str], progress: Progress, load: Loader = load_model
) -> Startup:
    """Load, probe, check, size and warm up, on the thread whose MLX streams the engine will use.

    Raises:
        EngineError: the model cannot be served; the message says why.
    """
    device = select_device(config.device)
    step_tokens = _step_tokens(config, device)
    budget = Budget(device, usable_memory(device), config.memory_fraction)
    limit_loading(budget)
    loaded = load(Path(config.model_path), device, budget.limit, progress)
    notes = list(notes)
    cache = open_cache()
    paged = page_loaded(loaded, config.block_size, device, cache, notes, progress)
    engine_config = EngineConfig(
        num_blocks=0,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        eviction_policy=config.eviction_policy,
        max_attended=MAX_ATTENDED if device == "metal" else None,
    )
    context = _wanted_context(config, loaded)
    longest_step = max(2, min(step_tokens, context - 4))  # learned positions end with the context
    with lookups_unheard(), _told_what_fits(longest_step):
        if cache is not None:
            free = budget.limit - loaded.weight_bytes
            _compile_kernels(cache, paged, engine_config, longest_step, device, free)
        activations = _try_out(paged, engine_config, longest_step)
    budget = replace(budget, weights=loaded.weight_bytes, activations=activations)
    demand = _demand(config, loaded.dtype, paged, context, step_tokens)
    sizes = size_pools(budget, demand, config.kv_cache_memory)
    engine_config = replace(
        engine_config,
        num_blocks=sizes.blocks,
        num_state_slots=sizes.slots,
        num_window_blocks=sizes.window_blocks or None,
    )
    context = _context_within(config, context, sizes.blocks, notes)
    grammars = _grammars(config, paged.vocab_size, notes)
    if device != "cuda":  # whose memory is its own
        least = 1 + -(-context // config.block_size)
        engine_config = replace(engine_config, least_blocks=least)
    engine = Engine(paged, engine_config, grammars=grammars)
    if paged.has_kernels:
        # The pool holds two such prompts beside each other.
        prompt_length = min(longest_step, context // 2)
        with lookups_unheard():
            engine.forget(make_ready(engine, prompt_length, paged.vocab_size, device))
    # What the warm-up leaves, and what joined weights have replaced.
    mx.clear_cache()
    ready = _ready(loaded, device, paged, engine_config, context)
    limits = limit_serving(budget, ready.kv_cache_bytes + ready.states.nbytes)
    mx.reset_peak_memory()
    progress("warming up", 1, 1)
    abilities = Abilities(grammars is not None, paged.hidden_size, paged.num_dropped_kernels)
    ready = msgspec.structs.replace(ready, notes=notes, abilities=abilities, limits=limits)
    return Startup(engine, ready)


def _ready(
    loaded: LoadedModel,
    device: DeviceName,
    paged: PagedModel,
    config: EngineConfig,
    context: int,
) -> Ready:
    """What is known of the model and its pools."""
    num_slots = config.num_state_slots or 0
    return Ready(
        architecture=loaded.name,
        device=device,
        dtype=loaded.dtype,
        vocab_size=paged.vocab_size,
        max_model_len=context,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        weight_bytes=loaded.weight_bytes,
        kv_cache_bytes=paged.page_bytes,
        states=StateSlots(num_slots, num_slots * paged.bytes_per_state),
        num_window_blocks=config.num_window_blocks or 0,
    )


def _demand(
    config: WorkerConfig, dtype: str, paged: PagedModel, context: int, step_tokens: int
) -> Demand:
    return Demand(
        context,
        config.max_num_seqs,
        step_tokens,
        config.block_size,
        paged.bytes_per_token,
        dtype,
        paged.bytes_per_state,
        paged.state_spacing,
        paged.window or 0,
        paged.bytes_per_window_token,
    )


def _step_tokens(config: WorkerConfig, device: DeviceName) -> int:
    tokens = config.max_num_batched_tokens
    if tokens is None:
        tokens = max(STEP_TOKENS[device], 2 * config.max_num_seqs)
    if tokens <= config.max_num_seqs:
        raise EngineError(
            f"--max-num-batched-tokens {tokens} must be larger than "
            f"--max-num-seqs {config.max_num_seqs}, or decodes leave no room for prompts"
        )
    return tokens


def page_loaded(
    loaded: LoadedModel,
    block_size: int,
    device: DeviceName,
    cache: KernelCache | None,
    notes: list[str],
    progress: Progress,
) -> PagedModel:
    """The model over pages, with what this machine's kernels can do; ``notes`` says what not."""
    if loaded.widened:
        notes.append("half-precision weights are computed as float32 on the CPU")
    flatten_linears(loaded.model)
    if device != "cpu":
        progress("checking kernels", 0, 1)
        check_kernels(device, loaded.model, cache)
        if standard_part(loaded.model) is None:
            join_linears(loaded.model)
            adapt_experts(loaded.model)
            adapt_mixtures(loaded.model)
            adapt_attention(loaded.model)
            adapt_blocks(loaded.model)
    progress("warming up", 0, 1)
    paged = page_model(loaded.model, loaded.name)
    notes += avoid_dropped(device, paged, block_size)
    return paged


def _context_within(config: WorkerConfig, wanted: int, num_blocks: int, notes: list[str]) -> int:
    """Tokens of one request that the pool can hold."""
    held = (num_blocks - 1) * config.block_size
    if held >= wanted:
        return wanted
    if config.max_model_len is not None:
        raise EngineError(
            f"the KV cache holds {held} tokens, fewer than --max-model-len "
            f"{config.max_model_len}: raise --kv-cache-memory or lower --max-model-len to {held}"
        )
    notes.append(f"context limited to {held} of {wanted} tokens by the memory for the KV cache")
    return held


def _grammars(config: WorkerConfig, vocab_size: int, notes: list[str]) -> GrammarCompiler | None:
    """Made at the start: to read a large vocabulary holds up all threads for a second.

    None, with a note, for tokenizers that llguidance does not know.
    """
    file = Path(config.model_path) / "tokenizer.json"
    try:
        return GrammarCompiler(make_tokenizer(str(file), config.eos_token_ids, vocab_size))
    except ValueError as error:
        notes.append(f"structured output is not available: {error}")
        return None


def _wanted_context(config: WorkerConfig, loaded: LoadedModel) -> int:
    own = loaded.max_position_embeddings
    if config.max_model_len is None:
        return own or _DEFAULT_CONTEXT
    if own is not None and config.max_model_len > own:
        raise EngineError(
            f"--max-model-len {config.max_model_len} is more than the model's context of {own}"
        )
    return config.max_model_len


def _slots_within(free: int, paged: PagedModel, max_num_seqs: int) -> int:
    """Enough states for the largest step of decodes and for its prompts to be cached, if half of
    what is free holds them."""
    if not paged.bytes_per_state:
        return 0
    return max(_WARM_UP_SLOTS, min(1 + 2 * max_num_seqs, free // 2 // paged.bytes_per_state))


def _compile_kernels(
    cache: KernelCache,
    paged: PagedModel,
    config: EngineConfig,
    prompt_length: int,
    device: DeviceName,
    free: int,
) -> None:
    """Compile what a start runs, by a start that runs no kernel and has ``free`` bytes."""
    num_blocks = 2 * prompt_length // config.block_size + 2 * config.max_num_seqs
    slots = _slots_within(free, paged, config.max_num_seqs)
    engine = Engine(paged, replace(config, num_blocks=num_blocks, num_state_slots=slots))
    with cache.collecting():
        run_everything(Load(engine, paged.vocab_size), prompt_length, device)


def _try_out(paged: PagedModel, config: EngineConfig, prompt_length: int) -> int:
    """Check the model and run its longest step over a small pool, which is gone afterwards.

    Returns the bytes of the step's activations.
    """
    num_blocks = max(_MIN_POOL_TOKENS, 2 * prompt_length) // config.block_size + 4
    few = replace(config, num_blocks=num_blocks, num_state_slots=_WARM_UP_SLOTS)
    engine = Engine(paged, few)
    check_against_plain_forward(paged, num_blocks)
    return measure_activations(engine, prompt_length, paged.vocab_size)


@contextmanager
def _told_what_fits(prompt_length: int) -> Iterator[None]:
    """Raises EngineError, with what might fit, where the device has no memory for a step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(
            f"a step of {prompt_length} tokens needs more memory than the weights leave: "
            f"--max-num-batched-tokens {max(prompt_length // 2, 1)} might fit, or 4-bit weights"
        ) from error
