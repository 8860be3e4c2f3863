"""Which folders are served, and the one line that explains why one is not."""

from __future__ import annotations

import importlib.resources
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.serve.model_files import (
    ModelFiles,
    check_folder,
    check_safetensors,
    fingerprint,
    resolve_model,
)
from quire.serve.served_model import ModelFilesError


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = safetensors({"a": tensor(0, 8, [2]), "__metadata__": {"format": "mlx"}}, b"12345678")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(GOOD)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelFilesError) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_used_where_it_is(folder, monkeypatch):
    assert resolve_model(str(folder)) == ModelFiles(folder, "tiny-model")
    monkeypatch.chdir(folder)
    assert resolve_model(".") == ModelFiles(folder, "tiny-model")


def test_without_a_name_it_is_the_demo_model_of_the_package(folder, monkeypatch):
    demo = folder.rename(folder.with_name("quire-demo"))
    packages = []

    def package_files(package):
        packages.append(package)
        return demo.parent

    monkeypatch.setattr(importlib.resources, "files", package_files)
    assert resolve_model(None) == ModelFiles(demo, "quire-demo")
    assert packages == ["quire.engine.demo"]


def test_a_missing_folder_is_named():
    for name in ("/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "../x"):
        with pytest.raises(ModelFilesError, match="no such folder"):
            resolve_model(name)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(ModelFilesError, match="is a file; give the folder"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json; it is not a model folder"),
        (b"{", "config.json is not valid JSON"),
        (b"\xff", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[]", "config.json must hold a JSON object"),
        (b'{"model_file": "evil.py"}', "does not run code from a model folder"),
    ],
)
def test_a_bad_config(config, message, folder):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.gguf", "GGUF"), ("pytorch_model.bin", "PyTorch .bin"), ("w.npz", "NumPy")],
)
def test_other_weights_are_named(name, kind, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"")
    assert f"has no *.safetensors files ({kind} weights are not supported)" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (GOOD[:5], "cut off"),
        (GOOD[:20], "cut off"),
        (GOOD[:-1], f"cut off: {len(GOOD) - 1} bytes instead of {len(GOOD)}"),
        (GOOD + b"x", "longer than its header says"),
        (struct.pack("<Q", 2**63) + b"{}", "header is too large"),
        (safetensors(b"{nonsense}"), "broken header"),
        (safetensors(b"[" * 100_000), "broken header"),
        (safetensors([1]), "not a JSON object"),
        (safetensors({"a": 3}), "tensor 'a' does not add up"),
        (safetensors({"a": {"dtype": "F32"}}), "tensor 'a' does not add up"),
        (safetensors({"a": tensor(0, 8, [3])}, b"12345678"), "tensor 'a' does not add up"),
        (safetensors({"a": tensor(8, 0, [2])}, b"12345678"), "tensor 'a' does not add up"),
        (safetensors({"a": tensor(-8, 0, [2])}, b""), "tensor 'a' does not add up"),
        (
            safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"x" * 12),
            "overlap or leave gaps",
        ),
        (
            safetensors({"a": tensor(0, 8, [2]), "b": tensor(12, 20, [2])}, b"x" * 20),
            "overlap or leave gaps",
        ),
    ],
)
def test_a_damaged_safetensors_file(content, message, folder):
    (folder / "model.safetensors").write_bytes(content)
    text = refusal(folder)
    assert str(folder / "model.safetensors") in text
    assert message in text


@settings(max_examples=200)
@given(st.binary(max_size=64), st.integers(0, len(GOOD)), st.integers(0, 8))
def test_damage_anywhere_is_reported_or_harmless(tmp_path_factory, junk, position, cut):
    path = tmp_path_factory.mktemp("junk") / "model.safetensors"
    path.write_bytes(GOOD[:position] + junk + GOOD[position + cut :])
    message = str(path)
    try:
        check_safetensors(path)
    except ModelFilesError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "model.safetensors", "b": "m2.safetensors"}},
            "m2.safetensors missing",
        ),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": 1}}, "no usable weight_map"),
        ({}, "no usable weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_bad_index(index, message, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(folder)


def test_an_index_with_all_its_files(folder):
    index = {"weight_map": {"a": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(folder)


def test_a_hub_name_is_downloaded_without_other_files(folder, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some-org/tiny-model") == ModelFiles(folder, "some-org/tiny-model")
    ((name, options),) = calls
    assert name == "some-org/tiny-model"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(p in ("*", "*.py", "*.bin", "*.gguf") for p in options["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "offline", "message"),
    [
        (errors.LocalEntryNotFoundError("long\nstory"), True, "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("long\nstory"), False, "Hub cannot be reached"),
        (ConnectionResetError("reset\nby peer"), False, "ConnectionResetError: reset by peer"),
    ],
)
def test_a_failed_download_is_one_line(error, offline, message, monkeypatch):
    def download(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelFilesError) as caught:
        resolve_model("org/name")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_for_real(tmp_path):
    code = "from quire.serve.model_files import resolve_model; resolve_model('org/not-there')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    last = result.stderr.splitlines()[-1]
    assert last.endswith("org/not-there is not in the local cache and HF_HUB_OFFLINE is set.")


def test_code_in_a_model_folder_is_not_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    config = {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    check_folder(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors", "chat_template.jinja"])
def test_a_pipe_is_refused_at_once(name, folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert refusal(folder) == f"{folder / name} is not a regular file."


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(name, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    elsewhere.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    assert f"{folder / name} links out of its folder" in refusal(folder)


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    blobs = tmp_path / "cache" / "models--a--b" / "blobs"
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / "0123"
    for path in (blobs, snapshot):
        path.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert resolve_model(str(snapshot)).path == snapshot


@pytest.mark.parametrize("scope", ["itself", "text_config"])
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("num_hidden_layers", "claims 1000000000 layers; the weights have 1 tensors."),
        ("vocab_size", "claims a vocab_size of 1000000000"),
        ("head_dim", "claims a head_dim of 1000000000"),
    ],
)
def test_a_configuration_beyond_its_weights_is_refused(field, message, scope, folder):
    config = {field: 10**9} if scope == "itself" else {"text_config": {field: 10**9}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert message in refusal(folder)


def test_the_fingerprint_tells_of_every_change(folder):
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    (folder / "notes.txt").write_text("not read")
    assert fingerprint(folder) == before
    os.utime(folder / "config.json", ns=(1, 1))
    changed = fingerprint(folder)
    assert changed != before
    (folder / "tokenizer_config.json").write_text("{}")
    assert fingerprint(folder) != changed
    assert fingerprint(folder / "none") == {}
