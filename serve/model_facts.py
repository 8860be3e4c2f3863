"""What config.json and the safetensors headers tell of a model's memory, without loading it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.serve.kept import Kept
from quire.serve.layer_facts import NO_ATTENTION, layers_keep
from quire.serve.model_files import hub_error
from quire.serve.model_types import check_type
from quire.serve.served_model import ModelFilesError

Bits = int
GROUP_SIZE = 64  # of mlx-lm's quantisation unless told otherwise

_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_HALF = ("F16", "BF16")
# In the files, but left out by mlx-lm's text models.
_NOT_LOADED = ("vision_tower", "visual.", "multi_modal_projector", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * _DTYPE_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes in numbers, not bytes, unless the name says so."""

    layers: int
    hidden: int
    heads_size: int  # query heads x their size
    kv_size: int  # what most layers keep of a token: keys and values, or a latent
    intermediate: int  # of the feed-forward block; for experts, of all that a token uses
    vocab: int
    context: int | None  # the model's own
    bits: Bits  # of most weights
    parameters: int
    weight_bytes: int  # as they are stored
    number_bytes: int  # of an activation: what the floating-point weights are stored in
    widened_weight_bytes: int  # with half precision as float32, which is what the CPU computes in
    kept: Kept  # of a sequence, by all layers

    def quantised_bytes(self, bits: Bits) -> int:
        """Weights after mlx_lm.convert to ``bits``; 16: half precision."""
        if bits == 16:
            return 2 * self.parameters
        return math.ceil(self.parameters * (bits + 32 / GROUP_SIZE) / 8)


def read_facts(folder: Path) -> ModelFacts:
    """Raises :class:`ModelFilesError` where the files do not say enough."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"Cannot read {folder / 'config.json'}: {error}") from error
    check_type(config)
    return facts_of(config, dict(_tensors(folder)))


def facts_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelFacts:
    """The facts of a configuration and the tensors that belong to it, by name."""
    text = {**config, **(config.get("text_config") or {})}
    layers = _number(text, "num_hidden_layers", "n_layers", "num_layers", "n_layer")
    heads = 1
    if not _types(config, text) & set(NO_ATTENTION):
        heads = _number(text, "num_attention_heads", "n_heads", "n_head", "num_heads")
    hidden = _number(text, "hidden_size", "d_model", "n_embd", "dim")
    head_dim = text.get("head_dim") or hidden // heads
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(part in name for part in _NOT_LOADED)
        and not (text.get("tie_word_embeddings") and name.endswith("lm_head.weight"))
    }
    quantization = text.get("quantization") or {}
    kv_size = _kv_size(text, heads, head_dim)
    number_bytes = 4 if any(tensor.dtype == "F32" for tensor in kept.values()) else 2
    return ModelFacts(
        layers=layers,
        hidden=hidden,
        heads_size=heads * head_dim,
        kv_size=kv_size,
        intermediate=_intermediate(text, hidden),
        vocab=_number(text, "vocab_size"),
        context=text.get("max_position_embeddings"),
        bits=int(quantization.get("bits", 8 * number_bytes)),
        parameters=_parameters(kept, int(quantization.get("group_size", GROUP_SIZE))),
        weight_bytes=sum(tensor.bytes for tensor in kept.values()),
        number_bytes=number_bytes,
        widened_weight_bytes=sum(
            tensor.bytes * (2 if tensor.dtype in _HALF else 1) for tensor in kept.values()
        ),
        kept=_kept(config, text, layers, kv_size),
    )


def _types(config: Mapping[str, Any], text: Mapping[str, Any]) -> set[str]:
    """Model types, of the whole and of its text part."""
    return {str(each["model_type"]) for each in (config, text) if each.get("model_type")}


def _kept(config: Mapping[str, Any], text: Mapping[str, Any], layers: int, kv_size: int) -> Kept:
    try:
        return layers_keep(text, _types(config, text), layers, kv_size)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(
            f"config.json does not say {error}; its memory cannot be estimated."
        ) from error


def _kv_size(text: Mapping[str, Any], heads: int, head_dim: int) -> int:
    if latent := text.get("kv_lora_rank"):
        return int(latent) + _number(text, "qk_rope_head_dim")
    kv_heads = text.get("num_key_value_heads") or text.get("n_kv_heads") or heads
    return 2 * int(kv_heads) * head_dim


def _intermediate(text: Mapping[str, Any], hidden: int) -> int:
    dense = text.get("intermediate_size") or text.get("ffn_dim") or text.get("n_inner")
    if experts := text.get("num_experts_per_tok"):
        each = text.get("moe_intermediate_size") or dense or 4 * hidden
        shared = text.get("n_shared_experts") or 0
        return int(each) * (int(experts) + int(shared))
    return int(dense or 4 * hidden)


def _number(text: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(value := text.get(name), int) and value > 0:
            return value
    raise ModelFilesError(f"config.json does not say {names[0]}; its memory cannot be estimated.")


def _parameters(tensors: Mapping[str, Tensor], group_size: int) -> int:
    """Weights as the model's author counts them, packed ones unpacked."""
    count = 0
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and f"{stem}.weight" in tensors:
            continue
        scales = tensors.get(f"{stem}.scales") if kind == "weight" else None
        count += tensor.elements if scales is None else scales.elements * group_size
    return count


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise ModelFilesError(f"Cannot read the header of {file}: {error}") from error
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, Tensor(entry["dtype"], tuple(entry["shape"]))


def facts_from_hub(name: str) -> ModelFacts:
    """The same of a model on the Hugging Face Hub: only its headers are downloaded.

    Raises :class:`ModelFilesError`.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of retries
    try:
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_bytes())
        metadata = get_safetensors_metadata(name)
    except Exception as error:
        raise hub_error(name, error) from error
    check_type(config)
    tensors = {
        tensor_name: Tensor(info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for tensor_name, info in file.tensors.items()
    }
    return facts_of(config, tensors)
