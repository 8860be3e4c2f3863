from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from quire.engine.startup.loader import load_model
from quire.loadtest import random_models, random_weights
from quire.loadtest.model_folder import SHAPES, SPECIAL_TOKENS, ModelShape, make_model
from quire.loadtest.published import PUBLISHED
from quire.loadtest.random_weights import (
    Constant,
    Normal,
    Tensor,
    bfloat16_bits,
    write_safetensors,
)

TINY = ModelShape(
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=48,
    vocab=300,
    max_position=256,
)


def _read(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    dtypes = {"F32": np.float32, "BF16": np.uint16}
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = np.frombuffer(data[8 + size + start : 8 + size + end], dtypes[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    assert max(e["data_offsets"][1] for e in header.values()) == len(data) - 8 - size
    return tensors


def test_weights_have_the_configured_shapes(tmp_path: Path) -> None:
    parameters = make_model(tmp_path, TINY)
    tensors = _read(tmp_path / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == TINY.weights
    assert sum(t.size for t in tensors.values()) == parameters
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == tensors["model.embed_tokens.weight"].shape[0]


def test_the_default_model_has_about_25_million_parameters() -> None:
    assert ModelShape().parameters == pytest.approx(25e6, rel=0.1)


def test_the_shapes_of_released_models() -> None:
    # From their model cards; this 8B has no output head of its own.
    assert SHAPES["qwen3-0.6b"].parameters == pytest.approx(0.596e9, rel=1e-3)
    assert SHAPES["qwen3-4b"].parameters == pytest.approx(4.02e9, rel=2e-3)
    assert SHAPES["qwen3-8b"].parameters == pytest.approx(8.19e9 - 151936 * 4096, rel=1e-3)


def test_mlx_lm_loads_a_made_qwen3(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    make_model(tmp_path, ModelShape(**{**_fields(TINY), "architecture": "qwen3"}))
    model, config = mlx_lm.load_model(tmp_path, strict=True)  # refuses missing and extra weights
    assert type(model).__module__ == "mlx_lm.models.qwen3"
    assert config["head_dim"] == TINY.head_dim


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlx_lm_loads_quantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, dtype: str
) -> None:
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    monkeypatch.setattr(random_weights, "_BLOCK_VALUES", 7 * 32)  # matrices of many blocks
    whole = msgspec.structs.replace(
        TINY, architecture="qwen3", hidden=128, head_dim=16, intermediate=192, dtype=dtype
    )
    make_model(tmp_path / "whole", whole)
    make_model(tmp_path / "quantized", msgspec.structs.replace(whole, bits=bits))

    with mx.stream(mx.cpu):
        plain, _ = mlx_lm.load_model(tmp_path / "whole")
        model, config = mlx_lm.load_model(tmp_path / "quantized")  # refuses missing and extra
        expected = {"group_size": 64, "bits": bits, "mode": "affine"}
        assert config["quantization"] == config["quantization_config"] == expected

        weights = dict(tree_flatten(plain.parameters()))
        layers = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
        matrices = {n for n, w in weights.items() if w.ndim == 2}
        quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding)
        assert {f"{n}.weight" for n, m in layers.items() if isinstance(m, quantized)} == matrices
        for name in matrices:
            layer = layers[name.removesuffix(".weight")]
            drawn = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, bits)
            assert drawn.dtype == weights[name].dtype
            assert drawn.shape == weights[name].shape
            std = weights[name].astype(mx.float32).std().item()
            assert drawn.astype(mx.float32).std().item() == pytest.approx(std, rel=0.05)
            assert abs(drawn.astype(mx.float32).mean().item()) < 0.05 * std

        logits = model(mx.array([[5, 6, 7]])).astype(mx.float32)
        assert mx.isfinite(logits).all().item()
        assert logits.std().item() > 0.01
        assert not mx.allclose(logits[0, 0], logits[0, 2]).item()


def test_blocks_are_written_in_order_and_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_weights, "_BLOCK_VALUES", 7 * 32)  # the last block is smaller
    stds = np.linspace(0.01, 10, 500, dtype=np.float32)
    tensors = [
        Tensor("plain", (300, 32), Normal(0.5)),
        Tensor("rows", (500, 32), Normal(stds)),
        Tensor("ones", (40,), Constant(1.0)),
    ]
    write_safetensors(tmp_path / "x", tensors, "float32", seed=3)
    read = _read(tmp_path / "x")
    assert (read["ones"] == 1).all()
    assert read["plain"].std() == pytest.approx(0.5, rel=0.05)
    assert abs(read["plain"].mean()) < 0.02
    ratios = read["rows"].std(axis=1) / stds
    assert ratios.mean() == pytest.approx(1, rel=0.05)
    assert 0.5 < ratios.min() < ratios.max() < 1.6
    drawn = np.concatenate([read["plain"].ravel(), (read["rows"] / stds[:, None]).ravel()])
    assert len(np.unique(drawn)) > 0.99 * len(drawn)  # no stream is used twice


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / folder, TINY, seed)
    a, b, c = ((tmp_path / f / "model.safetensors").read_bytes() for f in "abc")
    assert a == b != c


def test_any_text_round_trips_through_one_token_per_byte(tmp_path: Path) -> None:
    make_model(tmp_path, TINY)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = " two  words\n\tünï \N{GRINNING FACE}\x00"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("".join(SPECIAL_TOKENS)).ids == [0, 1, 2]
    assert tokenizer.decode([len(SPECIAL_TOKENS) + ord("A")]) == "A"


def test_greedy_answers_are_printable(tmp_path: Path) -> None:
    make_model(tmp_path, TINY)
    embeddings = _read(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    states = np.random.default_rng(0).standard_normal((500, TINY.hidden)).astype(np.float32)
    best = (states @ embeddings.T).argmax(axis=1) - len(SPECIAL_TOKENS)
    assert best.min() >= ord(" ")
    assert best.max() <= ord("~")


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 1e-3], np.float32)
    as_float = (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)
    assert as_float[:4].tolist() == [1.0, 1.0, 1.015625, -2.5]
    assert as_float[4] == pytest.approx(1e-3, rel=2**-8)


def test_bfloat16_halves_the_file(tmp_path: Path) -> None:
    make_model(tmp_path / "a", TINY)
    make_model(tmp_path / "b", ModelShape(**{**_fields(TINY), "dtype": "bfloat16"}))
    full, half = ((tmp_path / f / "model.safetensors").stat().st_size for f in "ab")
    assert half < 0.6 * full


def _fields(shape: ModelShape) -> dict[str, object]:
    return {name: getattr(shape, name) for name in shape.__struct_fields__}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 0, "--layers"),
        ("heads", 3, "multiple of --kv-heads"),
        ("head_dim", 7, "--head-dim"),
        ("vocab", 200, "--vocab"),
        ("bits", 4, "--hidden is 32; .* multiple of 64"),
    ],
)
def test_impossible_shapes(tmp_path: Path, field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tmp_path, ModelShape(**{**_fields(TINY), field: value}))


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_model(tmp_path, TINY)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_published_model_is_written_as_mlx_lm_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {
        **{"hidden_size": 64, "vocab_size": 320, "num_attention_heads": 2, "head_dim": 32},
        **{"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 32},
        **{"linear_value_head_dim": 32},
    }
    own = PUBLISHED["Qwen3.6-35B-A3B"]
    monkeypatch.setitem(PUBLISHED, "narrow", own | narrow)
    made: list[Any] = []
    make = random_models.build_model

    def noted(model: random_models.Model) -> Any:
        made[:] = make(model)
        return made

    monkeypatch.setattr(random_models, "build_model", noted)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "m"), "narrow:4:4"])
    monkeypatch.setattr(random_models, "prepare_mlx", lambda: None)  # MLX has been imported
    assert random_models.main() == 0
    loaded = load_model(tmp_path / "m", "cpu", 1 << 30, lambda *_: None)
    assert (loaded.name, loaded.dtype) == ("qwen3_5_moe", "4-bit")
    expected = dict(tree_flatten(made[0].parameters()))
    found = dict(tree_flatten(loaded.model.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    with pytest.raises(SystemExit):
        random_models.main()  # the folder is there
