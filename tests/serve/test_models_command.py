"""`quire models`: what the shared cache holds, with a cache folder of the test's own."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import constants

from quire.serve import cli, local_models
from quire.serve.model_files import resolve_model

DEMO = resolve_model(None).path
FOLDERS = ("models--acme--small", "models--acme--gguf", "datasets--acme--texts")


def commit(folder: str) -> str:
    return hashlib.sha1(folder.encode()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Three models: one that can be served, one in another format, and a data set."""
    hub = tmp_path / "hub"
    for folder in FOLDERS:
        snapshot = hub / folder / "snapshots" / commit(folder)
        snapshot.mkdir(parents=True)
        (hub / folder / "blobs").mkdir()
        (hub / folder / "refs").mkdir()
        (hub / folder / "refs" / "main").write_text(commit(folder))
        if folder == "models--acme--small":
            for file in DEMO.iterdir():
                blob = hub / folder / "blobs" / file.name
                shutil.copy(file, blob)
                (snapshot / file.name).symlink_to(blob)
        else:
            (snapshot / "config.json").write_text("{}")
            (snapshot / "x.gguf").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    return hub


def test_the_list_shows_what_can_be_served(cache, capsys):
    assert cli.main(["models", "list"]) == 0
    output = capsys.readouterr()
    rows = [line.split() for line in output.out.splitlines()]
    assert rows[0] == ["NAME", "TYPE", "SIZE", "LAST", "USED"]
    assert [row[0] for row in rows[1:]] == ["quire-demo", "acme/small"]
    assert rows[2][1] == rows[1][1] == "qwen3"
    assert "1 more in the cache cannot be served" in output.err


def test_programs_are_told_why_a_model_is_left_out(cache, capsys):
    assert cli.main(["models", "list", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert list(models) == ["quire-demo", "acme/gguf", "acme/small"]
    assert models["acme/small"]["problem"] == ""
    assert models["acme/small"]["size"] == sum(file.stat().st_size for file in DEMO.iterdir())
    assert "GGUF weights are not supported" in models["acme/gguf"]["problem"]
    assert str(cache) not in models["acme/gguf"]["problem"]


def test_what_the_cache_holds_can_be_served_as_it_is(cache):
    [(name, folder)] = local_models.models_in("cache")
    assert name == "acme/small"
    assert (folder / "config.json").is_file()


def test_no_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert [model.name for model in local_models.local_models()] == ["quire-demo"]


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 1), ("no", 1)])
def test_a_model_is_deleted_when_asked_and_told(cache, capsys, monkeypatch, answer, code):
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert cli.main(["models", "rm", "acme/small"]) == code
    assert (cache / "models--acme--small").exists() == bool(code)
    assert (cache / "models--acme--gguf").exists()


def test_nobody_there_to_answer_is_a_no(cache, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(["models", "rm", "acme/small"]) == 1
    assert (cache / "models--acme--small").exists()
    assert "--yes" in capsys.readouterr().out


def test_an_estimate_of_what_is_here_asks_nobody(cache, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["estimate", "acme/small", "--ram", "16GiB"]) == 0
    assert "fits" in capsys.readouterr().out
    assert cli.main(["estimate", "acme/absent", "--ram", "16GiB"]) == 1
    assert "acme/absent is not in the local cache" in capsys.readouterr().err


def test_an_estimate_of_half_a_download_asks_the_hub(cache, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (snapshot,) = (cache / "models--acme--small" / "snapshots").iterdir()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cli.main(["estimate", "acme/small", "--ram", "16GiB"]) == 1


def test_an_odd_configuration_is_not_listed(cache):
    (snapshot,) = (cache / "models--acme--gguf" / "snapshots").iterdir()
    (snapshot / "config.json").write_text('{"model_type": ["a"]}')
    shutil.copy(next(DEMO.glob("*.safetensors")), snapshot)
    assert [name for name, _ in local_models.models_in("cache")] == ["acme/small"]


@pytest.mark.parametrize("name", ["/nope", "./nope/x", "nope"])
def test_an_estimate_of_no_folder_says_so(cache, capsys, name):
    assert cli.main(["estimate", name, "--ram", "16GiB"]) == 1
    expected = f"{name}: no such folder, and not a Hugging Face owner/name."
    assert expected in capsys.readouterr().err


def test_an_estimate_of_what_cannot_be_served_is_none(tmp_path, capsys):
    config = {**json.loads((DEMO / "config.json").read_text()), "model_type": "frobnicate"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in DEMO.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    for file in DEMO.glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, tmp_path)
    assert cli.main(["estimate", str(tmp_path), "--ram", "16GiB"]) == 1
    assert "knows no model of type 'frobnicate'" in capsys.readouterr().err
    config["model_type"] = "mistral"  # which mlx-lm takes for another
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["estimate", str(tmp_path), "--ram", "16GiB"]) == 0


def test_rm_without_a_question(cache):
    assert cli.main(["models", "rm", "acme/gguf", "--yes"]) == 0
    assert not (cache / "models--acme--gguf").exists()


def test_what_is_not_there_cannot_be_deleted(cache, capsys):
    assert cli.main(["models", "rm", "acme/none", "--yes"]) == 1
    assert "acme/none is not in the cache" in capsys.readouterr().err


def test_pull_fetches_no_weights_that_cannot_be_served(tmp_path, capsys, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "deepseek_v32"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(config))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=AssertionError))
    assert cli.main(["models", "pull", "acme/sparse"]) == 1
    assert "type 'deepseek_v32', cannot be served: an indexer layer" in capsys.readouterr().err


def test_pull_checks_what_came(cache, capsys, monkeypatch):
    folders = {"acme/small": DEMO, "acme/gguf": next(cache.glob("models--acme--gguf/snapshots/*"))}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folders[name])
    assert cli.main(["models", "pull", "acme/small"]) == 0
    assert "quire serve acme/small" in capsys.readouterr().out
    assert cli.main(["models", "pull", "acme/gguf"]) == 1
    assert "GGUF" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["small", "../x", "a/b/c", "https://x/y"])
def test_pull_takes_names_of_the_hub_only(cache, capsys, name):
    assert cli.main(["models", "pull", name]) == 1
    assert "not a Hugging Face owner/name" in capsys.readouterr().err


def test_the_demo_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("quire-demo") == resolve_model(None)
