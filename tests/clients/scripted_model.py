"""A server of Quire's own routes whose engine plays a coding model: it reads a file and edits it.

    python scripted_model.py FOLDER LOG

serves on a free port, which it prints, and writes what it was asked to LOG. The model is scripted:
it looks at the tools that it is offered and at the results that are in the prompt, and writes the
next call in the form of Qwen's models, token by token. What real clients send and read back is
real; what a model would make of it is not tried.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from fake_backend import (
    EOS,
    FakeBackend,
    FakeStream,
    Script,
    one_model_app,
    ready,
    served_model,
    serving,
)

from quire.engine.messages import Abilities, GenerateRequest
from quire.serve.grammar_check import CheckRequest

MODEL = "scripted"
CONTEXT = 2_000_000  # a token is a byte here, and agents send long prompts
FILE, BEFORE, AFTER = "notes.txt", "colour = red", "colour = blue"
WRONG = "colour = green"
DONE = "The colour is blue now."
TITLE = "A colour"

SIGNS = "{# <tool_call> <function= <think> #}"
TEMPLATE = (
    SIGNS + "{% if tools %}\x02{{ tools | tojson }}\x03{% endif %}"
    "{% for m in messages %}\x04{{ m.role }}\x05{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}\x04assistant\x05{% endif %}"
)

READERS = ("Read", "read", "read_file", "ReadFile")
EDITORS = ("Edit", "edit", "MultiEdit", "replace", "edit_file", "Write")
SHELLS = ("exec_command", "shell", "shell_command", "local_shell", "bash")
PATCH = f"*** Begin Patch\n*** Update File: {FILE}\n@@\n-{BEFORE}\n+{AFTER}\n*** End Patch"


class Player:
    """What the scripted model says to a prompt."""

    def __init__(self, folder: Path) -> None:
        self._file = str(folder / FILE)

    def reply(self, prompt: str) -> str:
        tools = _tools_of(prompt)
        turns = re.split("\x04(?=[a-z]+\x05)", prompt)[1:]
        results = sum(turn.startswith("tool\x05") for turn in turns)
        if not tools:
            return self._without_tools(prompt)
        if results == 0:
            return _call(*self._read(tools))
        if results == 1:
            assert BEFORE in turns[-2] + turns[-3], "the file's text is not in the tool's result"
            return "It is red.\n" + _call(*self._edit(tools))
        return DONE

    def _without_tools(self, prompt: str) -> str:
        """For aider, which shows files in the prompt and reads whole files from the text; else a
        title, as agents ask for beside their work."""
        if "json_schema" in prompt:  # as instructor asks for
            return '{"sky": "clear", "warm": true}'
        if "file listing" not in prompt:
            return TITLE
        if WRONG in prompt:  # the file, and what the user's test says of it
            return f"{FILE}\n```\n{AFTER}\n```\n"
        if BEFORE in prompt:
            return f"{FILE}\n```\n{WRONG}\n```\n"
        return f"I need to see {FILE}. Please add it to the chat."

    def _read(self, tools: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if (name := _first(READERS, tools)) is not None:
            return name, self._arguments(tools[name])
        return self._run(tools, f"cat {FILE}")

    def _edit(self, tools: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if "apply_patch" in tools:
            return "apply_patch", {"input": PATCH}
        if (name := _first(EDITORS, tools)) is not None:
            return name, self._arguments(tools[name])
        return self._run(tools, f"sed -i 's/{BEFORE}/{AFTER}/' {FILE}")

    def _run(self, tools: Mapping[str, Any], command: str) -> tuple[str, dict[str, Any]]:
        name = _first(SHELLS, tools)
        assert name is not None, f"no tool to read files with: {sorted(tools)}"
        [key] = {"cmd", "command"} & set(tools[name]["properties"])
        is_list = tools[name]["properties"][key].get("type") == "array"
        return name, {key: ["bash", "-lc", command] if is_list else command}

    def _arguments(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """By the names that agents give to what they need."""
        found: dict[str, Any] = {}
        for name in schema.get("required", schema["properties"]):
            lower = name.lower()
            if "path" in lower or lower == "file":
                found[name] = self._file
            elif "old" in lower:
                found[name] = BEFORE
            elif "new" in lower:
                found[name] = AFTER
            elif lower == "edits":
                item = schema["properties"][name]["items"]
                found[name] = [self._arguments(item)]
            elif lower in ("content", "contents"):
                found[name] = AFTER + "\n"
        return found


def _tools_of(prompt: str) -> dict[str, Any]:
    """The schemas of the tools that the prompt begins with, by name."""
    match = re.match("\x02(.*?)\x03", prompt, re.DOTALL)
    tools = json.loads(match[1]) if match else []
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}


def _first(names: Sequence[str], tools: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in tools), None)


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    """As Qwen's models write it."""
    parts = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n"
        "</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


class PlayedBackend(FakeBackend):
    """Each request gets what the player says to its prompt."""

    def __init__(self, player: Player) -> None:
        abilities = Abilities(grammars=True)
        super().__init__(
            info=msgspec.structs.replace(ready(max_model_len=CONTEXT), abilities=abilities)
        )
        self._player = player
        self._tokenizer = SERVED.encoder.tokenizer

    def submit(self, request: GenerateRequest) -> FakeStream:
        prompt = self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        ids = self._tokenizer.encode(self._player.reply(prompt) + EOS).ids
        script = Script([ids[i : i + 7] for i in range(0, len(ids), 7)])
        self.scripts = [*self.scripts[: len(self.streams)], script]
        return super().submit(request)


class Log:
    """ASGI middleware: one line of JSON for each request, with its status and body."""

    def __init__(self, app: ASGIApp, file: Path) -> None:
        self._app = app
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, status = b"", 0

        async def receive_and_note() -> Message:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self._app(scope, receive_and_note, send_and_note)
        line = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "body": body.decode("utf-8", "replace"),
        }
        with self._file.open("a") as log:
            log.write(json.dumps(line) + "\n")


class AnyForm:
    """A script is of the wanted form by itself."""

    async def check(self, wanted: CheckRequest, param: str) -> str:
        return ""


SERVED = replace(
    served_model(["<tool_call>", "</tool_call>", "<think>", "</think>"], TEMPLATE),
    id=MODEL,
    grammars=AnyForm(),  # type: ignore[arg-type]
)


def main() -> None:
    folder, log = Path(sys.argv[1]), Path(sys.argv[2])
    app = one_model_app(PlayedBackend(Player(folder)), SERVED)
    app.add_middleware(Log, file=log)  # type: ignore[arg-type]
    with serving(app) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until whoever started this lets go


if __name__ == "__main__":
    main()
