"""Conversations of agents side by side: nearly all that a prompt shares with others is cached."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest
from model_zoo import build

from quire.cache.sequence_cache import Prefix
from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput
from quire.engine.sequence import Sequence

BLOCK_SIZE = 16


class Agents:
    """Sessions that begin with the same instructions and grow by answers and tools' results."""

    def __init__(self, name: str, num_sessions: int, num_window_blocks: int | None = None) -> None:
        config = EngineConfig(
            num_blocks=2200,
            block_size=BLOCK_SIZE,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            num_state_slots=129,
            num_window_blocks=num_window_blocks,
        )
        self.engine = Engine(build(name), config)
        self._draw = random.Random(0)
        instructions = self.text(180)
        self.sessions = [instructions + self.text(60) for _ in range(num_sessions)]
        self.num_cached = self.num_shared = 0
        self._computed: list[list[int]] = []
        self._request_id = 0

    def text(self, length: int) -> list[int]:
        return [self._draw.randrange(1, 100) for _ in range(length)]

    def edit(self) -> None:
        """Change a message in the middle of each session."""
        for tokens in self.sessions:
            middle = len(tokens) // 2
            tokens[middle : middle + 5] = self.text(5)

    def take_turns(self) -> None:
        for turn in range(12):
            if turn == 7:
                self.edit()
            self.turn()

    def turn(self) -> None:
        """An answer in each session, some of them shorter than a block, and what comes behind."""
        first = self._request_id
        for prompt in self.sessions:
            self.num_shared += self._shared(prompt)
            length = self._draw.choice([5, 9, 30, 47])
            request = GenerateRequest(self._request_id, prompt, length, SamplingParams(0.0))
            self.engine.submit(request)
            self._request_id += 1
        outputs: list[list[int]] = [[] for _ in self.sessions]
        while self.engine.has_work:
            for output in self.step():
                outputs[output.request_id - first] += output.token_ids
                if output.finish_reason is not None:
                    self.num_cached += output.num_cached_tokens
        for index, output in enumerate(outputs):
            # The last token is sampled, and not computed.
            self._computed.append(self.sessions[index] + output[:-1])
            self.sessions[index] = self.sessions[index] + output
            self.sessions[index] += self.text(self._draw.choice([20, 120, 300]))

    def step(self) -> list[TokenOutput]:
        return self.engine.step()

    def _shared(self, prompt: list[int]) -> int:
        """Tokens of the longest prefix that was computed before, in whole blocks."""
        longest = 0
        for tokens in self._computed:
            pairs = zip(prompt[:-1], tokens, strict=False)
            longest = max(
                longest, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            )
        return longest // BLOCK_SIZE * BLOCK_SIZE


class PreemptedAgents(Agents):
    """Whose answers lose their place now and then, although there is room for all of them."""

    def __init__(self, name: str, num_sessions: int) -> None:
        super().__init__(name, num_sessions)
        self.num_preempted = self.num_lost = self.num_found = 0
        self._chance = random.Random(1)
        self._lost: dict[Sequence, int] = {}
        self._start = self.engine.scheduler._start_running
        self.engine.scheduler._start_running = self._note_start  # type: ignore[method-assign]

    def step(self) -> list[TokenOutput]:
        outputs = super().step()
        scheduler = self.engine.scheduler
        answering = [
            s for s in scheduler.running if len(s.token_ids) > len(s.request.prompt_token_ids)
        ]
        if answering and self._chance.random() < 0.1:
            sequence = self._chance.choice(answering)
            # All that has retired: everything but the last token, which is sampled only.
            self._lost[sequence] = (len(sequence.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
            scheduler._preempt(sequence)
            self.num_preempted += 1
        return outputs

    def _note_start(self, sequence: Sequence, prefix: Prefix) -> None:
        if (lost := self._lost.pop(sequence, None)) is not None:
            self.num_lost += lost
            self.num_found += len(prefix.blocks) * BLOCK_SIZE
        self._start(sequence, prefix)


@pytest.mark.parametrize("name", ["lfm2", pytest.param("nemotron_h", marks=pytest.mark.long)])
def test_what_agents_share_with_earlier_turns_is_cached(name: str) -> None:
    agents = Agents(name, num_sessions=4)
    agents.take_turns()
    assert agents.num_cached >= 0.97 * agents.num_shared > 0
    states = agents.engine.stats().states
    assert states is not None
    assert states.used == 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["lfm2", "nemotron_h"])
def test_what_agents_share_is_cached_after_preemptions_too(name: str) -> None:
    """And an answer that lost its place goes on from what had been computed of it."""
    agents = PreemptedAgents(name, num_sessions=4)
    agents.take_turns()
    assert agents.num_cached >= 0.97 * agents.num_shared > 0
    assert agents.num_preempted > 20
    assert agents.num_found >= 0.97 * agents.num_lost > 0
    assert agents.engine.stats().preemptions == agents.num_preempted


@pytest.mark.long
def test_blocks_of_windows_for_few_sequences_are_enough() -> None:
    """As many as a start makes for eight sequences and windows of 24 tokens; two thirds of what
    layers that see all keep of these sessions would not fit."""
    agents = Agents("gemma3_text", num_sessions=4, num_window_blocks=178)
    agents.take_turns()
    assert agents.num_cached >= 0.97 * agents.num_shared > 0
    assert agents.engine.stats().preemptions == 0
