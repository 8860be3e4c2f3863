"""From a conversation to a prompt, and from tokens to what they mean: the core of all chat APIs.

Every protocol is turned into a :class:`ChatCompletionRequest`, whose fields are checked already,
and gets back a group of sequences whose deltas carry events.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from msgspec import Struct, structs

from quire.engine.messages import Ready, ThinkingBudget, TokenLogprobs, TokenOutput
from quire.serve import request_record, submission
from quire.serve.backend import TokenStream
from quire.serve.detokenizer import Detokenizer
from quire.serve.errors import ApiError, invalid
from quire.serve.field_names import FieldNames
from quire.serve.generation import Generation, GenerationGroup, Reading, TextDelta
from quire.serve.openai_answer import FinishReason
from quire.serve.openai_protocol import ChatCompletionRequest
from quire.serve.output_form import TextForms, reasoning_form, wanted_of_chat
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
from quire.serve.prompt import ChatPrompt, Ending, Rendered, encode_chat, render_chat
from quire.serve.prompt_length import length_limit
from quire.serve.raw_body import LargeMessages
from quire.serve.registry import Served
from quire.serve.thinking import switches_of
from quire.serve.tools import for_parser, for_template


async def render(
    served: Served, body: ChatCompletionRequest, large: LargeMessages | None = None
) -> Rendered:
    """``large``: the messages, where the request has a stand-in. Raises :class:`ApiError`."""
    template = served.model.chat_template
    return await render_chat(
        template,
        body.messages if large is None else large,
        tools=for_template(body.tools) if body.tools else None,
        switches=switches_of(
            "" if template is None else template.source,
            body.reasoning_effort,
            body.enable_thinking,
            body.chat_template_kwargs,
            served.model.default_switches,
        ),
        ending=_ending(body),
    )


async def encode_conversation(
    served: Served,
    body: ChatCompletionRequest,
    max_model_len: int | None,
    *,
    counts: bool = False,
    large: LargeMessages | None = None,
) -> ChatPrompt:
    """Raises :class:`ApiError`.

    Args:
        counts: as in :class:`quire.serve.prompt_length.LengthLimit`.
        large: the messages, where the request has a stand-in.
    """
    encoder = served.model.encoder
    most = None if body.truncate_prompt_tokens is not None else max_model_len
    limit = length_limit(encoder, most, counts=counts)
    if large is not None:
        large = structs.replace(large, limit=limit)
    salt = request_record.cache_salt(body.cache_salt)
    return await encode_chat(encoder, await render(served, body, large), limit, salt)


def _ending(body: ChatCompletionRequest) -> Ending:
    if body.continue_final_message:
        return "continued"
    return "closed" if body.add_generation_prompt is False else "answer"


async def check_output(
    served: Served,
    body: ChatCompletionRequest,
    prompt: ChatPrompt,
    names: FieldNames | None = None,
    texts: TextForms | None = None,
) -> str:
    """The grammar of what the output must be, "" for none. Raises :class:`ApiError`.

    Args:
        names: what the client's protocol calls the parts of a chat's fields.
        texts: of tools that take one.
    """
    form = reasoning_form(served.model.parsers, prompt.opening)
    try:
        wanted = wanted_of_chat(body, served.model.parsers.family.tools, form, texts or {})
        return await served.check_output(wanted)
    except ApiError as error:
        if names is None:
            raise
        raise names.rename(error) from None


async def prepare(
    served: Served, info: Ready, body: ChatCompletionRequest, large: LargeMessages | None
) -> tuple[ChatPrompt, str]:
    """The prompt, and the grammar of the output. Raises :class:`ApiError`."""
    prompt = await encode_conversation(served, body, info.max_model_len, large=large)
    return prompt, await check_output(served, body, prompt)


def start(
    served: Served, info: Ready, body: ChatCompletionRequest, prompt: ChatPrompt, grammar: str
) -> GenerationGroup:
    """Submit the conversation. Raises :class:`ApiError` and what :meth:`Backend.submit` raises."""
    parsers = served.model.parsers
    tools = for_parser(body.tools) if body.tools and body.tool_choice != "none" else None
    starts_in_reasoning = parsers.starts_in_reasoning(prompt.opening)

    def make(
        reading: Reading, stream: TokenStream, prompt: Sequence[int], detokenizer: Detokenizer
    ) -> Generation:
        return ParsedGeneration(
            stream,
            prompt,
            detokenizer,
            reading,
            parsers.parser(tools, starts_in_reasoning=starts_in_reasoning),
            parsers,
            one_call=body.parallel_tool_calls is False,
        )

    work = submission.Work(
        body,
        [prompt.token_ids],
        "messages",
        grammar,
        # The tools stay in the prompt, which is cached; calls are made impossible instead.
        parsers.call_openers if body.tools and body.tool_choice == "none" else (),
        _thinking_budget(served, info, body, prompt.opening),
        make,
    )
    return submission.start(served, info, work)


def _thinking_budget(
    served: Served, info: Ready, body: ChatCompletionRequest, opening: str
) -> ThinkingBudget | None:
    if body.thinking_token_budget is None:
        return None
    form = reasoning_form(served.model.parsers, opening)
    if form is None:
        raise invalid(
            "thinking_token_budget",
            "thinking_token_budget: this model's reasoning is not told apart from its answers.",
        )

    def encode(text: str) -> list[int]:
        ids: list[int] = served.model.encoder.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    close, then, opener = (encode(t) for t in (form.closer, form.before_answer, form.opener))
    if max([*close, *then, *opener], default=0) >= info.vocab_size:
        raise invalid(
            "thinking_token_budget",
            "thinking_token_budget: this model cannot write the marks of its reasoning.",
        )
    limit = body.thinking_token_budget
    return ThinkingBudget(limit, close, then, opener, starts_open=form.is_open)


class ParsedGeneration(Generation):
    """One sequence whose tokens become events."""

    def __init__(
        self,
        stream: TokenStream,
        prompt_token_ids: Sequence[int],
        detokenizer: Detokenizer,
        reading: Reading,
        parser: OutputParser,
        parsers: ParserFactory,
        *,
        one_call: bool,
    ) -> None:
        super().__init__(stream, prompt_token_ids, detokenizer, reading)
        self._parser = parser
        self._marker_chars = parsers.markers.char_of
        self._one_call = one_call
        self._unread: list[_Unread] = []
        self.reasoning_tokens = 0 if parsers.reads_reasoning else None

    def _delta(self, output: TokenOutput) -> TextDelta:
        self._check(output)
        stopped = output.finish_reason == "stop"
        by_token = stopped and not output.ends_with_text
        token_ids = output.token_ids[:-1] if by_token else output.token_ids
        events: list[Event] = []
        for token_id, entry in zip(token_ids, output.logprobs or repeat(None), strict=False):
            events += self._take(token_id, entry)
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and output.finish_reason is not None:
            self._count(output.token_ids[-1:] if by_token else ())
            events += self._end(truncated=not stopped)
        content = ""
        if self._log is not None:
            content = "".join(event.text for event in events if isinstance(event, ContentDelta))
        return TextDelta(
            self.reading.index,
            "",
            self.finish_reason,
            events,
            token_ids=self._take_ids(),
            tokens=self._shown(content),
        )

    def _take(self, token_id: int, entry: TokenLogprobs | None) -> list[Event]:
        reasoned = self._parser.in_reasoning
        char = self._marker_chars.get(token_id)
        if char is None:
            text = self._detokenizer.push((token_id,))
        else:
            text = self._detokenizer.flush() + char
        events = self._parser.push(text) if text else []
        self._count((token_id,))
        reasoned = reasoned or self._parser.in_reasoning
        if self.reasoning_tokens is not None:
            self.reasoning_tokens += reasoned
        if self._log is not None:
            self._unread.append(_Unread(token_id, entry, len(text)))
            self._sort_out(events, is_content=char is None and not reasoned)
        return self._cut(events)

    def _sort_out(self, events: list[Event], *, is_content: bool) -> None:
        """Log the tokens that have turned out to be content, and forget those that are none.

        ``is_content``: nothing speaks against the newest one, so far.
        """
        assert self._log is not None
        left = sum(len(event.text) for event in events if isinstance(event, ContentDelta))
        if left:
            if not isinstance(events[0], ContentDelta):
                del self._unread[:-1]
            *others, newest = self._unread
            for token in others:
                size = min(token.num_chars, left)
                self._log.add(token.token_id, token.logprobs, size)
                left -= size
            self._log.add(newest.token_id, newest.logprobs, left)
        if left or events or not is_content:
            self._unread.clear()

    def _end(self, *, truncated: bool) -> list[Event]:
        events = self._parser.push(self._detokenizer.flush())
        events += self._parser.finish(truncated=truncated)
        if self._unread:
            self._sort_out(events, is_content=True)
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
        if self._matcher is None or self.completion_tokens <= self.reading.min_tokens:
            return [event]
        text, found = self._matcher.push(event.text)
        if found:
            text += self._note_stop_string()
            self._stop("tool_calls" if self._parser.calls else "stop")
        return [ContentDelta(text)] if text else []

    def _stop(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._stream.close("stop")


class _Unread(Struct, frozen=True):
    """A token whose text the parser has not turned into events yet."""

    token_id: int
    logprobs: TokenLogprobs | None
    num_chars: int


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
