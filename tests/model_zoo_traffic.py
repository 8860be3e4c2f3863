"""Serves staggered greedy requests through the engine and compares them with mlx-lm's output."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model_zoo import build, reference_generate
from model_zoo_base import VOCAB

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput, WorkerStats

TOKEN_BUDGET = 64  # most prompts are longer, so they are cut into chunks beside other decodes
POOL_TOKENS = 400  # hardly more than the longest request, too few for all that run at once
TIE = 1e-5  # logits closer than this may change places in float32


@dataclass(frozen=True)
class Divergence:
    """Where an output first left the reference, which had ``expected`` ahead by ``gap``."""

    request_id: int
    prompt_length: int
    position: int
    expected: int
    got: int
    gap: float


@dataclass(frozen=True)
class Served:
    tokens: list[int]
    num_cached_tokens: int


@dataclass(frozen=True)
class Comparison:
    ties: list[Divergence]
    mismatches: list[Divergence]
    hit_tokens: int  # prompt tokens of the repeated requests that came from the prefix cache
    stats: WorkerStats


def make_requests(seed: int) -> list[GenerateRequest]:
    """Prompts of 1 to 300 tokens, a quarter of which open with one of two shared prefixes."""
    draw = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(length)]

    prefixes = [tokens(draw.randint(40, 90)), tokens(draw.randint(120, 200))]
    mixed = [tokens(draw.randint(*draw.choice([(2, 80), (81, 300)]))) for _ in range(14)]
    for index in range(0, len(mixed), 2):
        mixed[index] = prefixes[index // 2 % 2] + mixed[index][:100]
    # Many short prompts in a row run at once and outgrow the pool together.
    short = [tokens(draw.randint(2, 30)) for _ in range(16)]
    prompts = [tokens(1), *mixed[:7], *short, tokens(300), *mixed[7:]]
    return [
        GenerateRequest(index, prompt, draw.randint(8, 24), SamplingParams(temperature=0.0))
        for index, prompt in enumerate(prompts)
    ]


def serve(
    engine: Engine,
    requests: Sequence[GenerateRequest],
    seed: int,
    after_step: Callable[[Engine], None] | None = None,
) -> dict[int, Served]:
    """Submit a request every step or two and step until all have finished."""
    draw = random.Random(seed)
    waiting = list(reversed(requests))
    outputs: dict[int, list[TokenOutput]] = {request.request_id: [] for request in requests}
    pause = 0
    for _ in range(5000):
        if waiting and pause == 0:
            engine.submit(waiting.pop())
            pause = draw.randint(1, 2)
        pause = max(0, pause - 1)
        for output in engine.step():
            outputs[output.request_id].append(output)
        if after_step is not None:
            after_step(engine)
        if not waiting and not engine.has_work:
            break
    for request in requests:
        reasons = [output.finish_reason for output in outputs[request.request_id]]
        assert reasons[-1:] == ["length"], f"request {request.request_id} ended with {reasons}"
        assert set(reasons[:-1]) <= {None}, f"request {request.request_id} ended twice"
    return {
        request_id: Served(
            [token for output in parts for token in output.token_ids], parts[-1].num_cached_tokens
        )
        for request_id, parts in outputs.items()
    }


def compare_with_reference(
    name: str,
    block_size: int = 16,
    seed: int = 0,
    encode_ahead: bool = False,
    *,
    after_step: Callable[[Engine], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Serve one family under memory pressure, then the newest prompts again from the cache.

    With ``encode_ahead`` as a worker does on a GPU: steps are encoded on a thread of their own.
    ``settings`` are of :class:`EngineConfig`.

    Raises ``quire.engine.errors.UnsupportedModel`` if the engine refuses the family.
    """
    engine = Engine(
        build(name, seed),
        EngineConfig(
            block_size=block_size,
            encode_ahead=encode_ahead,
            **{
                "num_blocks": POOL_TOKENS // block_size + 1,
                "max_num_seqs": 16,
                "max_num_batched_tokens": TOKEN_BUDGET,
                **settings,
            },
        ),
    )
    requests = make_requests(seed)
    # The shortest of the last to arrive: what they left in the cache has not been evicted since.
    newest = sorted(requests[-12:], key=lambda request: len(request.prompt_token_ids))

    def serve_both() -> tuple[dict[int, Served], dict[int, Served]]:
        return (
            serve(engine, requests, seed, after_step),
            serve(engine, newest, seed, after_step),
        )

    if encode_ahead:
        device = DeviceThread()
        engine.encode_on(device)
        first, second = device.run_beside(serve_both)
    else:
        first, second = serve_both()

    model = build(name, seed)
    ties: list[Divergence] = []
    mismatches: list[Divergence] = []
    for request in requests:
        prompt = request.prompt_token_ids
        expected, gaps = reference_generate(model, prompt, request.max_tokens)
        for served in (first, second):
            if request.request_id not in served:
                continue
            got = served[request.request_id].tokens
            assert len(got) == len(expected)
            for position, pair in enumerate(zip(expected, got, strict=True)):
                if pair[0] != pair[1]:
                    found = Divergence(
                        request.request_id, len(prompt), position, *pair, gaps[position]
                    )
                    (ties if found.gap < TIE else mismatches).append(found)
                    break
    hits = sum(served.num_cached_tokens for served in second.values())
    return Comparison(ties, mismatches, hits, engine.stats())
