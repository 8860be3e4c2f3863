"""What a recurrent layer keeps of a sequence: a convolution's last inputs, and a matrix for each
head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

from quire.serve.kept import Kept, Text

Recurrence = Literal[
    "delta",
    "kda",
    "linear",
    "half linear",
    "mamba",
    "mamba1",
    "mamba2",
    "jamba",
    "plamo2",
    "lru",
    "rwkv7",
    "last keys",
    "last window keys",
    "last tokens",
    "conv",
]


def _delta(text: Text) -> Kept:
    if linear := text.get("linear_attn_config"):
        heads, dim = int(linear["num_heads"]), int(linear["head_dim"])
        past = int(linear["short_conv_kernel_size"]) - 1
        return Kept(state=past * 3 * heads * dim, float_state=heads * dim * dim)
    key_heads, heads = int(text["linear_num_key_heads"]), int(text["linear_num_value_heads"])
    key_dim, dim = int(text["linear_key_head_dim"]), int(text["linear_value_head_dim"])
    width = 2 * key_heads * key_dim + heads * dim
    past = int(text["linear_conv_kernel_dim"]) - 1
    return Kept(state=past * width, float_state=heads * dim * key_dim)


def _kda(text: Text) -> Kept:
    heads, dim = int(text["num_attention_heads"]), int(text["head_dim"])
    past = int(text.get("short_conv_kernel_size") or 4) - 1
    return Kept(state=past * 3 * heads * dim, float_state=heads * dim * dim)


def _linear(text: Text) -> Kept:
    """As ``bailing_hybrid`` keeps it."""
    heads = int(text["num_attention_heads"])
    dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    return Kept(float_state=heads * dim * dim)


def _half_linear(text: Text) -> Kept:
    """As ``bailing_moe_linear`` keeps it, whatever it says of the size of heads."""
    heads = int(text["num_attention_heads"])
    return Kept(state=heads * (int(text["hidden_size"]) // heads) ** 2)


def _mamba2(text: Text) -> Kept:
    heads, dim = int(text["num_heads"]), int(text["head_dim"])
    size = int(text.get("ssm_state_size") or text["state_size"])
    width = heads * dim + 2 * int(text["n_groups"]) * size
    past = int(text["conv_kernel"]) - 1
    return Kept(state=past * width, float_state=heads * dim * size)


def _mamba(text: Text) -> Kept:
    heads = _field(text, "mamba_num_heads", "mamba_n_heads")
    dim = _field(text, "mamba_head_dim", "mamba_d_head")
    size = _field(text, "ssm_state_size", "mamba_d_state")
    groups = _field(text, "n_groups", "mamba_n_groups")
    past = _field(text, "conv_kernel", "mamba_d_conv") - 1
    width = heads * dim + 2 * groups * size
    return Kept(state=past * width, float_state=heads * dim * size)


def _mamba1(text: Text) -> Kept:
    """Mamba's first form."""
    width = _field(text, "intermediate_size", "d_inner")
    past = _field(text, "conv_kernel", "d_conv") - 1
    return Kept(state=width * (past + _field(text, "state_size", "d_state")))


def _jamba(text: Text) -> Kept:
    width = int(text["mamba_expand"]) * int(text["hidden_size"])
    return Kept(state=width * (int(text["mamba_d_conv"]) - 1 + int(text["mamba_d_state"])))


def _plamo2(text: Text) -> Kept:
    heads, dim = int(text["mamba_num_heads"]), int(text["hidden_size_per_head"])
    past = int(text["mamba_d_conv"]) - 1
    return Kept(state=past * heads * dim, float_state=heads * dim * int(text["mamba_d_state"]))


def _lru(text: Text) -> Kept:
    """As ``recurrent_gemma`` keeps it: its file has layers as wide as the model only."""
    return Kept(state=int(text["conv1d_width"]) * int(text["hidden_size"]))


def _rwkv7(text: Text) -> Kept:
    """The last token of both halves of a layer, and a matrix for each head."""
    hidden = int(text["hidden_size"])
    return Kept(state=(2 + int(text["head_dim"])) * hidden)


def _last_keys(text: Text) -> Kept:
    """As ``baichuan_m1`` keeps it: the last token's keys and values, before they are mixed."""
    heads = int(text["num_key_value_heads"])
    return Kept(state=2 * heads * (int(text["hidden_size"]) // int(text["num_attention_heads"])))


def _last_window_keys(text: Text) -> Kept:
    return Kept(state=swa_size(text))


def swa_size(text: Text) -> int:
    """Of a token, in layers of ``baichuan_m1`` with a window."""
    heads = _field(text, "num_swa_attention_heads", "num_attention_heads")
    kv_heads = _field(text, "num_swa_key_value_heads", "num_key_value_heads")
    return 2 * kv_heads * (int(text["hidden_size"]) // heads)


def _last_tokens(text: Text) -> Kept:
    """As ``longcat_flash_ngram`` keeps them: ids of eight bytes."""
    return Kept(float_state=2 * (int(text["emb_neighbor_num"]) - 1))


def _conv(text: Text) -> Kept:
    return Kept(state=(int(text["conv_L_cache"]) - 1) * int(text["hidden_size"]))


def _field(text: Text, *names: str) -> int:
    """The first that is there. Raises KeyError."""
    found = next((name for name in names if text.get(name) is not None), names[0])
    return int(text[found])


# Raise KeyError where the configuration lacks what layers of such a kind have.
STATES: Final[Mapping[Recurrence, Callable[[Text], Kept]]] = {
    "delta": _delta,
    "kda": _kda,
    "linear": _linear,
    "half linear": _half_linear,
    "mamba": _mamba,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "jamba": _jamba,
    "plamo2": _plamo2,
    "lru": _lru,
    "rwkv7": _rwkv7,
    "last keys": _last_keys,
    "last window keys": _last_window_keys,
    "last tokens": _last_tokens,
    "conv": _conv,
}
