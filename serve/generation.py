"""One sequence after another from token ids to text, for streams and whole answers alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET, Struct

from quire.engine.messages import TokenOutput
from quire.serve.backend import GenerationFailed, TokenStream
from quire.serve.detokenizer import Detokenizer, StopStringMatcher
from quire.serve.parsers.events import Event
from quire.serve.responses import (
    CompletionTokensDetails,
    FinishReason,
    PromptTokensDetails,
    Usage,
)


class TextDelta(Struct, frozen=True):
    index: int  # of the sequence within its request
    text: str
    finish_reason: FinishReason | None  # set in each sequence's last delta, and only there
    events: Sequence[Event] = ()  # what the tokens mean, in place of text, where that is asked for


class Generation:
    """One sequence: its tokens come in, its text goes out.

    ``completion_tokens`` counts to the token that ended the sequence, a stop token included;
    ``finish_reason`` is None until then.
    """

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        prompt_tokens: int,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._index = index
        self._stream = stream
        self._detokenizer = detokenizer
        self._matcher = StopStringMatcher(stop_strings) if stop_strings else None
        self._min_tokens = min_tokens
        self._first = True
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.reasoning_tokens: int | None = None  # None: the model's reasoning is not told apart
        self.cached_tokens = 0
        self.stop_string: str | None = None  # the one that ended the answer, where that is told
        self.finish_reason: FinishReason | None = None

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """At most one for each output of the worker; the last has a finish reason.

        Raises :class:`GenerationFailed`.
        """
        async for output in self._stream:
            delta = self._delta(output)
            if delta.text or delta.events or self.finish_reason is not None:
                yield delta
            if self.finish_reason is not None:
                return
        raise GenerationFailed("The worker ended the sequence without saying why.")

    def close(self) -> None:
        """Stop generating if the sequence is still running. Idempotent."""
        self._stream.close("abort")

    def _delta(self, output: TokenOutput) -> TextDelta:
        self._check(output)
        text = self._advance(output)
        return TextDelta(self._index, text, self.finish_reason)

    def _check(self, output: TokenOutput) -> None:
        if self._first:
            self.cached_tokens = output.num_cached_tokens
            self._first = False
        if output.finish_reason in ("error", "abort"):
            raise GenerationFailed(output.error or "The worker gave this request up.")

    def _advance(self, output: TokenOutput) -> str:
        token_ids = output.token_ids
        stopped = output.finish_reason == "stop"
        by_token = stopped and not output.ends_with_text
        if by_token:
            token_ids = token_ids[:-1]  # the stop token ends the text and is not part of it
        text = self._search(token_ids) if self._matcher else self._read(token_ids)
        if self.finish_reason is not None:
            return text
        if output.finish_reason is not None:
            self.completion_tokens += by_token
            text += self._finish("stop" if stopped else "length")
        return text

    def _read(self, token_ids: Sequence[int]) -> str:
        self.completion_tokens += len(token_ids)
        return self._detokenizer.push(token_ids)

    def _search(self, token_ids: Sequence[int]) -> str:
        """Token by token, so that the count ends with the token that completes a stop string."""
        assert self._matcher is not None
        shown: list[str] = []
        for token_id in token_ids:
            text = self._read((token_id,))
            if self.completion_tokens > self._min_tokens:
                text, found = self._matcher.push(text)
                if found:
                    self.finish_reason = "stop"
                    self._stream.close("stop")
                    shown.append(text)
                    break
            shown.append(text)
        return "".join(shown)

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text
        text, found = self._matcher.push(text)
        if found:
            self.finish_reason = "stop"
        return text + self._matcher.flush()


class GenerationGroup:
    """The sequences of one HTTP request."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations

    @property
    def usage(self) -> Usage:
        """Summed over the sequences; while they run, what has been used so far."""
        prompt = sum(generation.prompt_tokens for generation in self.generations)
        completion = sum(generation.completion_tokens for generation in self.generations)
        cached = sum(generation.cached_tokens for generation in self.generations)
        reasoned = [g.reasoning_tokens for g in self.generations if g.reasoning_tokens is not None]
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(cached),
            CompletionTokensDetails(sum(reasoned)) if reasoned else UNSET,
        )

    def close(self) -> None:
        for generation in self.generations:
            generation.close()

    async def deltas(self) -> AsyncIterator[list[TextDelta]]:
        """Batches of what the sequences have produced since the last batch.

        Raises :class:`GenerationFailed` if any of them fails.
        """
        if len(self.generations) == 1:
            async for delta in self.generations[0].deltas():
                yield [delta]
            return
        queue: asyncio.Queue[TextDelta | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(_feed(generation, queue)) for generation in self.generations]
        try:
            running = len(tasks)
            while running:
                batch: list[TextDelta] = []
                for item in [await queue.get(), *_waiting(queue)]:
                    if isinstance(item, Exception):
                        raise item
                    batch.append(item)
                    running -= item.finish_reason is not None
                yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(generation: Generation, queue: asyncio.Queue[TextDelta | Exception]) -> None:
    try:
        async for delta in generation.deltas():
            queue.put_nowait(delta)
    except Exception as error:  # raised again by the reader
        queue.put_nowait(error)


def _waiting(queue: asyncio.Queue[TextDelta | Exception]) -> list[TextDelta | Exception]:
    return [queue.get_nowait() for _ in range(queue.qsize())]
