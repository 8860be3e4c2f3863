"""How much memory a model takes beside its context, and what fits into a machine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quire.engine.memory.budget import (
    DEFAULT_FRACTION,
    PIECES_AHEAD,
    SMALLEST_STEP,
    STEP_TOKENS,
    layers_at_once,
    working_set,
)
from quire.engine.memory.budget import DeviceName as Device
from quire.engine.memory.fit import Demand
from quire.serve.model_facts import Bits, ModelFacts

_BLOCK_SIZE = 16  # tokens, unless settings say otherwise
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
    if bits is None:
        weights = facts.widened_weight_bytes if device == "cpu" else facts.weight_bytes
    else:
        widened = 2 if device == "cpu" and bits == 16 else 1
        weights = widened * facts.quantised_bytes(bits)
    kept, width = facts.kept, _width(facts, device)
    kv_per_token = kept.token * width
    demand = Demand(
        context=max(1, -(-tokens // sequences)),
        max_num_seqs=sequences,
        step_tokens=step_tokens,
        block_size=_BLOCK_SIZE,
        bytes_per_token=kv_per_token,
        dtype="",
        bytes_per_state=kept.state * width + 4 * kept.float_state,
        window=kept.window,
        bytes_per_window_token=kept.window_token * width,
    )
    return Memory(
        weights=weights,
        kv_per_token=kv_per_token,
        kv_cache=kv_per_token * tokens,
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


def _width(facts: ModelFacts, device: Device) -> int:
    """Bytes of a number: the CPU computes in float32, GPUs as the weights are stored."""
    return 4 if device == "cpu" else facts.number_bytes


@dataclass(frozen=True)
class Verdict:
    """Whether it fits: by itself, with smaller steps and context, or not at all."""

    kind: Literal["fits", "tight", "does not fit"]
    step_tokens: int
    tokens: int  # that the KV cache may hold, all requests together; 0 if it does not fit


def judge(
    facts: ModelFacts,
    device: Device,
    ram: int,
    tokens: int,
    bits: Bits | None = None,
    sequences: int = 1,
) -> Verdict:
    """``tokens``: what the KV cache is wanted to hold, of so many ``sequences``."""
    usable = working_set(ram, device)
    step = STEP_TOKENS[device]
    whole = memory(facts, device, tokens, step, bits, sequences)
    room = _room(whole, int(DEFAULT_FRACTION * usable), tokens)
    if room >= tokens:
        return Verdict("fits", step, room)
    while step >= SMALLEST_STEP:
        room = _room(memory(facts, device, tokens, step, bits, sequences), usable, tokens)
        if room >= min(tokens, LEAST_CONTEXT):
            return Verdict("tight", step, min(room, tokens))
        step //= 2
    return Verdict("does not fit", 0, 0)


def _room(needs: Memory, limit: int, tokens: int) -> int:
    """Tokens that the KV cache can hold within ``limit`` bytes in all, where ``tokens`` are wanted;
    no more of them where they take nothing."""
    rest = limit - needs.total + needs.kv_cache
    if not needs.kv_per_token:
        return tokens if rest >= 0 else 0
    return max(rest, 0) // needs.kv_per_token
