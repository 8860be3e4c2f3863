"""What the layers of a model keep of a sequence, by what config.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Text = Mapping[str, Any]
Kind = Literal[
    "full",
    "window",
    "delta",
    "kda",
    "linear",
    "half linear",
    "mamba",
    "mamba2",
    "mamba and full",
    "conv",
    "none",
]

_NAMES: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("full_attention", "attention", "*"), "full"),
    "sliding_attention": "window",
    "linear_attention": "delta",
    **dict.fromkeys(("mamba", "M"), "mamba"),
    "conv": "conv",
    **dict.fromkeys(("-", "E"), "none"),
}
# Model types whose files in mlx-lm have sliding windows or chunks; of how many layers in a row the
# last one sees all tokens, where the configuration does not say.
_WINDOWED: Final[Mapping[str, int | None]] = {
    **dict.fromkeys(("gemma3", "gemma3_text"), 6),
    **dict.fromkeys(("gemma4", "gemma4_text"), 5),
    **dict.fromkeys(("cohere2", "muse_glimmer", "olmo3", "spark2_5"), 4),
    **dict.fromkeys(("gpt_oss", "step3p5"), 2),
    "plamo3": 8,
    **dict.fromkeys(("gemma3n", "gemma3n_text", "exaone4", "exaone_moe", "afmoe", "gear"), None),
    **dict.fromkeys(("laguna", "mellum", "ministral3", "llama", "llama4", "mistral"), None),
    "mimo_v2_flash": None,
}
_DELTA: Final = (
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("prism_hadamard_qwen35", "olmo_hybrid"),
)
# Of how many layers in a row the last one has attention, and what the others have.
_GROUPED: Final[Mapping[str, Kind]] = {
    "bailing_moe_v3": "kda",
    "bailing_hybrid": "linear",
    "bailing_moe_linear": "half linear",
}
# Whose last layers use the keys and values of others.
_SHARING: Final = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text")
# With recurrent layers of other kinds than those below, or windows in a loop.
UNKNOWN: Final = (
    *("baichuan_m1", "jamba", "mamba", "longcat_flash_ngram", "plamo2", "recurrent_gemma"),
    *("rwkv7", "iquestloopcoder"),
)


@dataclass(frozen=True)
class Kept:
    """Numbers that all layers together keep.

    Attributes:
        token: of each token.
        window_token: of each token that sliding windows, or chunks, still see.
        window: tokens that these see; 0: there are none.
        state: of a sequence, in the model's own type.
        float_state: of a sequence, in float32.
    """

    token: int = 0
    window_token: int = 0
    window: int = 0
    state: int = 0
    float_state: int = 0

    def plus(self, other: Kept) -> Kept:
        return Kept(
            self.token + other.token,
            self.window_token + other.window_token,
            max(self.window, other.window),
            self.state + other.state,
            self.float_state + other.float_state,
        )


def layers_keep(text: Text, types: set[str], layers: int, kv_size: int) -> Kept:
    """What all of them keep.

    Args:
        text: config.json, with what it says of text on top.
        types: model types, of the whole and of its text part.
        kv_size: numbers that a layer keeps of a token unless the configuration says otherwise.

    Raises:
        KeyError: the configuration lacks what layers of such a kind have.
    """
    kinds = _kinds(text, types, layers)
    shared = int(text.get("num_kv_shared_layers") or 0) if types & set(_SHARING) else 0
    kept = Kept()
    for kind in kinds[: len(kinds) - shared]:
        if kind in ("full", "mamba and full"):
            kept = kept.plus(Kept(token=_full_size(text, types, kv_size)))
        if kind == "window":
            size = _window_size(text, types, kv_size)
            kept = kept.plus(Kept(window_token=size, window=_window(text, types)))
        if kind in _STATES:
            kept = kept.plus(_STATES[kind](text))
    return kept


def _kinds(text: Text, types: set[str], layers: int) -> list[Kind]:
    kinds = _listed_kinds(text, types, layers)
    if not types & set(_WINDOWED):
        kinds = ["full" if kind == "window" else kind for kind in kinds]
    if "falcon_h1" in types:
        kinds = ["mamba and full"] * layers
    if "mamba2" in types:
        kinds = ["mamba2"] * layers
    return kinds


def _listed_kinds(text: Text, types: set[str], layers: int) -> list[Kind]:
    if pattern := text.get("hybrid_override_pattern"):
        return [_NAMES[each] for each in pattern]
    if linear := text.get("linear_attn_config"):
        return ["delta" if i + 1 in linear["kda_layers"] else "full" for i in range(layers)]
    if types & set(_DELTA) and "olmo_hybrid" not in types:
        return _every(int(text.get("full_attention_interval") or 4), layers, "delta")
    if "llama4" in types:
        return _every(4, layers, "window")
    if grouped := types & set(_GROUPED):
        size = int(text["layer_group_size"])
        whole = layers // size * size  # those behind the last whole group have attention too
        rest: list[Kind] = ["full"] * (layers - whole)
        return _every(size, whole, _GROUPED[grouped.pop()]) + rest
    if "mimo_v2_flash" in types:
        return ["window" if each == 1 else "full" for each in text["hybrid_layer_pattern"]]
    period = text.get("sliding_window_pattern")
    if isinstance(period, str):
        return [
            "window" if period[i % len(period)] == "L" and i + 1 < layers else "full"
            for i in range(layers)
        ]
    listed = text.get("layer_types")
    if listed:
        return [_NAMES.get(each, "full") for each in listed[:layers]]
    if indices := text.get("full_attn_idxs"):
        return ["full" if i in indices else "conv" for i in range(layers)]
    known = [_WINDOWED[each] for each in types & set(_WINDOWED)]
    every = period or next((each for each in known if each), None)
    return _every(int(every), layers, "window") if every else ["full"] * layers


def _every(period: int, layers: int, other: Kind) -> list[Kind]:
    return ["full" if (i + 1) % period == 0 else other for i in range(layers)]


# ---- attention


def _full_size(text: Text, types: set[str], kv_size: int) -> int:
    if types & {"gemma4", "gemma4_text"}:
        heads = text.get("num_key_value_heads") or 1
        if text.get("attention_k_eq_v"):
            heads = text.get("num_global_key_value_heads") or heads
        return 2 * int(heads) * int(text.get("global_head_dim") or text.get("head_dim") or 256)
    if "mimo_v2_flash" in types:
        return int(text["num_key_value_heads"]) * int(text["head_dim"] + text["v_head_dim"])
    if "step3p5" in types:
        return 2 * int(text["num_attention_groups"]) * int(text["head_dim"])
    return kv_size


def _window_size(text: Text, types: set[str], kv_size: int) -> int:
    if "mimo_v2_flash" in types:
        heads = int(text["swa_num_key_value_heads"])
        return heads * int(text["swa_head_dim"] + text["swa_v_head_dim"])
    if "step3p5" in types:
        other = text.get("attention_other_setting") or text
        return 2 * int(other["num_attention_groups"]) * int(text["head_dim"])
    return kv_size


def _window(text: Text, types: set[str]) -> int:
    if "plamo3" in types:
        return int(text["window_size"]) + 1
    if "llama4" in types:
        return int(text["attention_chunk_size"])
    return int(text.get("sliding_window") or text.get("sliding_window_size") or 0)


# ---- recurrence: a convolution's last inputs, and a matrix for each head


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
    def field(*names: str) -> int:
        return next(int(text[name]) for name in names if text.get(name) is not None)

    heads = field("mamba_num_heads", "mamba_n_heads")
    dim = field("mamba_head_dim", "mamba_d_head")
    size, groups = field("ssm_state_size", "mamba_d_state"), field("n_groups", "mamba_n_groups")
    past = field("conv_kernel", "mamba_d_conv") - 1
    width = heads * dim + 2 * groups * size
    return Kept(state=past * width, float_state=heads * dim * size)


def _conv(text: Text) -> Kept:
    return Kept(state=(int(text["conv_L_cache"]) - 1) * int(text["hidden_size"]))


_STATES: Final[Mapping[str, Callable[[Text], Kept]]] = {
    "delta": _delta,
    "kda": _kda,
    "linear": _linear,
    "half linear": _half_linear,
    "mamba2": _mamba2,
    "mamba": _mamba,
    "mamba and full": _mamba,
    "conv": _conv,
}
