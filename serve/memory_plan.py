"""How much memory a model takes beside its context, and what fits into a machine's."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from quire.engine.memory.budget import (
    PIECES_AHEAD,
    SMALLEST_STEP,
    STEP_TOKENS,
    Budget,
    layers_at_once,
    working_set,
)
from quire.engine.memory.budget import DeviceName as Device
from quire.engine.memory.fit import Demand, tokens_held
from quire.serve.model_facts import Bits, ModelFacts
from quire.serve.settings import ServeSettings

DEFAULT_CONTEXT = 4096  # tokens, of models whose configuration does not say
LEAST_CONTEXT = 512  # tokens; a model that has room for less is not worth serving
# Numbers that one token of a step keeps per layer, in multiples of a layer's sizes: fitted to peaks
# that were measured with the default steps. On the CPU the buffers of about one layer are alive at
# a time, on GPUs those of two pieces of a long step, and of a short one those of all layers.
# On the CPU the most are alive within the feed-forward block or, if that is small, attention.
_CPU_ACTIVATIONS = (
    {"intermediate": 7.35, "hidden": 6.4, "heads_size": 3.2, "kv_size": 1.0},
    {"hidden": 8.4, "heads_size": 8.4, "kv_size": 8.4},
)
_GPU_ACTIVATIONS = ({"intermediate": 4.0, "hidden": 3.0, "heads_size": 3.0, "kv_size": 2.0},)


@dataclass(frozen=True)
class Memory:
    """What serving takes, in bytes."""

    weights: int
    kv_per_token: int  # in layers that keep every token
    kv_cache: int
    activations: int
    windows: int  # keys and values of layers with sliding windows
    states: int  # of recurrent layers

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.windows + self.states


def memory(
    facts: ModelFacts,
    device: Device,
    tokens: int,
    step_tokens: int,
    bits: Bits | None = None,
    sequences: int = 1,
) -> Memory:
    """What it takes to serve a model.

    Args:
        tokens: in the KV cache, of ``sequences`` of one length.
        step_tokens: of the longest step.
        bits: of the weights; None: as they are stored.
    """
    demand = _demand(facts, device, max(1, -(-tokens // sequences)), sequences, step_tokens)
    return Memory(
        weights=_weights(facts, device, bits),
        kv_per_token=demand.bytes_per_token,
        kv_cache=demand.bytes_per_token * tokens,
        activations=activations(facts, device, step_tokens),
        windows=demand.window_bytes(sequences),
        states=demand.state_bytes(sequences),
    )


def activations(facts: ModelFacts, device: Device, step_tokens: int) -> int:
    """Bytes that a step of prompts needs on top of weights and pages."""
    phases = _CPU_ACTIVATIONS if device == "cpu" else _GPU_ACTIVATIONS
    width = _width(facts, device)
    layers = 1
    if device != "cpu":
        piece = layers_at_once(step_tokens * facts.heads_size * width, facts.layers)
        layers = facts.layers if piece is None else PIECES_AHEAD * piece
    numbers = max(
        sum(factor * getattr(facts, name) for name, factor in phase.items()) for phase in phases
    )
    return int(step_tokens * layers * numbers * width)


def _weights(facts: ModelFacts, device: Device, bits: Bits | None) -> int:
    """Bytes; ``bits`` None: as it is."""
    if bits is None:
        return facts.widened_weight_bytes if device == "cpu" else facts.weight_bytes
    widened = 2 if device == "cpu" and bits == 16 else 1
    return widened * facts.quantised_bytes(bits)


def _demand(
    facts: ModelFacts, device: Device, context: int, sequences: int, step_tokens: int
) -> Demand:
    kept, width = facts.kept, _width(facts, device)
    per_token, per_state = kept.token * width, kept.state * width + 4 * kept.float_state
    # As a worker spaces the states that it keeps of a prompt (PagedModel.state_spacing).
    spacing = max(256, per_state // per_token) if per_token else 2048
    return Demand(
        context=context,
        max_num_seqs=sequences,
        step_tokens=step_tokens,
        block_size=ServeSettings.block_size,
        bytes_per_token=per_token,
        dtype="",
        bytes_per_state=per_state,
        state_spacing=spacing,
        window=kept.window,
        bytes_per_window_token=kept.window_token * width,
    )


def _width(facts: ModelFacts, device: Device) -> int:
    """Bytes of a number: the CPU computes in float32, GPUs as the weights are stored."""
    return 4 if device == "cpu" else facts.number_bytes


@dataclass(frozen=True)
class Verdict:
    """Whether it fits: with no more than a larger KV cache, with smaller steps and context, or not
    at all.

    Attributes:
        step_tokens: to be set if it is tight; else the default. 0 if it does not fit.
        tokens: that the KV cache holds with these settings, all requests together; likewise.
        kv_cache_memory: bytes to be set; None: what a server takes by itself is enough.
        by_default: tokens that it holds with no settings at all; 0: it does not start.
        most: tokens that it could be set to hold.
    """

    kind: Literal["fits", "tight", "does not fit"]
    step_tokens: int
    tokens: int
    kv_cache_memory: int | None
    by_default: int
    most: int


def judge(
    facts: ModelFacts,
    device: Device,
    ram: int,
    tokens: int,
    bits: Bits | None = None,
) -> Verdict:
    """``tokens``: what the KV cache is wanted to hold, all requests together."""
    server = _Server(facts, device, working_set(ram, device), _weights(facts, device, bits))
    step = STEP_TOKENS[device]
    by_default = server.held(step, None)
    most = server.held(step, max(server.budget(step).rest, 0))
    # Where no layer keeps every token there is no more to ask for.
    if by_default >= tokens or (by_default and not facts.kept.token):
        return Verdict("fits", step, by_default, None, by_default, max(most, by_default))
    if most >= tokens:
        size = server.size_for(step, tokens)
        return Verdict("fits", step, server.held(step, size), size, by_default, most)
    while step >= SMALLEST_STEP:
        most = server.held(step, server.room(step))
        if most >= min(tokens, LEAST_CONTEXT):
            size = server.size_for(step, min(tokens, most))
            return Verdict("tight", step, server.held(step, size), size, by_default, most)
        step //= 2
    return Verdict("does not fit", 0, 0, None, 0, 0)


@dataclass(frozen=True)
class _Server:
    """What a server of a model comes to, that has no settings but those for its memory.

    Attributes:
        usable: bytes that it may take in all.
        weights: bytes.
    """

    facts: ModelFacts
    device: Device
    usable: int
    weights: int

    def budget(self, step: int) -> Budget:
        taken = activations(self.facts, self.device, step)
        return Budget(self.device, self.usable, None, self.weights, taken)

    def held(self, step: int, kv_cache_memory: int | None) -> int:
        """Tokens in its KV cache."""
        context = self.facts.context or DEFAULT_CONTEXT
        demand = _demand(self.facts, self.device, context, ServeSettings.max_num_seqs, step)
        return tokens_held(self.budget(step), demand, kv_cache_memory)

    def room(self, step: int) -> int:
        """Bytes, in whole MiB, that the KV cache may be set to take at most."""
        budget = self.budget(step)
        return max(budget.usable - budget.weights - budget.activations, 0) >> 20 << 20

    def size_for(self, step: int, tokens: int) -> int:
        """Bytes, in whole MiB, with which the KV cache holds so many."""
        sizes = range(self.room(step) >> 20)
        return bisect_left(sizes, tokens, key=lambda mib: self.held(step, mib << 20)) << 20
