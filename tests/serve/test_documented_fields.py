"""docs/fields.md names the fields that change nothing, and those that the code has for it."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from quire.serve.embeddings_protocol import EmbeddingRequest
from quire.serve.messages_protocol import MessagesRequest
from quire.serve.openai_protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from quire.serve.responses_protocol import ResponsesRequest

PAGE = Path(__file__).parents[2] / "docs" / "fields.md"
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "chat": ChatCompletionRequest,
    "completions": CompletionRequest,
    "responses": ResponsesRequest,
    "messages": MessagesRequest,
    "embeddings": EmbeddingRequest,
}


def documented() -> set[tuple[str, str]]:
    found = set()
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].split(", ")[0] in STRUCTS:
            for api in cells[0].split(", "):
                found |= {(api, name) for name in re.findall(r"`([a-z_]+)[`.\[]", cells[1])}
    return found


def test_every_documented_field_exists() -> None:
    assert len(documented()) > 20
    for api, name in documented():
        assert name in STRUCTS[api].__struct_fields__, f"{name} of {api}"


def fields_below(path: str, comment: str) -> list[str]:
    """Fields that a protocol's code lists below a comment, up to the next one or an empty line."""
    lines = (Path(__file__).parents[2] / path).read_text().splitlines()
    found = []
    for start, line in enumerate(lines):
        if line.strip().startswith(comment):
            for field in lines[start + 1 :]:
                if not (match := re.match(r"    (\w+): ", field)):
                    break
                found.append(match[1])
    return found


@pytest.mark.parametrize(
    ("api", "path", "comment"),
    [
        ("chat", "serve/openai_protocol.py", "# No effect on the answer, by definition."),
        ("completions", "serve/openai_protocol.py", "# No effect on the answer, by definition."),
        ("responses", "serve/responses_protocol.py", "# No effect on the answer, by definition."),
        ("embeddings", "serve/embeddings_protocol.py", "# No effect on the answer, by definition."),
        ("messages", "serve/messages_protocol.py", "# No meaning outside Anthropic's service."),
    ],
)
def test_every_field_without_effect_is_documented(api: str, path: str, comment: str) -> None:
    fields = fields_below(path, comment)
    assert fields
    assert {(api, name) for name in fields} <= documented()
    assert api not in ("chat", "completions") or set(fields) <= set(
        GenerationRequest.__struct_fields__
    )
