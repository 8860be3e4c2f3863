"""A model folder with random weights: real shapes and a real tokenizer, no download.

The architecture is Hugging Face's Llama or Qwen3 with tied embeddings. The tokenizer is byte-level:
one token per byte, so an answer fed back as text gives exactly the tokens that were generated. Its
256 bytes and the special tokens are the whole tokenizer however large the model's vocabulary is.

With ``bits``, every matrix is as mlx-lm's convert leaves it, in MLX's affine mode: whole numbers of
that many bits packed into uint32 words, and for each group of 64 along a row a scale and a bias,
number * scale + bias being the weight.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from quire.loadtest.random_weights import (
    Constant,
    Dtype,
    Normal,
    PerRow,
    Tensor,
    Words,
    write_safetensors,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_EMBEDDING_STD = 0.02
# Embeddings are also the output head, so tokens with small rows have logits near zero and are
# never the most likely: a greedy answer is printable ASCII and runs to max_tokens.
_QUIET = 0.01
_GROUP_SIZE = 64

Architecture = Literal["llama", "qwen3"]


class ModelShape(msgspec.Struct, frozen=True):
    architecture: Architecture = "llama"
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 1536
    vocab: int = 2048
    max_position: int = 8192
    dtype: Dtype = "float32"
    bits: Literal[4, 8] | None = None  # of a quantized weight; None: all weights are of dtype

    def check(self) -> None:
        """Raises ValueError for a shape no such model has."""
        for name, value in msgspec.structs.asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError("--heads must be a multiple of --kv-heads")
        if self.head_dim % 2:
            raise ValueError("--head-dim must be even: rotary embeddings turn pairs")
        least = len(SPECIAL_TOKENS) + 256
        if self.vocab < least:
            raise ValueError(f"--vocab must be at least {least}: 256 bytes and the special tokens")
        if self.bits is not None:
            for name, size in (
                ("--hidden", self.hidden),
                ("--heads times --head-dim", self.heads * self.head_dim),
                ("--intermediate", self.intermediate),
            ):
                if size % _GROUP_SIZE:
                    raise ValueError(
                        f"{name} is {size}; with --bits it must be a multiple of {_GROUP_SIZE}"
                    )

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, before quantization, with tied embeddings."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.self_attn.q_proj.weight": (q, self.hidden),
                f"{prefix}.self_attn.k_proj.weight": (kv, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (kv, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, q),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
            if self.architecture == "qwen3":
                shapes |= {
                    f"{prefix}.self_attn.q_norm.weight": (self.head_dim,),
                    f"{prefix}.self_attn.k_norm.weight": (self.head_dim,),
                }
        return shapes | {"model.norm.weight": (self.hidden,)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights.values())

    def config(self) -> dict[str, object]:
        """The contents of config.json."""
        qwen3 = self.architecture == "qwen3"
        config: dict[str, object] = {
            "architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"],
            "model_type": self.architecture,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-6 if qwen3 else 1e-5,
            "rope_theta": 1e6 if qwen3 else 1e4,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": EOS_TOKEN_ID,
            "torch_dtype": self.dtype,
        }
        if self.bits is not None:
            quantization = {"group_size": _GROUP_SIZE, "bits": self.bits, "mode": "affine"}
            # mlx-lm writes it under both names.
            config |= {"quantization": quantization, "quantization_config": quantization}
        return config


SHAPES = {
    "small": ModelShape(),
    "qwen3-0.6b": ModelShape(
        architecture="qwen3",
        hidden=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=3072,
        vocab=151936,
        max_position=40960,
        dtype="bfloat16",
    ),
    "qwen3-4b": ModelShape(
        architecture="qwen3",
        hidden=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=9728,
        vocab=151936,
        max_position=40960,
        dtype="bfloat16",
    ),
    # The released 8B has an output head of its own, of the size of the embeddings.
    "qwen3-8b": ModelShape(
        architecture="qwen3",
        hidden=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=12288,
        vocab=151936,
        max_position=40960,
        dtype="bfloat16",
    ),
}


def row_scales(vocab: int) -> npt.NDArray[np.float32]:
    """How loud each token is in the output head, (vocab,): those that are no printable ASCII are
    never the most likely."""
    scales = np.full(vocab, _QUIET, np.float32)
    first_byte = len(SPECIAL_TOKENS)
    scales[first_byte + ord(" ") : first_byte + ord("~") + 1] = 1.0
    return scales


def _tensors(shape: ModelShape) -> list[Tensor]:
    tensors = []
    for name, dims in shape.weights.items():
        std: PerRow
        if name.endswith("norm.weight"):
            tensors.append(Tensor(name, dims, Constant(1.0)))
            continue
        if name == "model.embed_tokens.weight":
            std = _EMBEDDING_STD * row_scales(dims[0])
        else:
            # Keeps activations near 1 at any width, and lets attention move the answer: a server
            # that loses context gives other text.
            std = dims[1] ** -0.5
        if shape.bits is None:
            tensors.append(Tensor(name, dims, Normal(std)))
        else:
            tensors += _quantized(name.removesuffix(".weight"), dims, std, shape.bits)
    return tensors


def _quantized(layer: str, dims: tuple[int, ...], std: PerRow, bits: int) -> list[Tensor]:
    """Uniform weights with mean 0 and standard deviation ``std``.

    For ``dims`` (out, in): words (out, in * bits / 32), scales and biases (out, in / 64).
    """
    rows, columns = dims
    levels = 1 << bits
    scale = std * math.sqrt(12 / (levels**2 - 1))  # whole numbers have variance (levels² - 1) / 12
    groups = (rows, columns // _GROUP_SIZE)
    return [
        Tensor(f"{layer}.weight", (rows, columns * bits // 32), Words()),
        Tensor(f"{layer}.scales", groups, Constant(scale)),
        Tensor(f"{layer}.biases", groups, Constant(scale * -((levels - 1) / 2))),
    ]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, each mapped to its byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(others)
    }


def write_tokenizer(path: Path) -> None:
    # Imported here: the load client itself must stay light.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    first_byte = len(SPECIAL_TOKENS)
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {char: first_byte + byte for char, byte in _byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path))


def make_model(folder: Path, shape: ModelShape, seed: int = 0) -> int:
    """Write the folder and return the number of parameters.

    The same shape and seed give the same bytes. Raises ValueError for an impossible shape and
    FileExistsError if the folder has anything in it.
    """
    shape.check()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder")
    generation = {"bos_token_id": 0, "eos_token_id": EOS_TOKEN_ID, "do_sample": False}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[EOS_TOKEN_ID],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": shape.max_position,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", shape.config()),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_tokenizer(folder / "tokenizer.json")
    write_safetensors(folder / "model.safetensors", _tensors(shape), shape.dtype, seed)
    return shape.parameters
