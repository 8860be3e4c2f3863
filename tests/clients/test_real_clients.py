"""Real clients, in the versions that are pinned beside them, against the demo model.

What the demo model says matters little: forced calls and schemas are enforced by the server.
`make test-clients` installs the clients first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Server

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / ".venv" / "clients"
PYTHON_CLIENTS = [file.stem.removesuffix("_client") for file in sorted(HERE.glob("*_client.py"))]

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A scripted model, for what the demo model cannot do: its address, and its folder."""
    folder = tmp_path_factory.mktemp("scripted")
    program = [sys.executable, str(HERE / "scripted_model.py"), str(folder), str(folder / "log")]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield [process.stdout.readline().strip(), str(folder)]
        process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def run(*command: str | Path, **environment: str) -> None:
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.parametrize("name", PYTHON_CLIENTS)
def test_python_client(server: Server, scripted: list[str], name: str) -> None:
    """Each is given the demo model's server, and the scripted one's with its folder."""
    python = INSTALLED / name / "bin" / "python"
    run(python, HERE / f"{name}_client.py", server.url, *scripted)


def test_node_clients(server: Server) -> None:
    run("node", HERE / "node" / "clients.mjs", server.url)


def test_nothing_violates_the_description(server: Server) -> None:
    run(
        INSTALLED / "schemathesis" / "bin" / "schemathesis",
        *("run", f"{server.url}/openapi.json", "--url", server.url),
        *("--max-examples", "6", "--phases", "examples,coverage,fuzzing"),
        *("--request-timeout", "60", "--suppress-health-check", "all", "--seed", "1"),
        *("--exclude-path", "/metrics"),
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance",
        SCHEMATHESIS_HOOKS=str(HERE / "schemathesis_hooks.py"),
    )
    assert server.get("/health")[0] == 200
