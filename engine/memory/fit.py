"""Whether a model fits into a budget, and what would fit if it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from quire.cache.state_pool import MIN_SLOTS
from quire.cache.window_pool import blocks_of_window
from quire.engine.errors import EngineError
from quire.engine.memory.budget import (
    SMALLEST_STEP,
    Budget,
    DoesNotFit,
    Pool,
    divide,
    sequences_to_hold,
)

_LEAST_TOKENS = 64  # in the KV cache
# States that are kept of one sequence, at most: hardly anybody comes back to more.
_STATES_PER_SEQUENCE = 64
# Where windows have blocks of their own: the expected length of a context. It says how many windows
# there will be, and so how memory is divided between them and the other layers.
_USUAL_CONTEXT = 16 << 10  # tokens
# Sequences whose windows get room before all others, together with one context of full length.
_FEW_SEQUENCES = 4
_MORE = 0.95  # a fraction that leaves the rest of a machine little
# Bytes of a 4-bit weight in groups of 64, of which each has a scale and a bias.
_FOUR_BITS = (4 + 32 / 64) / 8
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Demand:
    """What a model is asked to serve.

    Attributes:
        context: tokens of one request.
        max_num_seqs: requests at a time.
        step_tokens: of the longest step.
        block_size: tokens.
        bytes_per_token: in the KV cache, all layers together that keep every token.
        dtype: of the weights.
        bytes_per_state: of a sequence, all recurrent layers together; 0: there are none.
        state_spacing: tokens between the states kept of a long prompt.
        window: tokens that layers with sliding windows see; 0: there are none.
        bytes_per_window_token: in the KV cache, all layers with windows together.
    """

    context: int
    max_num_seqs: int
    step_tokens: int
    block_size: int
    bytes_per_token: int
    dtype: str
    bytes_per_state: int = 0
    state_spacing: int = 1
    window: int = 0
    bytes_per_window_token: int = 0

    def pools(self, budget: Budget) -> dict[str, Pool]:
        """The pools that the model has, by the names of the fields of :class:`Sizes`."""
        sequences = sequences_to_hold(budget.device, self.max_num_seqs)
        pools = {"blocks": self._blocks(sequences)}
        if self.bytes_per_state:
            pools["slots"] = self._slots(sequences)
        if self.window:
            pools["window_blocks"] = self._window_blocks(sequences)
        return pools

    def _blocks(self, sequences: int) -> Pool:
        one = -(-self.context // self.block_size)
        enough = 1 + sequences * one
        if not self.bytes_per_token:  # a block is no more than a number in a table
            return Pool(1, least=enough, enough=enough)
        blocks = Pool(
            self.block_size * self.bytes_per_token,
            least=1 + -(-_LEAST_TOKENS // self.block_size),
            enough=enough,
        )
        if not self.window:
            return blocks
        usual = -(-min(self.context, _USUAL_CONTEXT) // self.block_size)
        return replace(blocks, one=1 + one, usual=1 + sequences * usual)

    def _slots(self, sequences: int) -> Pool:
        kept = min(_STATES_PER_SEQUENCE, self.context // self.state_spacing)
        slots = 1 + 2 * self.max_num_seqs + sequences * kept
        return Pool(self.bytes_per_state, least=MIN_SLOTS, enough=slots)

    def _window_blocks(self, sequences: int) -> Pool:
        size, context = self.block_size, -(-self.context // self.block_size)
        window = min(context, blocks_of_window(self.window, size))
        # A step's prompts leave their windows when it has retired, and the next runs meanwhile.
        chunks = 1 + 2 * -(-self.step_tokens // size)
        usual = chunks + sequences * window
        return Pool(
            size * self.bytes_per_window_token,
            least=1 + min(context, blocks_of_window(self.window, size, SMALLEST_STEP)),
            enough=2 * usual,  # as many again, for windows that others go on behind
            one=chunks + min(_FEW_SEQUENCES, sequences) * window,
            usual=usual,
        )

    def window_bytes(self, sequences: int) -> int:
        """Bytes that so many requests take at a time in layers with windows."""
        if not self.window:
            return 0
        pool = self._window_blocks(sequences)
        most = 1 + sequences * -(-self.context // self.block_size)
        return min(pool.usual, most) * pool.unit_bytes

    def state_bytes(self, sequences: int) -> int:
        """Bytes of the states with which so many requests run, none kept for others."""
        return (1 + 2 * sequences) * self.bytes_per_state

    def pool_bytes(self, budget: Budget) -> int:
        one = (1 + -(-self.context // self.block_size)) * self.block_size * self.bytes_per_token
        one += MIN_SLOTS * self.bytes_per_state
        if self.window:
            windows = self._window_blocks(_FEW_SEQUENCES)
            one += windows.one * windows.unit_bytes
        return budget.pool_bytes(one)


class Sizes(NamedTuple):
    blocks: int  # for keys and values, the scratch block included
    slots: int = 0  # for states; 0 without recurrent layers
    window_blocks: int = 0  # likewise of layers with sliding windows; 0 without them


def size_pools(budget: Budget, demand: Demand, wanted: int | None) -> Sizes:
    """How much of everything there is room for.

    Args:
        wanted: bytes for all of them; None: by the budget.

    Raises:
        EngineError: they do not fit; the message says what would.
    """
    pools = demand.pools(budget)
    if wanted is None:
        try:
            return _sizes(pools, divide(demand.pool_bytes(budget), [*pools.values()]))
        except DoesNotFit:
            raise EngineError(_too_little(budget, demand, pools)) from None
    if wanted < _least(pools):
        raise EngineError(
            f"--kv-cache-memory {size(wanted)} holds fewer than {_least_text(demand)}: "
            f"raise it to at least {size(_least(pools))}"
        )
    room = budget.usable - budget.weights - budget.activations
    if wanted > room:
        raise EngineError(
            f"--kv-cache-memory {size(wanted)} does not fit beside {_taken(budget, demand)} in "
            f"{size(budget.usable)}: {size(max(room, 0))} would"
        )
    # All of it is used: half of it for states, and for blocks what windows leave.
    growing = {name for name in pools if name != "window_blocks"}
    if not demand.bytes_per_token:
        growing.remove("blocks")
    for name in growing or {"window_blocks"}:
        pools[name] = replace(pools[name], enough=wanted // pools[name].unit_bytes)
    return _sizes(pools, divide(wanted, [*pools.values()]))


def tokens_held(budget: Budget, demand: Demand, wanted: int | None) -> int:
    """Tokens in the KV cache, all requests together, of a worker that sizes its pools like this; 0
    if it cannot. ``wanted``: as for :func:`size_pools`."""
    try:
        return (size_pools(budget, demand, wanted).blocks - 1) * demand.block_size
    except EngineError:
        return 0


def _sizes(pools: Mapping[str, Pool], units: Sequence[int]) -> Sizes:
    return Sizes(**dict(zip(pools, units, strict=True)))


def _least(pools: Mapping[str, Pool]) -> int:
    return sum(pool.least * pool.unit_bytes for pool in pools.values())


def _least_text(demand: Demand) -> str:
    parts = [f"{_LEAST_TOKENS} tokens"]
    if demand.bytes_per_state:
        parts.append(f"{MIN_SLOTS} states")
    if demand.window:
        parts.append(f"a window of {demand.window} with a step of {SMALLEST_STEP}")
    return " and ".join(parts)


def too_heavy(weights: int, dtype: str | None, limit: int) -> str:
    """What to say of weights that alone are more than ``limit``; ``dtype`` None: not known."""
    text = f"the weights take {size(weights)}, but only {size(limit)} may be used"
    small = _at_four_bits(weights, dtype)
    if small is not None and small < limit:
        text += f": at 4 bits they would take about {size(small)}"
    return text


def _too_little(budget: Budget, demand: Demand, pools: Mapping[str, Pool]) -> str:
    text = (
        f"{_taken(budget, demand)} leave {size(max(budget.rest, 0))} of {size(budget.limit)} for "
        f"the KV cache, which needs {size(_least(pools))} at least"
    )
    fitting = " or ".join(_what_fits(budget, demand, _least(pools)))
    return f"{text}: {fitting or 'a smaller model'} would fit"


def _what_fits(budget: Budget, demand: Demand, least: int) -> list[str]:
    """Settings of which each alone makes room."""

    def fits(other: Budget) -> bool:
        return demand.pool_bytes(other) >= least

    found = []
    tokens = demand.step_tokens // 2
    while tokens >= SMALLEST_STEP:
        # Beside activations that grow with its tokens a step has few others.
        smaller = budget.activations * tokens // demand.step_tokens
        if fits(replace(budget, activations=smaller)):
            found.append(f"--max-num-batched-tokens {tokens}")
            break
        tokens //= 2
    if (budget.fraction or 0) < _MORE and fits(replace(budget, fraction=_MORE)):
        found.append(f"--memory-fraction {_MORE}")
    weights = _at_four_bits(budget.weights, demand.dtype)
    if weights is not None and fits(replace(budget, weights=weights)):
        found.append("4-bit weights")
    return found


def _taken(budget: Budget, demand: Demand) -> str:
    return (
        f"weights of {size(budget.weights)} and twice the {size(budget.activations)} that steps "
        f"of {demand.step_tokens} tokens need"
    )


def _at_four_bits(weights: int, dtype: str | None) -> int | None:
    """Bytes; None for weights that are quantised already."""
    width = _BYTES.get(dtype or "")
    return None if width is None else int(weights / width * _FOUR_BITS)


def size(count: int) -> str:
    """Bytes for people, in a form that settings take."""
    return f"{count / 2**30:.1f}GiB" if count >= 2**30 else f"{count / 2**20:.1f}MiB"
