"""Which models can be served, by config.json alone: before weights are downloaded or loaded."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quire.serve.served_model import ModelFilesError

_INDEXER = "an indexer layer selects keys by reading the cached keys themselves"
_OWN_SOFTMAX = "writes out its softmax instead of calling scaled_dot_product_attention"
_DYNAMIC_ROPE = "dynamic rope: the rotation of every token changes with the length of its sequence"
# Of mlx-lm's files, those that cannot run over pages. The engine finds that out by itself, but only
# with the weights; two more, which need Metal to run at all, are left to it.
_UNSERVED = {
    "afm7": "its last layers reuse the keys of an earlier layer and read their length",
    "deepseek_v32": _INDEXER,
    "deepseek_v41": "keeps compressed keys and index state in a cache class of its own",
    "glm_moe_dsa": _INDEXER,
    "gpt_bigcode": "builds its position ids on the host from one offset for the whole batch",
    "olmo": _OWN_SOFTMAX,
    "phi3small": _OWN_SOFTMAX,
    "plamo": "tiles the cached keys itself before attention",
}
# Files that take a rope_scaling of type "dynamic" as it is said; others pass it by.
_SCALED = frozenset(
    (
        *("afmoe", "apertus", "bailing_hybrid", "bailing_moe", "bailing_moe_linear"),
        *("bailing_moe_v3", "deepseek_v3", "dots1", "exaone", "exaone4", "exaone_moe"),
        *("falcon_h1", "gear", "gemma3_text", "glm4_moe_lite", "gpt_oss", "granite"),
        *("granitemoe", "internlm2", "iquestloopcoder", "llama", "longcat_flash"),
        *("longcat_flash_ngram", "mimo", "minicpm", "nanbeige", "olmo2", "olmo3", "olmoe"),
        *("qwen2", "qwen3", "qwen3_next", "seed_oss", "smollm3", "step3p5", "telechat3"),
        "youtu_llm",
    )
)


def check_type(config: Mapping[str, Any]) -> None:
    """Raises :class:`ModelFilesError` for a model that mlx-lm has no file for, or that cannot be
    served."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelFilesError("config.json does not say model_type.")
    if kind not in _files_by_type():
        raise ModelFilesError(f"mlx-lm {version('mlx-lm')} knows no model of type {kind!r}.")
    if reason := why_unserved(config):
        raise ModelFilesError(f"This model, of type {kind!r}, cannot be served: {reason}.")


def why_unserved(config: Mapping[str, Any]) -> str | None:
    """What a model does that pages of keys and values cannot follow; None: nothing is known."""
    kind = _files_by_type().get(config["model_type"], config["model_type"])
    text = {**config, **_object(config.get("text_config"))}
    scaling = _object(text.get("rope_scaling"))
    if (scaling.get("type") or scaling.get("rope_type")) == "dynamic" and kind in _SCALED:
        return _DYNAMIC_ROPE
    if kind == "gear" and text.get("attn_logit_softcapping"):
        return _OWN_SOFTMAX
    if kind == "minimax_m3_vl" and _has_sparse_layers(text):
        return _INDEXER
    return _UNSERVED.get(kind)


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _has_sparse_layers(text: Mapping[str, Any]) -> bool:
    settings = {**text, **_object(text.get("sparse_attention_config"))}
    if settings.get("sparse_block_size", settings.get("index_block_size")) is None:
        return False
    for name, dense in (("layer_types", "full_attention"), ("sparse_attention_freq", 0)):
        if isinstance(layers := settings.get(name), list):
            return any(layer != dense for layer in layers)
    return True


@cache
def _files_by_type() -> Mapping[str, str]:
    """mlx-lm's file for each type that it knows. They are read, since to import them takes
    seconds."""
    package = find_spec("mlx_lm")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent
    others: dict[str, str] = {}
    for node in ast.parse((folder / "utils.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            others = ast.literal_eval(node.value)
    files = {path.stem: path.stem for path in (folder / "models").glob("*.py")}
    return files | {name: other for name, other in others.items() if other in files}
