"""Which shapes are worth measuring for a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.manifest import load_manifest
from quire.kernels.choice.shapes import (
    DecodeShape,
    DenseShape,
    MatmulShape,
    MixedShape,
    PromptShape,
    SampleShape,
    SharedShape,
)
from quire.kernels.choice.tuning import Task

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Pages of a measured shape take no more than this, so that two sets of them fit anywhere.
_MAX_PAGE_BYTES = {"metal": 1 << 30, "cuda": 4 << 30, "cpu": 128 << 20}


# Rows of a prompt chunk, and the context they end.
_CPU_CHUNKS = (64, 64), (256, 256), (64, 512), (256, 1024)
_GPU_CHUNKS = (128, 128), (512, 512), (2048, 2048), (128, 4096), (512, 4096)


@dataclass(frozen=True)
class AttentionSizes:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: bool = False  # some of its layers have a sliding window


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that decide which shapes a model computes."""

    hidden: int
    intermediate: int
    vocab: int
    dtype: str
    attention: AttentionSizes | None  # None: not known
    bits: int | None = None  # of its weights; None: not quantised
    group_size: int = 64
    dense: bool = False  # measured without quantisation too


# What is measured if no model is named: the shapes of Qwen3 8B on GPUs, small ones on CPUs.
TYPICAL = {
    "gpu": ModelSizes(
        4096, 12288, 151936, "bfloat16", AttentionSizes(32, 8, 128, 128), bits=4, dense=True
    ),
    "cpu": ModelSizes(
        512, 1536, 32000, "float32", AttentionSizes(8, 4, 64, 64), bits=4, dense=True
    ),
}


def typical_sizes(device: DeviceName) -> ModelSizes:
    return TYPICAL["cpu" if device == "cpu" else "gpu"]


def tuned_operations() -> list[str]:
    """Operations that have something to choose from when they are called."""
    return [
        name
        for name, operation in load_manifest().items()
        if not operation.once or any(v.settings for v in operation.variants.values())
    ]


def tasks_for(sizes: ModelSizes, device: DeviceName, block_size: int) -> list[Task]:
    """What to measure for a model on a device; pages hold ``block_size`` tokens per block."""
    tasks = []
    if sizes.attention is not None:
        tasks += list(_attention(sizes, sizes.attention, device, block_size))
    if sizes.bits is not None:
        tasks += list(_matmuls(sizes, device, sizes.bits))
    if sizes.bits is None or sizes.dense:
        tasks += list(_dense_matmuls(sizes, device))
    for rows in (1, 8) if device == "cpu" else (1, 16, 64):
        for filtered in (True, False):
            shape = SampleShape(rows, sizes.vocab, filtered)
            tasks.append(Task("sample", shape, sizes.dtype))
        greedy = SampleShape(rows, sizes.vocab, filtered=False, greedy=True)
        tasks.append(Task("sample", greedy, sizes.dtype))
    return tasks


def _attention(
    sizes: ModelSizes, heads: AttentionSizes, device: DeviceName, block_size: int
) -> Iterator[Task]:
    on_cpu = device == "cpu"
    each = heads.heads, heads.kv_heads, heads.key_dim, heads.value_dim, block_size
    per_token = heads.kv_heads * (heads.key_dim + heads.value_dim) * _BYTES[sizes.dtype]
    windows = (False, True) if heads.window else (False,)
    for window in windows:
        for rows in (1, 8) if on_cpu else (1, 4, 16, 64):
            for context in (512, 2048) if on_cpu else (1024, 4096, 16384):
                if rows * context * per_token <= _MAX_PAGE_BYTES[device]:
                    shape = DecodeShape(rows, context, *each, window=window)
                    yield Task("paged_decode", shape, sizes.dtype)
        for rows, context in _CPU_CHUNKS if on_cpu else _GPU_CHUNKS:
            prompt = PromptShape(rows, context, *each, from_start=rows == context, window=window)
            yield Task("prompt_attention", prompt, sizes.dtype)
    for rows, context in ((8, 512),) if on_cpu else ((16, 512), (64, 512), (64, 2048)):
        yield Task("mixed_attention", MixedShape(rows, context, *each), sizes.dtype)
    for rows in (8, 64):
        yield Task("shared_context", SharedShape(rows, 1024, 256, *each), sizes.dtype)


def _matmuls(sizes: ModelSizes, device: DeviceName, bits: int) -> Iterator[Task]:
    matrices = [
        (sizes.intermediate, sizes.hidden),
        (sizes.hidden, sizes.intermediate),
        (sizes.vocab, sizes.hidden),
    ]
    if (heads := sizes.attention) is not None:
        matrices += [
            (heads.heads * heads.key_dim, sizes.hidden),
            (heads.kv_heads * heads.key_dim, sizes.hidden),
            (sizes.hidden, heads.heads * heads.value_dim),
        ]
    for outputs, inputs in dict.fromkeys(matrices):
        sampled_only = outputs == sizes.vocab
        on_cpu = (1, 8) if sampled_only else (1, 8, 64)
        for rows in on_cpu if device == "cpu" else (1, 2, 4, 8, 16, 32, 64, 256):
            shape = MatmulShape(rows, outputs, inputs, bits, sizes.group_size)
            yield Task("quantized_matmul", shape, sizes.dtype)


def _dense_matmuls(sizes: ModelSizes, device: DeviceName) -> Iterator[Task]:
    """Of a fused block, where projections of the same input are one."""
    matrices = [
        (2 * sizes.intermediate, sizes.hidden),
        (sizes.hidden, sizes.intermediate),
    ]
    if (heads := sizes.attention) is not None:
        keys_and_values = heads.kv_heads * (heads.key_dim + heads.value_dim)
        matrices += [
            (heads.heads * heads.key_dim + keys_and_values, sizes.hidden),
            (sizes.hidden, heads.heads * heads.value_dim),
        ]
    for outputs, dim in dict.fromkeys(matrices):
        for rows in (1, 8) if device == "cpu" else (1, 8, 16, 32, 64):
            yield Task("matmul", DenseShape(rows, outputs, dim), sizes.dtype)
