"""Does each variant compute the right thing on this machine? Compared with float64 in NumPy.

Metal kernels are written without a Mac at hand and drivers differ, so the first start on a GPU
checks every kernel, and one that disagrees or does not compile is not used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.manifest import DTYPES, Variant, load_manifest
from quire.kernels.choice.record import Record, Verdict, load_record, save_record
from quire.kernels.choice.selection import Selector, use_record
from quire.kernels.choice.shapes import (
    AnyShape,
    DecodeShape,
    DenseShape,
    GateShape,
    GatherShape,
    MatmulShape,
    MixedShape,
    NormShape,
    PromptShape,
    RotateShape,
    RotatingDecodeShape,
    RowsShape,
    SampleShape,
    SharedShape,
    WriteShape,
)
from quire.kernels.probes import make_probe
from quire.kernels.probes.probe import Probe

logger = logging.getLogger("quire.kernels")

# Small, and between them every path: odd groups, unequal head sizes, windows, sinks, soft-caps,
# partly filled blocks, contexts cut in several pieces.
CHECKED: Mapping[str, Sequence[AnyShape]] = {
    "paged_decode": (
        DecodeShape(3, 300, 8, 2, 128, 128, 16),
        DecodeShape(2, 70, 4, 4, 64, 64, 8, window=True),
        DecodeShape(3, 90, 14, 2, 96, 96, 32, sinks=True),
        DecodeShape(2, 50, 16, 1, 192, 128, 16),
        DecodeShape(2, 40, 4, 2, 256, 256, 16, softcap=True),
    ),
    # Own parts that are cut, that are not, and cut ones with sinks.
    "shared_context": (
        SharedShape(3, 300, 150, 8, 2, 128, 128, 16),
        SharedShape(5, 140, 40, 14, 2, 96, 96, 32, sinks=True),
        SharedShape(9, 70, 200, 4, 2, 192, 128, 8, sinks=True),
    ),
    "prompt_attention": (
        PromptShape(33, 33, 8, 2, 128, 128, 16),
        PromptShape(17, 70, 4, 4, 64, 64, 8, from_start=False),
        PromptShape(9, 90, 14, 2, 96, 96, 32, from_start=False, window=True),
        PromptShape(20, 40, 4, 2, 192, 128, 16, from_start=False, sinks=True),
        PromptShape(5, 1100, 8, 2, 64, 64, 16, from_start=False),
    ),
    "mixed_attention": (
        MixedShape(3, 70, 8, 2, 128, 128, 16),
        MixedShape(5, 90, 4, 4, 64, 64, 8, window=True),
        MixedShape(2, 1100, 4, 2, 192, 128, 16, sinks=True),
    ),
    "kv_write": (
        WriteShape(5, 2, 128, 128, 16, keep_rows=True),
        WriteShape(37, 3, 192, 128, 8),
    ),
    "gather_pages": (GatherShape(1, 3, 2, 128, 128, 16), GatherShape(3, 2, 3, 192, 128, 8)),
    "take_rows": (RowsShape(5, 128), RowsShape(33, 64)),
    "rotate_and_write": (
        RotateShape(5, 8, 2, 128, 128, 16, norms=True, keep_rows=True),
        RotateShape(3, 4, 4, 64, 64, 8),
        RotateShape(9, 6, 3, 80, 32, 32, traditional=True, keep_rows=True),
        RotateShape(2, 2, 1, 256, 256, 16, norms=True, traditional=True),
    ),
    "rotate_and_decode": (
        RotatingDecodeShape(3, 50, 8, 2, 128, 128, 16, norms=True),
        RotatingDecodeShape(2, 40, 4, 4, 64, 64, 8, window=True),
        RotatingDecodeShape(3, 60, 18, 2, 80, 32, 32, traditional=True),
        RotatingDecodeShape(1, 20, 2, 1, 256, 256, 16, norms=True, traditional=True),
    ),
    "add_rms_norm": (NormShape(3, 1032), NormShape(1, 64), NormShape(2, 8192)),
    "swiglu": (GateShape(3, 1032), GateShape(1, 8)),
    "matmul": (DenseShape(17, 200, 1056), DenseShape(1, 72, 32), DenseShape(64, 40, 320)),
    "quantized_matmul": (
        MatmulShape(1, 96, 256, 4, 64),
        MatmulShape(3, 72, 512, 8, 32),
        MatmulShape(17, 200, 256, 4, 128),
        MatmulShape(32, 64, 128, 4, 64),
    ),
    "sample": (
        SampleShape(64, 1500, True),
        SampleShape(4, 300, False),
        SampleShape(3, 1500, False, greedy=True),
    ),
}
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Made of several operations, a variant rounds its intermediate results to half precision too.
_STEPWISE = 2.0
# On GPUs MLX multiplies float32 matrices with ten bits of mantissa (TF32) where it can.
_TF32_TOLERANCE = 2e-3


def tolerance(variant: Variant, dtype: str, device: DeviceName) -> float:
    """The error allowed of a result, relative to its largest value."""
    if variant.kind == "kernel":
        return _TOLERANCE[dtype]
    if dtype == "float32":
        return _TOLERANCE[dtype] if device == "cpu" else _TF32_TOLERANCE
    return _STEPWISE * _TOLERANCE[dtype]


def check_variant(
    operation: str, name: str, dtype: str, device: DeviceName, *, briefly: bool = False
) -> Verdict | None:
    """Run a variant on the shapes it supports of those in ``CHECKED``; None if it supports none.

    It runs with its default settings, and with the smallest, which cut contexts into most pieces.

    Args:
        briefly: only the first shape, with the default settings: on CUDA every other text takes
            two or three seconds to compile.
    """
    variant = load_manifest()[operation].variants[name]
    selector = Selector(device, load_manifest(), None)
    worst = None
    usable = [s for s in CHECKED[operation] if name in selector.usable(operation, s, dtype)]
    for shape in usable[:1] if briefly else usable:
        smallest = {key: min(setting.values) for key, setting in variant.settings.items()}
        probe = make_probe(shape, getattr(mx, dtype), ragged=True)
        several = smallest and not briefly
        for settings in (
            (variant.default_settings, smallest) if several else (variant.default_settings,)
        ):
            try:
                error = error_of(probe, name, settings)
            except Exception as problem:  # whatever it is, this variant cannot be used
                reason = f"{type(problem).__name__}: {problem}"
                return Verdict(operation, name, dtype, worst, reason)
            if not error <= tolerance(variant, dtype, device):
                return Verdict(
                    operation,
                    name,
                    dtype,
                    error if math.isfinite(error) else None,
                    f"its result is off by {error:.1e} at {shape}",
                )
            worst = max(error, worst or 0.0)
    return None if worst is None else Verdict(operation, name, dtype, worst, "")


def error_of(probe: Probe, variant: str, settings: Mapping[str, int]) -> float:
    """How far a variant's result is from float64."""
    return probe.difference(probe.result(variant, settings), probe.expected())


def check_all(device: DeviceName, dtypes: Sequence[str]) -> Iterator[Verdict]:
    """A verdict on every variant of every operation that runs on ``device``, the default device."""
    for operation, entry in load_manifest().items():
        for variant in entry.variants.values():
            for dtype in dtypes:
                verdict = check_variant(operation, variant.name, dtype, device)
                if verdict is not None:
                    yield verdict


def checked_variants(device: DeviceName, dtypes: Sequence[str] = DTYPES) -> Record:
    """Check the kernels that this machine's record has no verdict on, once, and select by it.

    Briefly: `quire doctor --kernels all` checks them at every shape. Everything else is made of
    MLX's operations and needs no check before use. Call it on the thread that uses MLX, with
    ``device`` as the default device. A record that cannot be written is used by this process all
    the same.

    Returns:
        The record, with a verdict on every kernel of ``device`` for ``dtypes``.
    """
    record = load_record(device)
    known = {(v.operation, v.variant, v.dtype) for v in record.verdicts}
    new = []
    for operation, entry in load_manifest().items():
        for variant in entry.variants.values():
            if variant.kind != "kernel" or device not in variant.devices:
                continue
            for dtype in dtypes:
                if (operation, variant.name, dtype) in known:
                    continue
                verdict = check_variant(operation, variant.name, dtype, device, briefly=True)
                if verdict is not None:
                    new.append(verdict)
    record = record.with_verdicts(new)
    for verdict in record.verdicts:
        if verdict.reason:
            logger.warning(
                "not using %s.%s for %s: %s",
                verdict.operation,
                verdict.variant,
                verdict.dtype,
                verdict.reason,
            )
    if new:
        try:
            save_record(record)
        except OSError as error:
            logger.warning("the kernels will be checked again at the next start: %s", error)
    use_record(device, record)
    return record
