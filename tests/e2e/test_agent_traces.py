"""Ten turns as Claude Code and Codex send them: nearly all of a turn's prompt is found again.

What such clients change from request to request (billing headers, cache marks, ids, metadata) must
not reach the head of the prompt, and what comes in mid conversation must stay where it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Server

from quire.loadtest.model_folder import ModelShape, make_model

SHAPE = ModelShape(
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    intermediate=48,
    vocab=300,
    max_position=16384,
)
BLOCK = 16
TURNS = 10
# Between the history and where the answer begins: the next turn has its own there.
OPENING = 24
DEMO = Path(__file__).parents[2] / "engine" / "demo" / "quire-demo" / "chat_template.jinja"
# Of the kind that takes a system message in front only, and results of tools as the user's turns.
STRICT = """{%- if tools %}{{ "<|im_start|>system\\n" + (tools | tojson) }}{% endif %}
{%- for m in messages %}
{%- if m.role == "system" and not loop.first %}
{{- raise_exception("System message must be at the beginning.") }}{% endif %}
{{- "<|im_start|>" + ("user" if m.role == "tool" else m.role) + "\\n" + (m.content or "") }}
{%- for c in m.tool_calls or [] %}
{{- "<tool_call>\\n<function=" + c.function.name + ">\\n" }}
{%- for key, value in c.function.arguments | items %}
{{- "<parameter=" + key + ">\\n" + value | string + "\\n</parameter>\\n" }}{% endfor %}
{{- "</function>\\n</tool_call>" }}{% endfor %}
{{- "<|im_end|>\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""


@pytest.fixture(scope="module", params=["plain", "strict"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models") / "agents"
    make_model(folder, SHAPE)
    template = DEMO.read_text() if request.param == "plain" else STRICT
    (folder / "chat_template.jinja").write_text(template)
    running = Server("--kv-cache-memory", "32MiB", model=folder)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def parameters(*names: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": list(names),
    }


TOOLS = {
    "Read": ("Reads a file from the disk.", parameters("file_path")),
    "Edit": ("Replaces text in a file.", parameters("file_path", "old_string", "new_string")),
    "Bash": ("Runs a command and shows what it prints.", parameters("command")),
}
INSTRUCTIONS = "You help with work on a program. " * 12


class Trace:
    """One conversation; each request has the whole history so far, as the client keeps it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.prompts: list[int] = []  # tokens of each request
        self.cached: list[int] = []

    def ask(self, turn: int) -> None:
        prompt, cached = self.send(turn)
        self.prompts.append(prompt)
        self.cached.append(cached)

    def send(self, turn: int) -> tuple[int, int]:
        """Tokens of the prompt, and how many of them were cached."""
        raise NotImplementedError

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        status, headers, text = self.server.post(path, body | {"stream": True})
        assert status == 200, text
        assert "max" not in headers.get("x-quire-ignored", "")
        data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return [json.loads(each) for each in data]

    def check(self) -> None:
        assert self.prompts == sorted(set(self.prompts))
        assert self.prompts[-1] > 3 * self.prompts[0] // 2
        for before, cached in zip(self.prompts[:-1], self.cached[1:], strict=True):
            assert before - OPENING - BLOCK < cached, (self.prompts, self.cached)


class ClaudeCode(Trace):
    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.messages: list[dict[str, Any]] = [
            {"role": "user", "content": [text("<system-reminder>\nToday.\n</system-reminder>")]},
            {"role": "user", "content": [text("Fix the colour.")]},
        ]

    def send(self, turn: int) -> tuple[int, int]:
        messages = json.loads(json.dumps(self.messages))
        # The mark of what is to be cached moves along.
        if isinstance(content := messages[-1]["content"], list):
            content[-1]["cache_control"] = {"type": "ephemeral"}
        body = {
            "model": "claude-opus-4",
            "max_tokens": 6,
            "messages": messages,
            "system": [
                text(f"x-anthropic-billing-header: cc_version=2.1.{turn}; cch={turn:05x};"),
                text("You are an agent.") | {"cache_control": {"type": "ephemeral"}},
                text(INSTRUCTIONS) | {"cache_control": {"type": "ephemeral"}},
            ],
            "tools": [
                {"name": name, "description": told, "input_schema": schema}
                for name, (told, schema) in TOOLS.items()
            ],
            "metadata": {"user_id": f"session {turn}"},
            "thinking": {"type": "adaptive", "display": "omitted"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
        }
        events = self.stream("/v1/messages?beta=true", body)
        [start] = [event["message"] for event in events if event["type"] == "message_start"]
        [end] = [event["usage"] for event in events if event["type"] == "message_delta"]
        usage = start["usage"] | end
        self.go_on(turn)
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached

    def go_on(self, turn: int) -> None:
        """Calls and their results; now and then a reminder, or the user, in between."""
        call = {"type": "tool_use", "id": f"toolu_{turn}", "name": "Read"}
        said = [text(f"Now file {turn}."), call | {"input": {"file_path": f"src/{turn}.py"}}]
        result = {"type": "tool_result", "tool_use_id": f"toolu_{turn}"}
        shown = f"1\tcolour = {turn}\n" * 4
        content: Any = [text(shown)] if turn % 2 else shown
        self.messages.append({"role": "assistant", "content": said})
        self.messages.append({"role": "user", "content": [result | {"content": content}]})
        if turn % 3 == 1:
            told = f"<total_tokens>{1000 - turn} left</total_tokens>"
            self.messages.append({"role": "system", "content": told})
        if turn == 5:
            self.messages.append({"role": "assistant", "content": "Done."})
            self.messages.append({"role": "user", "content": "Now the other file."})


class Codex(Trace):
    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.items: list[dict[str, Any]] = [
            item("developer", "<permissions>all</permissions>"),
            item("user", "<environment_context>here</environment_context>"),
            item("user", "Fix the colour."),
        ]

    def send(self, turn: int) -> tuple[int, int]:
        functions = [
            {"type": "function", "name": name, "description": told, "parameters": schema}
            | {"strict": False}
            for name, (told, schema) in TOOLS.items()
        ]
        spawn = {"type": "function", "name": "spawn", "parameters": parameters("task")}
        body = {
            "model": "agents",
            "instructions": INSTRUCTIONS,
            "input": self.items,
            "tools": [
                *functions,
                {"type": "namespace", "name": "agents_v1", "tools": [spawn]},
                {"type": "custom", "name": "apply_patch", "description": "Edits files."},
                {"type": "web_search", "external_web_access": False},
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "max_output_tokens": 6,
            "reasoning": {"summary": "auto"},
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "session",
            "client_metadata": {"turn_id": str(turn)},
        }
        events = self.stream("/v1/responses", body)
        usage = events[-1]["response"]["usage"]
        self.go_on(turn)
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]

    def go_on(self, turn: int) -> None:
        kinds = ("function_call", "arguments", json.dumps({"command": f"cat src/{turn}.py"}))
        if turn % 2:
            kinds = ("custom_tool_call", "input", f"*** Begin Patch\n+{turn}\n*** End Patch")
        kind, field, value = kinds
        name = "Bash" if kind == "function_call" else "apply_patch"
        call = {"type": kind, "id": f"fc_{turn}", "call_id": f"call_{turn}", "name": name}
        self.items.append(item("assistant", f"Now file {turn}.", "output_text"))
        self.items.append(call | {"status": "completed", field: value})
        output = f"Exit code: 0\nWall time: 0.{turn} seconds\nOutput:\ncolour = {turn}\n"
        self.items.append({"type": f"{kind}_output", "call_id": f"call_{turn}", "output": output})
        if turn % 3 == 1:
            self.items.append(item("developer", f"<context_left>{turn}</context_left>"))
        if turn == 5:
            self.items.append(item("assistant", "Done.", "output_text"))
            self.items.append(item("user", "Now the other file."))


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def item(role: str, content: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": content}]}


@pytest.mark.parametrize("client", [ClaudeCode, Codex], ids=["claude code", "codex"])
def test_cached_tokens_grow_with_the_conversation(server: Server, client: type[Trace]) -> None:
    trace = client(server)
    for turn in range(TURNS):
        trace.ask(turn)
    trace.check()
