"""From a checked request and its prompts to sequences in the worker's queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from quire.engine.messages import GenerateRequest, Ready, SamplingParams, ThinkingBudget
from quire.serve.backend import UNNUMBERED, TokenStream
from quire.serve.detokenizer import Detokenizer
from quire.serve.errors import invalid
from quire.serve.generation import Generation, GenerationGroup, Reading
from quire.serve.openai_protocol import CompletionRequest, GenerationRequest
from quire.serve.registry import Served
from quire.serve.sampling_fields import sampling_of, seed_of_choice

MakeGeneration = Callable[[Reading, TokenStream, Sequence[int], Detokenizer], Generation]


def _text_only(
    reading: Reading, stream: TokenStream, prompt: Sequence[int], detokenizer: Detokenizer
) -> Generation:
    return Generation(stream, prompt, detokenizer, reading)


@dataclass(frozen=True)
class Work:
    """What is to be generated.

    Attributes:
        prompts: token ids.
        prompt_field: what errors about the prompts are blamed on.
        grammar: of the output, checked; "" for none.
        banned_token_ids: never drawn, where no grammar wants them.
        make: how a sequence is read.
    """

    body: GenerationRequest
    prompts: Sequence[Sequence[int]]
    prompt_field: str
    grammar: str = ""
    banned_token_ids: Sequence[int] = ()
    thinking: ThinkingBudget | None = None
    make: MakeGeneration = field(default=_text_only)


def start(served: Served, info: Ready, work: Work) -> GenerationGroup:
    """Submit the sequences of each prompt, or none at all.

    Raises :class:`ApiError` and what :meth:`Backend.submit` raises.
    """
    body = work.body
    count = len(work.prompts) * body.num_sequences
    if count > served.backend.max_in_flight:
        raise invalid(
            work.prompt_field if len(work.prompts) > 1 else "n",
            f"The request asks for {count} answers; this server takes "
            f"{served.backend.max_in_flight} at a time.",
        )
    ignored: list[str] = []
    sampling = sampling_of(body, served.model, info, work.banned_token_ids)
    requests = [_build(served, info, work, sampling, prompt, ignored) for prompt in work.prompts]
    served.backend.check_room(count)
    model = served.model
    table = model.token_bytes if body.skip_special_tokens is not False else model.all_token_bytes
    generations: list[Generation] = []
    try:
        for request in requests:
            for choice in range(body.num_sequences):
                stream = served.backend.submit(_choice(request, choice))
                reading = _reading(body, request, len(generations), choice)
                detokenizer = Detokenizer(table, request.prompt_token_ids)
                prompt = request.prompt_token_ids
                generations.append(work.make(reading, stream, prompt, detokenizer))
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return GenerationGroup(generations, [*dict.fromkeys(ignored)])


def _choice(request: GenerateRequest, choice: int) -> GenerateRequest:
    if choice == 0:
        return request
    seed = seed_of_choice(request.sampling.seed, choice)
    sampling = msgspec.structs.replace(request.sampling, seed=seed)
    return msgspec.structs.replace(request, sampling=sampling)


def _reading(body: GenerationRequest, request: GenerateRequest, index: int, choice: int) -> Reading:
    return Reading(
        stop_strings=body.stop_strings,
        shows_stop_string=body.include_stop_str_in_output is True,
        min_tokens=request.min_tokens,
        token_ids=body.return_token_ids is True,
        logprobs=request.logprobs is not None,
        index=index,
        repeats_prompt=choice > 0,
        echoes=isinstance(body, CompletionRequest) and body.echo is True,
        discards=body.token_limit[0] == 0,
    )


def _build(
    served: Served,
    info: Ready,
    work: Work,
    sampling: SamplingParams,
    prompt: Sequence[int],
    ignored: list[str],
) -> GenerateRequest:
    """Adds to ``ignored`` what has been accepted although it is not carried out."""
    body = work.body
    if body.truncate_prompt_tokens is not None:
        prompt = prompt[-body.truncate_prompt_tokens :]
    check_prompt(prompt, work.prompt_field, info)
    max_tokens = _token_limit(body, len(prompt), work.prompt_field, info, ignored)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(
            "min_tokens", f"min_tokens is {min_tokens}, more than the {max_tokens} allowed."
        )
    stop_token_ids = set(body.stop_token_ids or ())
    if max(stop_token_ids, default=0) >= info.vocab_size:
        raise invalid(
            "stop_token_ids",
            f"stop_token_ids holds {max(stop_token_ids)}; the model has {info.vocab_size} tokens.",
        )
    if not body.ignore_eos:
        stop_token_ids.update(t for t in served.model.eos_token_ids if t < info.vocab_size)
    if body.allowed_token_ids is not None:
        if work.grammar:
            raise invalid("allowed_token_ids", "allowed_token_ids excludes structured output.")
        if min_tokens and stop_token_ids.issuperset(body.allowed_token_ids):
            raise invalid("allowed_token_ids", "min_tokens leaves none of allowed_token_ids.")
    # The likeliest sequences are told by their tokens' log-probabilities.
    ranks = body.num_sequences > body.num_choices
    num_top = body.num_top_logprobs
    echoes = isinstance(body, CompletionRequest) and body.echo
    return GenerateRequest(
        request_id=UNNUMBERED,
        prompt_token_ids=list(prompt),
        max_tokens=max(max_tokens, 1),
        sampling=sampling,
        min_tokens=min_tokens,
        stop_token_ids=sorted(stop_token_ids),
        cache_salt=body.cache_salt or "",
        grammar=work.grammar,
        logprobs=0 if num_top is None and ranks else num_top,
        prompt_logprobs=num_top if echoes else None,
        priority=body.priority or 0,
        thinking=work.thinking,
    )


def check_prompt(prompt: Sequence[int], prompt_field: str, info: Ready) -> None:
    if not prompt:
        raise invalid(prompt_field, f"{prompt_field} has no tokens; send at least one.")
    if max(prompt) >= info.vocab_size:
        raise invalid(
            prompt_field,
            f"{prompt_field} holds the token id {max(prompt)}; the model has {info.vocab_size}.",
        )


def _token_limit(
    body: GenerationRequest,
    prompt_tokens: int,
    prompt_field: str,
    info: Ready,
    ignored: list[str],
) -> int:
    """No more than what the context leaves: agents ask for 32,000 tokens of any model."""
    requested, name = body.token_limit
    left = info.max_model_len - prompt_tokens
    if left < 1:
        raise invalid(
            prompt_field,
            f"This model holds {info.max_model_len} tokens of prompt and answer together; the "
            f"prompt has {prompt_tokens}. Shorten it.",
            code="context_length_exceeded",
        )
    if requested is not None and requested > left:
        ignored.append(name)
    return left if requested is None else min(requested, left)
