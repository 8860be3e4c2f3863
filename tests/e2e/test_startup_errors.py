"""A server that cannot start says why in one line and exits with a code that is not 0."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from live_server import Server
from mlx.utils import tree_flatten
from model_zoo import build
from model_zoo_base import BASE
from model_zoo_unpaged import UNPAGED_FAMILIES


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "model"))


def edit_config(model: Path, **fields: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def huge_weights(model: Path) -> None:
    """A sparse file that claims four terabytes and takes no space."""
    size = 1 << 42
    header = {
        f"x{i}": {"dtype": "F32", "shape": [size // 16], "data_offsets": [at, at + size // 4]}
        for i, at in enumerate(range(0, size, size // 4))
    }
    head = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        try:
            file.truncate(8 + len(head) + size)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")


def save_zoo_model(model: Path, name: str) -> None:
    """Put a small model of another architecture in place of the folder's own."""
    family = UNPAGED_FAMILIES[name][1]
    config = {"model_type": name, **BASE, **family}
    (model / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(build(name).parameters()))
    mx.save_safetensors(str(model / "model.safetensors"), weights)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "model"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "broken config": (lambda m: (m / "config.json").write_text('{"model_type":'), "config.json"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "safetensors"),
    "truncated weights": (truncate_weights, "model.safetensors"),
    "missing tensor": (lambda m: edit_config(m, num_hidden_layers=3), "layers.2"),
    "more layers than weights": (
        lambda m: edit_config(m, num_hidden_layers=10**9),
        "claims 1000000000 layers",
    ),
    "unknown architecture": (lambda m: edit_config(m, model_type="nonesuch"), "nonesuch"),
    "attention of its own": (lambda m: save_zoo_model(m, "olmo"), "olmo"),
    "code in the folder": (lambda m: edit_config(m, model_file="evil.py"), "evil.py"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json"),
    "weights larger than memory": (huge_weights, r"GiB"),
}


@pytest.mark.parametrize("name", CASES)
def test_unusable_models(model: Path, name: str) -> None:
    spoil, expected = CASES[name]
    spoil(model)
    assert_one_line(Server(model=model), expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-model-len", "9999"], "1024"),
        (["--kv-cache-memory", "1KiB"], "--kv-cache-memory"),
        (["--kv-cache-memory", "128KiB", "--max-model-len", "1024"], "--kv-cache-memory"),
        (["--device", "metal"], "metal"),
        (["--max-num-batched-tokens", "8", "--max-num-seqs", "8"], "max.num.seqs"),
        (["--block-size", "0"], "block"),
        (["--port", "99999"], "port"),
        (["--eviction-policy", "random"], "eviction"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_settings(small_model: Path, flags: list[str], expected: str) -> None:
    assert_one_line(Server(*flags, model=small_model), expected)


def assert_one_line(server: Server, expected: str) -> None:
    code = server.process.wait(120)
    log = server.read(server.log)
    server.stop()
    assert code in (1, 2), log
    assert "Traceback" not in log
    lines = [line for line in log.splitlines() if re.search(r"(?i)error|quire:", line)]
    assert len(lines) == 1, log
    assert re.search(expected, log), log
