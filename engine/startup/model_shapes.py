"""What a loaded model's layers compute, in the shapes by which kernels are checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.nn as nn
from msgspec import structs

from quire.engine.memory.budget import DeviceName
from quire.engine.model.block_weights import rotary_of, standard_part
from quire.engine.model.experts import KernelGLU, weights_of
from quire.engine.model.joined import SwigluMlp
from quire.engine.model.mixtures import mixture_shapes
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.residual import PreNormBlock
from quire.engine.model.rotated_attention import RotatedAttention
from quire.kernels.choice import check
from quire.kernels.choice.record import Record
from quire.kernels.choice.spec import AnySpec, Kind, Shape
from quire.kernels.experts import Quantized
from quire.kernels.experts_spec import EXPERT_MATMUL, QUANTIZED_EXPERT_MATMUL
from quire.kernels.fused_ops_spec import ADD_RMS_NORM, SWIGLU
from quire.kernels.kv_write_spec import GATHER_PAGES, KV_WRITE
from quire.kernels.matmul_spec import MATMUL
from quire.kernels.mixed_attention_spec import MIXED_ATTENTION
from quire.kernels.paged_decode_spec import PAGED_DECODE
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION
from quire.kernels.quantized_matmul_spec import QUANTIZED_MATMUL
from quire.kernels.rotate import Rotary
from quire.kernels.rotate_and_decode_spec import ROTATE_AND_DECODE
from quire.kernels.rotate_spec import ROTATE_AND_WRITE
from quire.kernels.routing_spec import TOP_EXPERTS, WEIGH_EXPERTS, RoutingShape
from quire.kernels.sampling_spec import SAMPLE
from quire.kernels.shared_context_spec import SHARED_CONTEXT
from quire.kernels.take_rows_spec import TAKE_ROWS

Fields = dict[str, int | bool]  # of a shape, by name

_ATTENTION = (
    *(PAGED_DECODE, SHARED_CONTEXT, PROMPT_ATTENTION, MIXED_ATTENTION),
    *(KV_WRITE, GATHER_PAGES),
)


def model_shapes(paged: PagedModel, block_size: int) -> Mapping[AnySpec, list[Shape]]:
    """For each operation the shapes that are checked, with the sizes of each kind of layer in place
    of their own; rows and contexts stay."""
    found: dict[AnySpec, list[Fields]] = {spec: [] for spec in _ATTENTION}
    for fields in _attention_fields(paged, block_size):
        for spec in _ATTENTION:
            found[spec].append(fields)
        dims = {fields["key_dim"], fields["value_dim"]}
        found.setdefault(TAKE_ROWS, []).extend({"dim": dim} for dim in dims)
    found |= _block_fields(paged, block_size)
    found |= _product_fields(paged.model)
    found |= _mixture_fields(paged.model)
    for use in [] if paged.states is None else paged.states.uses:
        found.setdefault(use.spec, []).append(_sizes(use.shape))
    found[SAMPLE] = [{"vocab": paged.vocab_size}]
    return {spec: _replaced(spec, each) for spec, each in found.items()}


def check_own_shapes(
    device: DeviceName, record: Record, dtypes: Sequence[str], own: Mapping[AnySpec, list[Shape]]
) -> Record:
    """Check kernels at the shapes of a model, once; one that fails there is dropped for models with
    these shapes only.

    Returns:
        ``record`` with these verdicts, and without those on other models' shapes.
    """
    known = {(v.operation, v.variant, v.dtype, v.shapes) for v in record.verdicts}
    names = {spec: _name(shapes) for spec, shapes in own.items() if shapes}
    new = []
    for spec, name in names.items():
        checked = replace(spec, checked=own[spec])
        for (variant, how), dtype in product(spec.variants.items(), dtypes):
            is_kernel = how.kind is Kind.KERNEL and device in how.devices
            if is_kernel and (spec.name, variant.value, dtype, name) not in known:
                verdict = check.check_variant(checked, variant, dtype, device, briefly=False)
                new += [] if verdict is None else [structs.replace(verdict, shapes=name)]
    record = record.with_verdicts(new)
    return check.use_verdicts(device, record, names.values(), saving=bool(new))


def _name(shapes: Sequence[Shape]) -> str:
    return hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()


def _replaced(spec: AnySpec, fields: list[Fields]) -> list[Shape]:
    shapes: dict[Shape, None] = {}
    for each in fields:
        for shape in spec.checked:
            known = shape._asdict()
            shapes[shape._replace(**{k: v for k, v in each.items() if k in known})] = None
    return list(shapes)


def _attention_fields(paged: PagedModel, block_size: int) -> Iterator[Fields]:
    for layer in paged.layers:
        assert layer.shape is not None, "a layer that the probe has not seen"
        for use in layer.uses:
            yield {
                "heads": use.heads,
                "kv_heads": layer.shape.key_heads,
                "key_dim": layer.shape.key_dim,
                "value_dim": layer.shape.value_dim,
                "block_size": block_size,
                "window": use.window is not None and not use.chunked,
                "sinks": use.sinks,
                "softcap": False,
            }


def _sizes(shape: Shape) -> Fields:
    """Of an operation on states, without what differs from step to step."""
    return {k: v for k, v in shape._asdict().items() if k not in ("rows", "sequences")}


def _block_fields(paged: PagedModel, block_size: int) -> dict[AnySpec, list[Fields]]:
    """Of standard blocks, whose steps alone are all fused, and of what is fused elsewhere."""
    part = standard_part(paged.model)
    if part is None:
        found = _adapted_fields(paged.model)
        modules = [module for _, module in paged.model.named_modules()]
        rotations = [
            _rotation(layer.rotary, layer.norms is not None, layer.is_gated)
            for layer in modules
            if isinstance(layer, RotatedAttention)
        ]
    else:
        first = part.model.layers[0]
        found = {
            ADD_RMS_NORM: [{"dim": first.input_layernorm.weight.size}],
            SWIGLU: [{"dim": first.mlp.gate_proj.weight.shape[0]}],
        }
        attention = first.self_attn
        rotations = [_rotation(rotary_of(attention.rope), "q_norm" in attention, gated=False)]
    rotated: list[Fields] = []
    for fields, rotation in product(_attention_fields(paged, block_size), rotations):
        names = ("heads", "kv_heads", "block_size", "window", "sinks")
        each = {name: fields[name] for name in names} | rotation
        each["head_dim"] = fields["key_dim"]
        rotated += [each] if each not in rotated else []
    return found | ({ROTATE_AND_WRITE: rotated, ROTATE_AND_DECODE: rotated} if rotated else {})


def _rotation(rotary: Rotary, norms: bool, gated: bool) -> Fields:
    return {
        "rotary_dim": rotary.dims,
        "traditional": rotary.traditional,
        "scaled": rotary.factor != 1,
        "norms": norms,
        "gated": gated,
    }


def _adapted_fields(model: nn.Module) -> dict[AnySpec, list[Fields]]:
    modules = [module for _, module in model.named_modules()]
    found: dict[AnySpec, set[int]] = {
        SWIGLU: {module.dim for module in modules if isinstance(module, SwigluMlp | KernelGLU)},
        ADD_RMS_NORM: {module.dim for module in modules if isinstance(module, PreNormBlock)},
    }
    return {spec: [{"dim": dim} for dim in sorted(dims)] for spec, dims in found.items() if dims}


def _product_fields(model: nn.Module) -> dict[AnySpec, list[Fields]]:
    """Of linear layers: for each number of inputs the one with the fewest outputs, of which kernels
    take any number in the same way."""
    dense: dict[int, Fields] = {}
    quantised: dict[tuple[int, ...], Fields] = {}
    experts: dict[int, Fields] = {}
    quantised_experts: dict[tuple[int, ...], Fields] = {}
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear) and module.mode == "affine":
            outputs, inputs = module.weight.shape[0], module.weight.shape[1] * 32 // module.bits
            key = inputs, module.bits, module.group_size
            sizes = {"inputs": inputs, "bits": module.bits, "group_size": module.group_size}
            _keep_least(quantised, key, {"outputs": outputs, **sizes})
        elif type(module) is nn.Linear:
            outputs, inputs = module.weight.shape
            _keep_least(dense, inputs, {"outputs": outputs, "dim": inputs})
        elif (matrices := weights_of(module)) is not None:
            fields = {"outputs": module.weight.shape[1], "dim": module.input_dims}
            if isinstance(matrices, Quantized):
                mode = {"bits": matrices.bits, "group_size": matrices.group_size}
                mode["mxfp4"] = matrices.mode == "mxfp4"
                key = fields["dim"], *mode.values()
                _keep_least(quantised_experts, key, fields | mode)
            else:
                _keep_least(experts, fields["dim"], fields)
    return {
        MATMUL: list(dense.values()),
        QUANTIZED_MATMUL: list(quantised.values()),
        EXPERT_MATMUL: list(experts.values()),
        QUANTIZED_EXPERT_MATMUL: list(quantised_experts.values()),
    }


def _mixture_fields(model: nn.Module) -> dict[AnySpec, list[Fields]]:
    found: dict[AnySpec, list[Fields]] = {TOP_EXPERTS: [], WEIGH_EXPERTS: []}
    for shape in mixture_shapes(model):
        spec = TOP_EXPERTS if isinstance(shape, RoutingShape) else WEIGH_EXPERTS
        fields = {k: v for k, v in shape._asdict().items() if k not in ("rows", "sorted")}
        if fields not in found[spec]:
            found[spec].append(fields)
    return found


def _keep_least(found: dict[Any, Fields], key: Any, fields: Fields) -> None:
    if key not in found or fields["outputs"] < found[key]["outputs"]:
        found[key] = fields
