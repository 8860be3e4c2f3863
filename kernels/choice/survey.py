"""What is in use on this machine over shapes that models bring, and where a kernel is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import mlx.core as mx

from quire.kernels.choice.chips import DeviceName
from quire.kernels.choice.manifest import load_manifest
from quire.kernels.choice.selection import Selector, UnsupportedShape, Why, selector_for
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
    WriteShape,
    describe,
)
from quire.kernels.choice.verify import CHECKED, error_of, tolerance
from quire.kernels.probes import make_probe

# Head sizes of keys and values found in models, the last two of latent attention.
_HEAD_DIMS = (
    *((dim, dim) for dim in (32, 40, 64, 80, 96, 112, 120, 128, 192, 256, 512)),
    (192, 128),
    (576, 512),
)
_BLOCK_SIZES = (4, 8, 16, 32, 64)
_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Use:
    """What computes a shape here, and how far its result is from float64."""

    operation: str
    shape: str
    dtype: str
    variant: str
    settings: Mapping[str, int]
    why: str
    error: float | None
    limit: float
    problem: str = ""

    @property
    def agrees(self) -> bool:
        return not self.problem and self.error is not None and self.error <= self.limit


def in_use(device: DeviceName, dtypes: Sequence[str]) -> Iterator[Use]:
    """The choice for every shape that is checked, run and compared; ``device`` is the default."""
    selector = selector_for(device)
    for operation, shapes in CHECKED.items():
        variants = load_manifest()[operation].variants
        for shape, dtype in product(shapes, dtypes):
            try:
                choice = selector.select(operation, shape, getattr(mx, dtype))
            except UnsupportedShape:
                continue  # the survey lists it
            probe = make_probe(shape, getattr(mx, dtype), ragged=True)
            error, problem = None, ""
            try:
                error = error_of(probe, choice.variant, choice.settings)
            except Exception as failure:  # shown to the user, and counted as disagreement
                problem = f"{type(failure).__name__}: {failure}"
            yield Use(
                operation,
                describe(shape),
                dtype,
                choice.variant,
                choice.settings,
                str(choice.why),
                error,
                tolerance(variants[choice.variant], dtype, device),
                problem,
            )


def survey_gaps(device: DeviceName, dtypes: Sequence[str]) -> list[str]:
    """One line per shape of the survey that no kernel of ``device`` supports, and what runs."""
    selector = selector_for(device)
    lines: dict[str, list[str]] = {}
    for operation, shape, label in _survey():
        for dtype in dtypes:
            if instead := _instead(selector, operation, shape, dtype):
                lines.setdefault(f"{operation} {label}: {instead}", []).append(dtype)
    return [
        line if len(found) == len(dtypes) else f"{line} ({', '.join(found)})"
        for line, found in lines.items()
    ]


def _instead(selector: Selector, operation: str, shape: AnyShape, dtype: str) -> str | None:
    try:
        choice = selector.select(operation, shape, getattr(mx, dtype))
    except UnsupportedShape:
        return "nothing supports it"
    return f"{choice.variant} runs instead" if choice.why is Why.GAP else None


def _survey() -> Iterator[tuple[str, AnyShape, str]]:
    """Shapes that differ from a common one in one respect, with a name for that."""
    for key_dim, value_dim in _HEAD_DIMS:
        dims = f"head_dim {key_dim}" if key_dim == value_dim else f"dims {key_dim} and {value_dim}"
        decode = DecodeShape(8, 1024, 32, 8, key_dim, value_dim, 16)
        yield "paged_decode", decode, dims
        yield "prompt_attention", PromptShape(256, 256, *decode[2:7]), dims
        yield "mixed_attention", MixedShape(8, 512, *decode[2:7]), dims
        yield "kv_write", WriteShape(8, 8, key_dim, value_dim, 16), dims
        yield "gather_pages", GatherShape(1, 64, 8, key_dim, value_dim, 16), dims
        yield "take_rows", RowsShape(256, key_dim), dims
    for block_size in _BLOCK_SIZES:
        label = f"block_size {block_size}"
        yield "paged_decode", DecodeShape(8, 1024, 32, 8, 128, 128, block_size), label
        yield "kv_write", WriteShape(8, 8, 128, 128, block_size), label
    for feature in ("window", "sinks", "softcap"):
        decode = DecodeShape(8, 1024, 32, 8, 128, 128, 16)._replace(**{feature: True})
        prompt = PromptShape(256, 256, 32, 8, 128, 128, 16)._replace(**{feature: True})
        yield "paged_decode", decode, feature
        yield "prompt_attention", prompt, feature
        mixed = MixedShape(8, 512, 32, 8, 128, 128, 16)._replace(**{feature: True})
        yield "mixed_attention", mixed, feature
    for norms in (False, True):
        rotation = RotateShape(8, 32, 8, 128, 128, 16, norms=norms)
        label = "with norms" if norms else "without norms"
        yield "rotate_and_write", rotation, label
        rotating = RotatingDecodeShape(8, 1024, 32, 8, 128, 128, 16, norms=norms)
        yield "rotate_and_decode", rotating, label
    yield "add_rms_norm", NormShape(8, 4096), "dim 4096"
    yield "swiglu", GateShape(8, 12288), "dim 12288"
    yield "matmul", DenseShape(16, 4096, 4096), "dim 4096"
    for bits, group_size in product(_BITS, _GROUP_SIZES):
        matmul = MatmulShape(16, 4096, 4096, bits, group_size)
        yield "quantized_matmul", matmul, f"{bits} bits, group_size {group_size}"
    for filtered in (False, True):
        yield "sample", SampleShape(16, 151936, filtered), "filtered" if filtered else "unfiltered"
