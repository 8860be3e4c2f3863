"""What the layers of a model keep of a sequence, by what config.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

from quire.serve.kept import Kept, Text
from quire.serve.state_facts import STATES, Recurrence, swa_size

Kind = Literal["full", "window", "none"] | Recurrence

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
NO_ATTENTION: Final = ("mamba", "falcon_mamba", "mamba2", "rwkv7")
# Whose files in mlx-lm keep keys and values of every head in place of the latent.
_UNFOLDED: Final = ("deepseek_v2", "minicpm3", "youtu_llm")


def layers_keep(text: Text, types: set[str], layers: int, kv_size: int) -> Kept:
    """What all of them keep.

    Args:
        text: config.json, with what it says of text on top.
        types: model types, of the whole and of its text part.
        kv_size: numbers that a layer keeps of a token unless the configuration says otherwise.

    Raises:
        KeyError: the configuration lacks what layers of such a kind have.
    """
    if "nemotron-nas" in types:
        return _by_blocks(text)
    kinds = _kinds(text, types, layers)
    shared = int(text.get("num_kv_shared_layers") or 0) if types & set(_SHARING) else 0
    kept = Kept()
    for kind in kinds[: len(kinds) - shared]:
        if kind == "full":
            kept = kept.plus(Kept(token=_full_size(text, types, kv_size)))
        elif kind == "window":
            size = _window_size(text, types, kv_size)
            kept = kept.plus(Kept(window_token=size, window=_window(text, types)))
        elif kind != "none":
            kept = kept.plus(STATES[kind](text))
    return kept


def _kinds(text: Text, types: set[str], layers: int) -> list[Kind]:
    """Of each layer, one or two."""
    if special := types & set(_SPECIAL):
        return _SPECIAL[special.pop()](text, layers)
    kinds = _listed_kinds(text, types, layers)
    if not types & set(_WINDOWED):
        kinds = ["full" if kind == "window" else kind for kind in kinds]
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


# ---- models that are like no other


def _repeat(count: int, *kinds: Kind) -> list[Kind]:
    return list(kinds) * count


def _jamba(text: Text, layers: int) -> list[Kind]:
    period, offset = int(text["attn_layer_period"]), int(text["attn_layer_offset"])
    return ["full" if i % period == offset else "jamba" for i in range(layers)]


def _plamo2(text: Text, layers: int) -> list[Kind]:
    step = int(text["mamba_step"])
    if text.get("mamba_enabled") is False:
        return _repeat(layers, "full")
    if layers <= step // 2:
        return [*_repeat(layers - 1, "plamo2"), "full"]
    return ["full" if i % step == step // 2 else "plamo2" for i in range(layers)]


def _recurrent_gemma(text: Text, layers: int) -> list[Kind]:
    block = text.get("block_types") or text["_block_types"]
    kinds: list[Kind] = ["lru" if kind == "recurrent" else "window" for kind in block]
    return [kinds[i % len(kinds)] for i in range(layers)]


def _baichuan_m1(text: Text, layers: int) -> list[Kind]:
    windows = text["sliding_window_layers"]
    kinds: list[Kind] = []
    for i in range(layers):
        kinds += ["window", "last window keys"] if i in windows else ["full", "last keys"]
    return kinds


_SPECIAL: Final[Mapping[str, Callable[[Text, int], list[Kind]]]] = {
    "baichuan_m1": _baichuan_m1,
    "falcon_h1": lambda text, layers: _repeat(layers, "mamba", "full"),
    "falcon_mamba": lambda text, layers: _repeat(layers, "mamba1"),
    "iquestloopcoder": lambda text, layers: _repeat(layers, "full", "window"),
    "jamba": _jamba,
    "longcat_flash": lambda text, _: _repeat(int(text["num_layers"]), "full", "full"),
    "longcat_flash_ngram": lambda text, _: [
        *_repeat(int(text["num_layers"]), "full", "full"),
        "last tokens",
    ],
    "mamba": lambda text, layers: _repeat(layers, "mamba1"),
    "mamba2": lambda text, layers: _repeat(layers, "mamba2"),
    "nanbeige": lambda text, layers: _repeat(layers * int(text.get("num_loops") or 1), "full"),
    "plamo2": _plamo2,
    "recurrent_gemma": _recurrent_gemma,
    "rwkv7": lambda text, layers: _repeat(layers, "rwkv7"),
}


def _by_blocks(text: Text) -> Kept:
    """``nemotron-nas``, whose layers differ in their groups of heads; some have no attention."""
    heads = int(text["num_attention_heads"])
    dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    parts = [block["attention"] for block in text["block_configs"]]
    groups = [part.get("n_heads_in_group") for part in parts if not _has_none(part)]
    return Kept(token=sum(2 * (heads // int(group)) * dim for group in groups))


def _has_none(part: Text) -> bool:
    return bool(part.get("no_op") or part.get("replace_with_linear"))


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
    if "plamo2" in types:
        return 2 * int(text["num_key_value_heads"]) * int(text["hidden_size_per_head"])
    if types & set(_UNFOLDED):
        heads = int(text["num_attention_heads"])
        key_dim = int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"])
        value_dim = int(text["hidden_size"]) // heads
        if "minicpm3" not in types:
            value_dim = int(text["v_head_dim"])
        return heads * (key_dim + value_dim)
    return kv_size


def _window_size(text: Text, types: set[str], kv_size: int) -> int:
    if "mimo_v2_flash" in types:
        heads = int(text["swa_num_key_value_heads"])
        return heads * int(text["swa_head_dim"] + text["swa_v_head_dim"])
    if "step3p5" in types:
        other = text.get("attention_other_setting") or text
        return 2 * int(other["num_attention_groups"]) * int(text["head_dim"])
    return swa_size(text) if "baichuan_m1" in types else kv_size


def _window(text: Text, types: set[str]) -> int:
    if "plamo3" in types:
        return int(text["window_size"]) + 1
    if "llama4" in types:
        return int(text["attention_chunk_size"])
    if "recurrent_gemma" in types:
        return int(text["attention_window_size"])
    if "iquestloopcoder" in types:
        return int(text.get("loop_window_size") or 64)
    return int(text.get("sliding_window") or text.get("sliding_window_size") or 0)
