"""From a checked request and its prompts to sequences in the worker's queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quire.engine.messages import GenerateRequest, Ready, SamplingParams
from quire.serve.backend import UNNUMBERED, TokenStream
from quire.serve.detokenizer import Detokenizer
from quire.serve.errors import invalid
from quire.serve.generation import Generation, GenerationGroup
from quire.serve.protocol import GenerationRequest
from quire.serve.registry import Served
from quire.serve.served_model import ServedModel

MakeGeneration = Callable[[int, GenerateRequest, TokenStream], Generation]


def start(
    served: Served,
    info: Ready,
    body: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    prompt_field: str,
    make: MakeGeneration | None = None,
    grammar: str = "",
) -> GenerationGroup:
    """Submit one sequence for each prompt, or none.

    ``make`` says how a sequence is read; None reads text. ``prompt_field`` is what errors about
    the prompts are blamed on; ``grammar`` has been checked. Raises :class:`ApiError` and what
    :meth:`Backend.submit` raises.
    """
    requests = [
        _build(served.model, body, prompt, prompt_field, info, grammar) for prompt in prompts
    ]
    generations: list[Generation] = []
    try:
        for index, request in enumerate(requests):
            stream = served.backend.submit(request)
            if make is not None:
                generations.append(make(index, request, stream))
                continue
            generations.append(
                Generation(
                    index,
                    stream,
                    len(request.prompt_token_ids),
                    Detokenizer(served.model.token_bytes, request.prompt_token_ids),
                    body.stop_strings,
                    request.min_tokens,
                )
            )
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return GenerationGroup(generations)


def _build(
    model: ServedModel,
    body: GenerationRequest,
    prompt: Sequence[int],
    prompt_field: str,
    info: Ready,
    grammar: str,
) -> GenerateRequest:
    if not prompt:
        raise invalid(prompt_field, f"{prompt_field} has no tokens; send at least one.")
    if max(prompt) >= info.vocab_size:
        raise invalid(
            prompt_field,
            f"{prompt_field} holds the token id {max(prompt)}; the model has {info.vocab_size}.",
        )
    max_tokens = _token_limit(body, len(prompt), prompt_field, info.max_model_len)
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
        stop_token_ids.update(model.eos_token_ids)
    return GenerateRequest(
        request_id=UNNUMBERED,
        prompt_token_ids=list(prompt),
        max_tokens=max_tokens,
        sampling=_sampling(body, model.default_sampling),
        min_tokens=min_tokens,
        stop_token_ids=sorted(stop_token_ids),
        grammar=grammar,
    )


def _token_limit(
    body: GenerationRequest, prompt_tokens: int, prompt_field: str, max_model_len: int
) -> int:
    requested, field = body.token_limit
    wanted = 1 if requested is None else requested
    if prompt_tokens + wanted > max_model_len:
        asked = f" and {field} asks for {requested}" if requested is not None else ""
        raise invalid(
            prompt_field,
            f"This model holds {max_model_len} tokens of prompt and answer together; the prompt "
            f"has {prompt_tokens}{asked}. Shorten the prompt or ask for less.",
            code="context_length_exceeded",
        )
    return max_model_len - prompt_tokens if requested is None else requested


def _sampling(body: GenerationRequest, default: SamplingParams) -> SamplingParams:
    """The request's parameters, and the model's own where the request is silent."""
    top_k = default.top_k if body.top_k is None else max(body.top_k, 0)  # -1 says "off" too
    top_p = default.top_p if body.top_p is None else body.top_p
    if top_p == 0:
        top_k, top_p = 1, 1.0
    return SamplingParams(
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=default.min_p if body.min_p is None else body.min_p,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
    )
