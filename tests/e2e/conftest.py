"""A server on a small random model, shared by the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import SMALL, Server

from quire.loadtest.model_folder import make_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    make_model(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[Server]:
    started = Server("--kv-cache-memory", "4MiB", model=small_model).wait_ready()
    yield started
    assert started.stop() == 0
