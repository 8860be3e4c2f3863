"""Coding agents, in pinned versions, through a task of three turns against a scripted model.

Each reads a file, edits it and says so. Quire's routes, templates and parsers are real, and so are
the agents; only the engine plays a script: see scripted_model.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / ".venv" / "clients"
NODE = HERE / "agents" / "node_modules" / ".bin"
TASK = "Make the colour blue in notes.txt"
BEFORE, AFTER, DONE = "colour = red\n", "colour = blue\n", "The colour is blue now."

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

Files = Mapping[str, str]  # by their place below the home folder


@dataclass(frozen=True)
class Agent:
    """How an agent is told of a server.

    Attributes:
        command: run in the folder of the task, with the home folder as its only state.
        path: that it asks.
        files: that it reads, for a server's address.
        environment: likewise.
        says_so: whether its output has the model's last words.
    """

    command: Sequence[str | Path]
    path: str
    files: Callable[[str], Files] = lambda url: {}
    environment: Callable[[str], Mapping[str, str]] = lambda url: {}
    says_so: bool = True


def codex_files(url: str) -> Files:
    return {
        ".codex/config.toml": 'model = "scripted"\nmodel_provider = "quire"\n'
        "[model_providers.quire]\n"
        f'name = "Quire"\nbase_url = "{url}/v1"\nwire_api = "responses"\n'
    }


def opencode_files(url: str) -> Files:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {"scripted": {"limit": {"context": 200_000, "output": 8_000}}},
    }
    settings = {"model": "quire/scripted", "provider": {"quire": provider}}
    settings |= {"autoupdate": False, "share": "disabled"}
    return {".config/opencode/opencode.json": json.dumps(settings)}


def continue_files(url: str) -> Files:
    model = {
        "name": "scripted",
        "provider": "openai",
        "model": "scripted",
        "apiBase": f"{url}/v1",
        "apiKey": "none",
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
    }
    settings = {"name": "Quire", "version": "0.0.1", "schema": "v1", "models": [model]}
    return {"continue.yaml": json.dumps(settings)}


def openai_environment(url: str) -> Mapping[str, str]:
    return {
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "OPENAI_MODEL": "scripted",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "CONTINUE_TELEMETRY_ENABLED": "0",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
    }


def claude_environment(url: str) -> Mapping[str, str]:
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "claude-scripted",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


AGENTS = {
    "codex": Agent(
        [
            *(NODE / "codex", "exec", "--skip-git-repo-check"),
            *("--dangerously-bypass-approvals-and-sandbox", TASK),
        ],
        "/v1/responses",
        codex_files,
    ),
    "claude-code": Agent(
        [NODE / "claude", "-p", TASK, "--allowedTools", "Read,Edit"],
        "/v1/messages",
        environment=claude_environment,
    ),
    "opencode": Agent(
        [NODE / "opencode", "run", TASK], "/v1/chat/completions", opencode_files, openai_environment
    ),
    "qwen-code": Agent(
        [NODE / "qwen", "--auth-type", "openai", "--yolo", "-p", TASK],
        "/v1/chat/completions",
        environment=openai_environment,
    ),
    "continue": Agent(
        [NODE / "cn", "-p", TASK, "--config", "../home/continue.yaml", "--auto"],
        "/v1/chat/completions",
        continue_files,
        openai_environment,
    ),
    # It has no tools: it asks for the file, writes it whole, and corrects it after a test.
    "aider": Agent(
        [
            *(INSTALLED / "aider" / "bin" / "aider", "--model", "openai/scripted"),
            *("--yes-always", "--no-auto-commits", "--no-gitignore", "--map-tokens", "0"),
            *("--no-analytics", "--no-check-update", "--no-show-model-warnings", "--no-pretty"),
            *("--auto-test", "--test-cmd", "grep blue notes.txt"),
            *("--message", "Make the colour blue in the notes"),
        ],
        "/v1/chat/completions",
        environment=openai_environment,
        says_so=False,
    ),
}


@dataclass
class Scripted:
    """A server on a scripted model, and what it was asked."""

    url: str
    log: Path
    work: Path
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Scripted]:
    work, home, log = tmp_path / "work", tmp_path / "home", tmp_path / "log.jsonl"
    work.mkdir()
    home.mkdir()
    (work / "notes.txt").write_text(BEFORE)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Start"]):
        author = ("-c", "user.name=a", "-c", "user.email=a@localhost")
        subprocess.run(["git", *author, *command], cwd=work, check=True)
    program = [sys.executable, str(HERE / "scripted_model.py"), str(work), str(log)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Scripted(process.stdout.readline().strip(), log, work, home)
        process.communicate()


@pytest.mark.parametrize("name", AGENTS)
def test_agent_reads_and_edits_a_file(scripted: Scripted, name: str) -> None:
    agent = AGENTS[name]
    for place, content in agent.files(scripted.url).items():
        file = scripted.home / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "TERM") if key in os.environ}
    environment = kept | {"HOME": str(scripted.home)} | dict(agent.environment(scripted.url))
    result = subprocess.run(
        [str(part) for part in agent.command],
        cwd=scripted.work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout[-5000:] + result.stderr[-5000:]
    assert result.returncode == 0, output
    assert (scripted.work / "notes.txt").read_text() == AFTER, output
    assert DONE in result.stdout or not agent.says_so, output
    asked = scripted.requests()
    assert [each["status"] for each in asked if each["status"] >= 400] == [], asked
    assert sum(each["path"] == agent.path for each in asked) >= 3
