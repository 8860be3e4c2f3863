"""Whether a model fits into a budget, and what would fit if it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        bytes_per_token: in the KV cache, all layers together.
        dtype: of the weights.
    """

    context: int
    max_num_seqs: int
    step_tokens: int
    block_size: int
    bytes_per_token: int
    dtype: str

    def pool(self, budget: Budget) -> Pool:
        """KV blocks, the scratch block included."""
        sequences = sequences_to_hold(budget.device, self.max_num_seqs)
        return Pool(
            self.block_size * self.bytes_per_token,
            least=1 + -(-_LEAST_TOKENS // self.block_size),
            enough=1 + sequences * -(-self.context // self.block_size),
        )

    def pool_bytes(self, budget: Budget) -> int:
        one = (1 + -(-self.context // self.block_size)) * self.block_size * self.bytes_per_token
        return budget.pool_bytes(one)


def size_blocks(budget: Budget, demand: Demand, wanted: int | None) -> int:
    """KV blocks of the pool, the scratch block included.

    Args:
        wanted: bytes for all of them; None: by the budget.

    Raises:
        EngineError: they do not fit; the message says what would.
    """
    pool = demand.pool(budget)
    if wanted is None:
        try:
            return divide(demand.pool_bytes(budget), [pool])[0]
        except DoesNotFit:
            raise EngineError(_too_little(budget, demand, pool)) from None
    blocks = wanted // pool.unit_bytes
    if blocks < pool.least:
        raise EngineError(
            f"--kv-cache-memory {size(wanted)} holds fewer than {_LEAST_TOKENS} tokens: "
            f"raise it to at least {size(pool.least * pool.unit_bytes)}"
        )
    room = budget.usable - budget.weights - budget.activations
    if wanted > room:
        raise EngineError(
            f"--kv-cache-memory {size(wanted)} does not fit beside {_taken(budget, demand)} in "
            f"{size(budget.usable)}: {size(max(room, 0))} would"
        )
    return blocks


def too_heavy(weights: int, dtype: str | None, limit: int) -> str:
    """What to say of weights that alone are more than ``limit``; ``dtype`` None: not known."""
    text = f"the weights take {size(weights)}, but only {size(limit)} may be used"
    small = _at_four_bits(weights, dtype)
    if small is not None and small < limit:
        text += f": at 4 bits they would take about {size(small)}"
    return text


def _too_little(budget: Budget, demand: Demand, pool: Pool) -> str:
    text = (
        f"{_taken(budget, demand)} leave {size(max(budget.rest, 0))} of {size(budget.limit)} for "
        f"the KV cache, which needs {size(pool.least * pool.unit_bytes)} at least"
    )
    fitting = " or ".join(_what_fits(budget, demand, pool))
    return f"{text}: {fitting or 'a smaller model'} would fit"


def _what_fits(budget: Budget, demand: Demand, pool: Pool) -> list[str]:
    """Settings of which each alone makes room."""

    def fits(other: Budget) -> bool:
        return demand.pool_bytes(other) >= pool.least * pool.unit_bytes

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
