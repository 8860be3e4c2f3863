"""From a conversation to a prompt, and from tokens to what they mean: the core of all chat APIs.

Every protocol is turned into a :class:`ChatCompletionRequest`, whose fields are checked already,
and gets back a group of sequences whose deltas carry events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from quire.engine.messages import GenerateRequest, Ready, TokenOutput
from quire.serve import submission
from quire.serve.backend import TokenStream
from quire.serve.detokenizer import Detokenizer
from quire.serve.errors import ApiError
from quire.serve.generation import Generation, GenerationGroup, TextDelta
from quire.serve.output_form import reasoning_form, wanted_of_chat
from quire.serve.parsers.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from quire.serve.parsers.families import ParserFactory
from quire.serve.parsers.output import OutputParser
from quire.serve.prompt import ChatPrompt, encode_chat
from quire.serve.protocol import ChatCompletionRequest
from quire.serve.registry import Served
from quire.serve.responses import FinishReason
from quire.serve.thinking import switches_of
from quire.serve.tools import for_parser, for_template


async def encode_conversation(
    served: Served, body: ChatCompletionRequest, max_model_len: int | None
) -> ChatPrompt:
    """Raises :class:`ApiError`."""
    template = served.model.chat_template
    return await encode_chat(
        served.model.encoder,
        template,
        body.messages,
        max_model_len,
        tools=for_template(body.tools) if body.tools else None,
        switches=switches_of(
            "" if template is None else template.source,
            body.reasoning_effort,
            body.enable_thinking,
            body.chat_template_kwargs,
            served.model.default_switches,
        ),
    )


async def check_output(
    served: Served,
    body: ChatCompletionRequest,
    prompt: ChatPrompt,
    own_names: Mapping[str, str] | None = None,
) -> str:
    """The grammar of what the output must be, "" for none. Raises :class:`ApiError`.

    ``own_names`` are what the client's protocol calls the parts of a chat's fields.
    """
    form = reasoning_form(served.model.parsers, prompt.opening)
    try:
        wanted = wanted_of_chat(body, served.model.parsers.family.tools, form)
        return await served.check_output(wanted)
    except ApiError as error:
        for name, own in (own_names or {}).items():
            if error.param is not None and name in error.param:
                message = error.message.replace(name, own)
                param = error.param.replace(name, own)
                raise ApiError(error.status, message, param=param) from None
        raise


def start(
    served: Served, info: Ready, body: ChatCompletionRequest, prompt: ChatPrompt, grammar: str
) -> GenerationGroup:
    """Submit the conversation. Raises :class:`ApiError` and what :meth:`Backend.submit` raises."""
    parsers = served.model.parsers
    tools = for_parser(body.tools) if body.tools and body.tool_choice != "none" else None
    starts_in_reasoning = parsers.starts_in_reasoning(prompt.opening)

    def make(index: int, request: GenerateRequest, stream: TokenStream) -> Generation:
        return ParsedGeneration(
            index,
            stream,
            request,
            Detokenizer(served.model.token_bytes, request.prompt_token_ids),
            parsers.parser(tools, starts_in_reasoning=starts_in_reasoning),
            parsers,
            body,
        )

    return submission.start(served, info, body, [prompt.token_ids], "messages", make, grammar)


class ParsedGeneration(Generation):
    """One sequence whose tokens become events."""

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        request: GenerateRequest,
        detokenizer: Detokenizer,
        parser: OutputParser,
        parsers: ParserFactory,
        body: ChatCompletionRequest,
    ) -> None:
        super().__init__(
            index,
            stream,
            len(request.prompt_token_ids),
            detokenizer,
            body.stop_strings,
            request.min_tokens,
        )
        self._parser = parser
        self._marker_chars = parsers.markers.char_of
        self._one_call = body.parallel_tool_calls is False
        self.reasoning_tokens = 0 if parsers.reads_reasoning else None

    def _delta(self, output: TokenOutput) -> TextDelta:
        self._check(output)
        stopped = output.finish_reason == "stop"
        by_token = stopped and not output.ends_with_text
        token_ids = output.token_ids[:-1] if by_token else output.token_ids
        events: list[Event] = []
        for token_id in token_ids:
            events += self._take(token_id)
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and output.finish_reason is not None:
            self.completion_tokens += by_token
            events += self._end(truncated=not stopped)
        return TextDelta(self._index, "", self.finish_reason, events)

    def _take(self, token_id: int) -> list[Event]:
        reasoned = self._parser.in_reasoning
        char = self._marker_chars.get(token_id)
        if char is None:
            text = self._detokenizer.push((token_id,))
        else:
            text = self._detokenizer.flush() + char
        events = self._parser.push(text) if text else []
        self.completion_tokens += 1
        if self.reasoning_tokens is not None:
            self.reasoning_tokens += reasoned or self._parser.in_reasoning
        return self._cut(events)

    def _end(self, *, truncated: bool) -> list[Event]:
        events = self._parser.push(self._detokenizer.flush())
        events += self._parser.finish(truncated=truncated)
        events = self._cut(events)
        if self.finish_reason is None:
            if self._matcher is not None and (held := self._matcher.flush()):
                events.append(ContentDelta(held))
            done: bool = not truncated and self._parser.calls > 0
            self.finish_reason = "length" if truncated else "tool_calls" if done else "stop"
        return events

    def _cut(self, events: list[Event]) -> list[Event]:
        """What the client gets of the events: stop strings and the limit of one call end them."""
        if self._matcher is None and not self._one_call:
            return events
        kept: list[Event] = []
        for event in events:
            if isinstance(event, ContentDelta):
                kept += self._search_content(event)
            else:
                if self._matcher is not None and (held := self._matcher.flush()):
                    kept.append(ContentDelta(held))
                kept.append(event)
                if self._one_call and isinstance(event, CallEnded):
                    self._stop("tool_calls")
            if self.finish_reason is not None:
                break
        return kept

    def _search_content(self, event: ContentDelta) -> list[Event]:
        # What the model thinks and what it calls may hold anything.
        if self._matcher is None or self.completion_tokens <= self._min_tokens:
            return [event]
        text, found = self._matcher.push(event.text)
        if found:
            self.stop_string = self._matcher.found
            self._stop("tool_calls" if self._parser.calls else "stop")
        return [ContentDelta(text)] if text else []

    def _stop(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._stream.close("stop")


class Call(Struct):
    id: str
    name: str
    arguments: str = ""


class Reply(Struct):
    """An answer put together from its events."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = []

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case ContentDelta(text):
                    self.content += text
                case ReasoningDelta(text):
                    self.reasoning += text
                case CallStarted(_, call_id, name):
                    self.calls.append(Call(call_id, name))
                case ArgumentsDelta(index, text):
                    self.calls[index].arguments += text
