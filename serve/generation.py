"""One sequence after another from token ids to text, for streams and whole answers alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import chain, repeat

from msgspec import UNSET, Struct

from quire.engine.messages import TokenLogprobs, TokenOutput
from quire.serve.backend import GenerationFailed, TokenStream
from quire.serve.detokenizer import Detokenizer, StopStringMatcher
from quire.serve.openai_answer import (
    CompletionTokensDetails,
    FinishReason,
    PromptTokensDetails,
    Usage,
)
from quire.serve.parsers.events import Event
from quire.serve.token_log import ShownToken, TokenLog


class TextDelta(Struct, frozen=True):
    index: int  # of the sequence within its request
    text: str
    finish_reason: FinishReason | None  # set in each sequence's last delta, and only there
    events: Sequence[Event] = ()  # what the tokens mean, in place of text, where that is asked for
    token_ids: Sequence[int] = ()  # all that were counted, where they are asked for
    tokens: Sequence[ShownToken] = ()  # those of the text, where log-probabilities are asked for


class Reading(Struct, frozen=True):
    """How the tokens of a sequence are read."""

    stop_strings: Sequence[str] = ()
    shows_stop_string: bool = False
    min_tokens: int = 0  # stop strings that end before are none
    token_ids: bool = False  # whether deltas have them
    logprobs: bool = False
    index: int = 0  # of the sequence within its request
    repeats_prompt: bool = False  # of the sequence before: usage counts it once
    echoes: bool = False  # the text begins with the prompt
    discards: bool = False  # what is generated; only the prompt matters


class Generation:
    """One sequence: its tokens come in, its text goes out.

    ``completion_tokens`` counts to the token that ended the sequence, a stop token included;
    ``finish_reason`` is None until then.
    """

    def __init__(
        self,
        stream: TokenStream,
        prompt_token_ids: Sequence[int],
        detokenizer: Detokenizer,
        reading: Reading = Reading(),  # noqa: B008 - frozen
    ) -> None:
        self.reading = reading
        self._stream = stream
        self._detokenizer = detokenizer
        self._matcher = StopStringMatcher(reading.stop_strings) if reading.stop_strings else None
        self._log = TokenLog() if reading.logprobs else None
        self._taken: list[int] = []  # token ids since the last delta
        self._first = True
        self._echo = ""  # waits to be shown
        self.prompt_token_ids = prompt_token_ids
        self.total_logprob = 0.0  # of the output, where log-probabilities are asked for
        self.completion_tokens = 0
        self.reasoning_tokens: int | None = None  # None: the model's reasoning is not told apart
        self.cached_tokens = 0
        self.stop_string: str | None = None  # the one that ended the answer, where that is told
        self.finish_reason: FinishReason | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(1, self.completion_tokens)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """At most one for each output of the worker; the last has a finish reason.

        Raises :class:`GenerationFailed`.
        """
        async for output in self._stream:
            delta = self._delta(output)
            if delta.text or delta.events or delta.token_ids or self.finish_reason is not None:
                yield delta
            if self.finish_reason is not None:
                return
        raise GenerationFailed("The worker ended the sequence without saying why.")

    def close(self) -> None:
        """Stop generating if the sequence is still running. Idempotent."""
        self._stream.close("abort")

    def _delta(self, output: TokenOutput) -> TextDelta:
        self._check(output)
        text = self._echo + self._advance(output)
        self._echo = ""
        return TextDelta(
            self.reading.index,
            text,
            self.finish_reason,
            token_ids=self._take_ids(),
            tokens=self._shown(text),
        )

    def _take_ids(self) -> list[int]:
        taken, self._taken = self._taken, []
        return taken

    def _shown(self, text: str) -> list[ShownToken]:
        if self._log is None:
            return []
        tokens = self._log.show(len(text))
        if self.finish_reason is not None:
            tokens += self._log.finish(cut=self.stop_string is not None)
        return tokens

    def _check(self, output: TokenOutput) -> None:
        if self._first:
            self.cached_tokens = output.num_cached_tokens
            self._first = False
            if self.reading.echoes:
                self._echo_prompt(output.prompt_logprobs)
        self.total_logprob += sum(entry.logprob for entry in output.logprobs)
        if output.finish_reason in ("error", "abort"):
            raise GenerationFailed(output.error or "The worker gave this request up.")

    def _echo_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        detokenizer = Detokenizer(self._detokenizer.table, [])
        entries = chain([None], logprobs) if logprobs else repeat(None)
        for token_id, entry in zip(self.prompt_token_ids, entries, strict=False):
            text = detokenizer.push((token_id,))
            self._echo += text
            if self._log is not None:
                self._log.add(token_id, entry, len(text))

    def _advance(self, output: TokenOutput) -> str:
        if self.reading.discards:
            if output.finish_reason is not None:
                self.finish_reason = "length"
            return ""
        token_ids = output.token_ids
        stopped = output.finish_reason == "stop"
        by_token = stopped and not output.ends_with_text
        if by_token:
            token_ids = token_ids[:-1]  # the stop token ends the text and is not part of it
        if self._matcher is None and self._log is None:
            text = self._read(token_ids)
        else:
            text = self._read_one_by_one(token_ids, output.logprobs or repeat(None))
        if self.finish_reason is not None:
            return text
        if output.finish_reason is not None:
            self._count(output.token_ids[-1:] if by_token else ())
            text += self._finish("stop" if stopped else "length")
        return text

    def _count(self, token_ids: Sequence[int]) -> None:
        self.completion_tokens += len(token_ids)
        if self.reading.token_ids:
            self._taken += token_ids

    def _read(self, token_ids: Sequence[int]) -> str:
        self._count(token_ids)
        return self._detokenizer.push(token_ids)

    def _read_one_by_one(
        self, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs | None]
    ) -> str:
        """So that the count ends with the token that completes a stop string."""
        shown: list[str] = []
        for token_id, entry in zip(token_ids, logprobs, strict=False):
            text = self._read((token_id,))
            if self._log is not None:
                self._log.add(token_id, entry, len(text))
            if self._matcher is not None and self.completion_tokens > self.reading.min_tokens:
                text, found = self._matcher.push(text)
                if found:
                    self.finish_reason = "stop"
                    text += self._note_stop_string()
                    self._stream.close("stop")
                    shown.append(text)
                    break
            shown.append(text)
        return "".join(shown)

    def _note_stop_string(self) -> str:
        """What is shown of the stop string that has been found."""
        assert self._matcher is not None
        self.stop_string = self._matcher.found
        return (self.stop_string or "") if self.reading.shows_stop_string else ""

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text
        text, found = self._matcher.push(text)
        if found:
            self.finish_reason = "stop"
            text += self._note_stop_string()
        return text + self._matcher.flush()


class GenerationGroup:
    """The sequences of one HTTP request."""

    def __init__(self, generations: Sequence[Generation], ignored: Sequence[str] = ()) -> None:
        """``ignored`` names fields that were accepted although they are not carried out."""
        self.generations = generations
        self.ignored = ignored

    @property
    def usage(self) -> Usage:
        """Summed over the sequences; while they run, what has been used so far."""
        prompts = [g for g in self.generations if not g.reading.repeats_prompt]
        prompt = sum(generation.prompt_tokens for generation in prompts)
        completion = sum(generation.completion_tokens for generation in self.generations)
        # Of a prompt's sequences the first to run found the fewest cached tokens: those count. It
        # may be any of them.
        cached: list[int] = []
        for generation in self.generations:
            found = generation.cached_tokens
            if generation.reading.repeats_prompt:
                found = min(found, cached.pop())
            cached.append(found)
        reasoned = [g.reasoning_tokens for g in self.generations if g.reasoning_tokens is not None]
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(sum(cached)),
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
