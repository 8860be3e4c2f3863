"""Settings that cannot work are refused before anything is loaded; what may work is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from live_server import SMALL

from quire.loadtest.model_folder import make_model
from quire.serve.preflight import check_settings
from quire.serve.settings import ServeSettings, SettingsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    make_model(path, SMALL)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64}, "must be larger than --max-num-seqs"),
        ({"max_model_len": 1025}, "more than the model's context of 1024"),
        ({"kv_cache_memory": 1024}, "room for 64"),
        ({"kv_cache_memory": 128 * 1024, "max_model_len": 1024}, "fewer than --max-model-len 1024"),
    ],
)
def test_what_cannot_work_is_refused(settings, message, folder):
    with pytest.raises(SettingsError, match=message):
        check_settings(ServeSettings(device="cpu", **settings), folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 65, "max_num_seqs": 64},
        {"max_model_len": 1024},
        {"kv_cache_memory": 512 * 1024, "max_model_len": 1024},
    ],
)
def test_what_may_work_is_left_to_the_worker(settings, folder):
    check_settings(ServeSettings(device="cpu", **settings), folder)


def test_models_whose_layers_differ_are_left_to_the_worker(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["linear_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    check_settings(ServeSettings(kv_cache_memory=1024), tmp_path)
