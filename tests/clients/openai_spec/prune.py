"""Cut OpenAI's published description of its API down to the answers that Quire gives too.

    python prune.py openapi.json

takes the openapi.json of https://github.com/openai/openai-openapi (MIT) and writes answers.json
beside this file: the schemas of answers and of what these refer to, without their texts. The
file's commit and SHA-256 stand in SOURCE.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMIT = "f85dbe223d40e1a31cba812ab2d755c7e98a92a3"
SHA256 = "bbfd19abcde0e7412da99378deb2a959ccdd3a812f97c9e35901921e8e973f9a"
ANSWERS = (
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "CreateEmbeddingResponse",
    "ErrorResponse",
    "ListModelsResponse",
    "Model",
    "Response",
    "ResponseStreamEvent",
)
# Says nothing about which answers are right.
_TEXTS = {"description", "title", "example", "examples", "deprecated", "default"}


def references(schema: Any) -> Iterator[str]:
    """The names of the schemas that ``schema`` refers to."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield value.rsplit("/", 1)[1]
            else:
                yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def lean(schema: Any) -> Any:
    """``schema`` without texts and extensions, and OpenAPI 3.0's ``nullable`` as 3.1 has it."""
    if isinstance(schema, list):
        return [lean(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: lean(part) for name, part in value.items()}
        if key == "properties"
        else lean(value)
        for key, value in schema.items()
        if key not in _TEXTS and key != "nullable" and not key.startswith("x-")
    }
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") is True else made


def main() -> None:
    text = Path(sys.argv[1]).read_bytes()
    if (found := hashlib.sha256(text).hexdigest()) != SHA256:
        sys.exit(f"{sys.argv[1]} has the SHA-256 {found}, not that of commit {COMMIT}")
    schemas = json.loads(text)["components"]["schemas"]
    kept: dict[str, Any] = {}
    waiting = list(ANSWERS)
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = lean(schemas[name])
            waiting += references(kept[name])
    # A line for each schema, so that a newer version shows what it changes.
    lines = ",\n".join(
        f'"{name}": {json.dumps(schema, separators=(",", ":"))}'
        for name, schema in sorted(kept.items())
    )
    (HERE / "answers.json").write_text(f'{{"components": {{"schemas": {{\n{lines}\n}}}}}}\n')


if __name__ == "__main__":
    main()
