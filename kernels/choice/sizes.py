"""The sizes of a model, which decide the shapes it computes."""

from __future__ import annotations

from dataclasses import dataclass

from quire.kernels.choice.chips import DeviceName


@dataclass(frozen=True)
class AttentionSizes:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: bool = False  # some of its layers have a sliding window


@dataclass(frozen=True)
class ModelSizes:
    hidden: int
    intermediate: int
    vocab: int
    dtype: str
    attention: AttentionSizes | None  # None: not known
    bits: int | None = None  # of its weights; None: not quantised
    group_size: int = 64
    dense: bool = False  # measured without quantisation too


# What is measured if no model is named: the shapes of Qwen3 8B on GPUs, small ones on CPUs.
_TYPICAL = {
    "gpu": ModelSizes(
        4096, 12288, 151936, "bfloat16", AttentionSizes(32, 8, 128, 128), bits=4, dense=True
    ),
    "cpu": ModelSizes(
        512, 1536, 32000, "float32", AttentionSizes(8, 4, 64, 64), bits=4, dense=True
    ),
}


def typical_sizes(device: DeviceName) -> ModelSizes:
    return _TYPICAL["cpu" if device == "cpu" else "gpu"]
