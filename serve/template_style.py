"""What a chat template wants of a conversation, found out by rendering small ones.

Templates differ in what they read, what they refuse and what they leave out without a word, so
each question is asked with a word that must come back in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct

Turns = Sequence[Mapping[str, Any]]
# Renders turns, up to where the assistant speaks; raises whatever the template raises.
Render = Callable[[Turns], str]

ReasoningKey = Literal["reasoning_content", "reasoning", "thinking"]
_REASONING_KEYS: Final[tuple[ReasoningKey, ...]] = ("reasoning_content", "reasoning", "thinking")

_USER: Final = {"role": "user", "content": "Is it warm?"}
_CALL_IDS: Final = ("a1b2c3d4e", "f5g6h7i8j")  # the only form that Mistral's templates take
_MODES: Final = tuple((content, parsed) for parsed in (True, False) for content in (None, ""))


class TemplateStyle(Struct, frozen=True):
    no_content: str | None = ""  # of a turn that has tool calls and no text
    parsed_arguments: bool = True  # an object, not JSON text
    shows_calls: bool = True  # in any way
    many_calls: bool = True  # in one turn; else a turn for each call and its result
    attached_results: bool = False  # under "tool_responses" of the turn that called
    reasoning_key: ReasoningKey | None = None  # None: reasoning of earlier turns is not read
    # What is said with calls: in their turn, else in a turn before theirs, else not at all.
    content_beside_calls: bool = True
    content_beside_reasoned_calls: bool = True
    content_before_calls: bool = True
    developer: bool = False  # it has developer turns
    late_system: bool = True  # it takes system turns anywhere
    repeated_system: bool = True  # it takes two system turns in a row, in front
    repeated_user: bool = True  # it takes two user turns in a row


class _Calls(NamedTuple):
    no_content: str | None
    parsed_arguments: bool

    def turn(self, *cities: str, **more: str) -> dict[str, Any]:
        calls = []
        for call_id, city in zip(_CALL_IDS, cities, strict=False):
            arguments: object = {"city": city} if self.parsed_arguments else f'{{"city": "{city}"}}'
            function = {"name": "weather", "arguments": arguments}
            calls.append({"id": call_id, "type": "function", "function": function})
        return {"role": "assistant", "content": self.no_content, "tool_calls": calls, **more}


def _result(content: str, call_id: str = _CALL_IDS[0]) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "content": content, "tool_call_id": call_id}


def probe(source: str, render: Render) -> TemplateStyle:
    """The style of the template with that ``source``."""

    def shows(turns: Turns, *words: str, absent: str = "\0") -> bool:
        try:
            text = render(turns)
        except MemoryError:  # the process that this runs in is at its end
            raise
        except Exception:  # it refuses them, in whatever way
            return False
        return all(word in text for word in words) and absent not in text

    calls = next(
        (
            calls
            for calls in (_Calls(*mode) for mode in _MODES)
            if shows([_USER, calls.turn("Rome"), _result("sunny")], "Rome", absent="None")
        ),
        None,
    )
    shows_calls = calls is not None
    calls = calls or _Calls("", True)
    attached = calls.turn("Rome") | {"tool_responses": [{"name": "weather", "response": "sunny"}]}
    two_calls = [
        calls.turn("Rome", "Oslo"),
        _result("sunny"),
        _result("rainy", _CALL_IDS[1]),
    ]
    key = next(
        (
            key
            for key in _REASONING_KEYS
            if shows([_USER, calls.turn("Rome", **{key: "ponder"}), _result("sunny")], "ponder")
        ),
        None,
    )
    said = calls.turn("Rome") | {"content": "Wait."}
    rest = [_result("sunny")]
    before = [{"role": "assistant", "content": "Wait."}, calls.turn("Rome")]
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "Yes."}
    return TemplateStyle(
        no_content=calls.no_content,
        parsed_arguments=calls.parsed_arguments,
        shows_calls=shows_calls,
        many_calls=shows([_USER, *two_calls], "Rome", "Oslo"),
        attached_results="tool_responses" in source and shows([_USER, attached], "sunny"),
        reasoning_key=key,
        content_beside_calls=shows([_USER, said, *rest], "Wait.", "Rome"),
        content_beside_reasoned_calls=key is None
        or shows([_USER, said | {key: "ponder"}, *rest], "Wait.", "Rome"),
        content_before_calls=shows([_USER, *before, *rest], "Wait.", "Rome"),
        # Templates that print any role would show a role that the model does not know.
        developer="developer" in source
        and shows([{"role": "developer", "content": "sentinel"}, _USER], "sentinel"),
        late_system=shows(
            [system, _USER, answer, {"role": "system", "content": "sentinel"}, _USER], "sentinel"
        ),
        repeated_system=shows(
            [system, {"role": "system", "content": "sentinel"}, _USER], "Be kind.", "sentinel"
        ),
        repeated_user=shows([_USER, _USER]),
    )
