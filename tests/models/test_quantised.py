"""Weights in every form that mlx-lm loads give the tokens of mlx-lm's own loop."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import model_zoo
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_by_mlx_lm
from model_zoo import FAMILIES, Family, build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.flat_linear import flatten_linears
from quire.engine.model.paging import page_model
from quire.engine.startup.loader import load_model

AFFINE = [
    {"mode": "affine", "bits": bits, "group_size": size}
    for bits, size in product((2, 3, 4, 5, 6, 8), (32, 64, 128))
]
FLOATS = [
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": "mxfp8", "bits": 8, "group_size": 32},
    {"mode": "nvfp4", "bits": 4, "group_size": 16},
]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}
PROMPTS = [[(7 * i + 3 * j) % 100 + 1 for i in range(n)] for j, n in enumerate((37, 5, 1))]
LENGTH = 8


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole groups."""
    for name in ("qwen3", "qwen3_moe"):
        family = FAMILIES[name]
        monkeypatch.setitem(
            model_zoo.FAMILIES, name, Family(family.module, {**family.config, **SIZES})
        )


def served(model: nn.Module, name: str) -> list[list[int]]:
    """Three requests side by side, whose prompts are cut into chunks."""
    flatten_linears(model)
    config = EngineConfig(num_blocks=20, block_size=16, max_num_seqs=4, max_num_batched_tokens=24)
    engine = Engine(page_model(model, name), config)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for index, prompt in enumerate(PROMPTS):
        engine.submit(GenerateRequest(index, prompt, LENGTH, SamplingParams(temperature=0)))
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


def alone(model: nn.Module) -> list[list[int]]:
    return [reference_generate(model, prompt, LENGTH)[0] for prompt in PROMPTS]


def name_of(form: dict[str, Any]) -> str:
    return f"{form['mode']}-{form['bits']}-{form['group_size']}"


@pytest.mark.parametrize("form", AFFINE + FLOATS, ids=name_of)
def test_each_form(form: dict[str, Any]) -> None:
    ours, theirs = build("qwen3"), build("qwen3")
    for model in (ours, theirs):
        nn.quantize(model, **form)
    assert served(ours, "qwen3") == alone(theirs)


@pytest.mark.parametrize("form", [AFFINE[7], *FLOATS], ids=name_of)
def test_experts(form: dict[str, Any]) -> None:
    ours, theirs = build("qwen3_moe"), build("qwen3_moe")
    for model in (ours, theirs):
        nn.quantize(model, **form)
    assert served(ours, "qwen3_moe") == alone(theirs)


def test_layers_of_several_forms_in_one_folder(tmp_path: Path) -> None:
    forms: dict[str, Any] = {}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        pick = [AFFINE[1], AFFINE[16], FLOATS[0], False][len(forms) % 4]
        forms[path] = pick
        return pick

    model = build("qwen3")
    nn.quantize(model, class_predicate=choose)
    family = model_zoo.FAMILIES["qwen3"]
    config = {"model_type": "qwen3", **model_zoo.BASE, **family.config}
    config["quantization"] = {"group_size": 64, "bits": 4, **forms}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    loaded = load_model(tmp_path, "cpu", 1 << 30, lambda *_: None)
    assert served(loaded.model, "qwen3") == alone(load_by_mlx_lm(tmp_path)[0])
