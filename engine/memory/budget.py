"""How a device's memory is divided: the one place where that is decided. Plain arithmetic.

All that a worker holds stays within one limit, a fraction of what the device can give:

    weights + pools + activations of a step + buffers kept for the next step <= limit
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DeviceName = Literal["metal", "cuda", "cpu"]

DEFAULT_FRACTION = 0.85
# A step's tokens unless told otherwise: what keeps the gaps between a stream's tokens short while a
# prompt is computed beside it.
STEP_TOKENS: dict[DeviceName, int] = {"cpu": 512, "metal": 512, "cuda": 2048}
SMALLEST_STEP = 128  # tokens

# What macOS recommends as the GPU's working set: this share of the memory, by its size.
_SMALL_MAC = 36 << 30
_SMALL_MAC_SHARE = 2 / 3
_LARGE_MAC_SHARE = 3 / 4
# Unless a fraction is given, pools leave the other half of the rest to the machine's owner.
_POOL_SHARES: dict[DeviceName, float] = {"metal": 0.5, "cuda": 1.0, "cpu": 0.5}
# On the CPU the memory is everybody's, and hardly enough computes for more.
_CPU_POOL_BYTES = 2 << 30
_CPU_POOL_SEQUENCES = 16
# MLX reuses a freed buffer only for nearly the same size, so that the sizes of several steps wait
# beside each other; a tenth over the sum of all else is what a load may leave behind.
_CACHE_SLACK = 0.05
# On GPUs long steps are handed over in pieces: queries of the layers in one. A layer's other
# buffers are some 15 to 20 times as large.
_PIECE_BYTES = 16 << 20
# Steps with queries of no more go whole: on CUDA 2.9 GB, for 512 rows of an 8B model, buy a host
# that need not follow the device layer by layer beside many decodes.
_WHOLE_BYTES: dict[DeviceName, int] = {"cpu": 0, "metal": 0, "cuda": 4 << 20}
# Rows times contexts in a piece. macOS ends a command buffer that holds the GPU for seconds; a
# layer of 32 heads of 128 takes a quarter of one for these on the smallest chips.
MAX_ATTENDED = 1 << 24
# Pieces that are not done yet: the device computes one while the next is built.
PIECES_AHEAD = 2


def working_set(ram: int, device: DeviceName) -> int:
    """Bytes that a program may use of ``ram``, the machine's memory or a CUDA device's."""
    if device != "metal":
        return ram
    return int(ram * (_SMALL_MAC_SHARE if ram <= _SMALL_MAC else _LARGE_MAC_SHARE))


def whole_rows(row_bytes: int, device: DeviceName) -> int:
    """Rows of the longest step of prompts that is handed to ``device`` whole for its size alone.

    Args:
        row_bytes: of one layer's queries.
    """
    return _WHOLE_BYTES[device] // max(1, row_bytes)


def layers_at_once(query_bytes: int, num_layers: int, attended: int = 0) -> int | None:
    """Layers in a piece of a step of prompts, or None if it is handed to the device whole.

    Args:
        query_bytes: of one layer, for all rows of the step.
        num_layers: of the model.
        attended: rows times their contexts.
    """
    count = min(_PIECE_BYTES // max(1, query_bytes), MAX_ATTENDED // max(1, attended))
    count = max(1, count)
    return count if PIECES_AHEAD * count < num_layers else None


@dataclass(frozen=True)
class Pool:
    """Equal units that a model keeps for its requests, such as KV blocks.

    Attributes:
        unit_bytes: of one.
        least: units without which it cannot serve.
        enough: units that all requests at a time could use.
        one: units for one request of full length, which all pools get first; 0: none come first.
        usual: units for all requests at a usual length, which all pools get next; 0: likewise.
    """

    unit_bytes: int
    least: int
    enough: int
    one: int = 0
    usual: int = 0

    @property
    def steps(self) -> tuple[int, int, int]:
        """Units to reach one after the other: in each step all pools, then the next step."""
        one, usual = min(self.one, self.enough), min(self.usual, self.enough)
        return one, usual, self.enough


class DoesNotFit(Exception):
    """Memory is too short for what a pool needs at least."""


@dataclass(frozen=True)
class Budget:
    """Bytes.

    Attributes:
        device: whose memory it is.
        usable: what the device can give, what the worker holds already included.
        fraction: of that, as asked for; None: the default.
        weights: of the model.
        activations: that a step needs on top.
    """

    device: DeviceName
    usable: int
    fraction: float | None
    weights: int = 0
    activations: int = 0

    @property
    def limit(self) -> int:
        """What everything together stays within."""
        return int((self.fraction or DEFAULT_FRACTION) * self.usable)

    @property
    def rest(self) -> int:
        """What weights, a step and the buffers kept from it leave; negative if they do not fit."""
        return self.limit - self.weights - 2 * self.activations

    def pool_bytes(self, one: int) -> int:
        """What all pools together take at most unless the settings say.

        They may hold ``one`` request of full length, in so many bytes, wherever it fits.
        """
        rest = max(self.rest, 0)
        share = _POOL_SHARES[self.device] if self.fraction is None else 1.0
        room = int(share * rest)
        if self.device == "cpu":
            room = min(room, _CPU_POOL_BYTES)
        return max(room, min(rest, one))

    def cache_bytes(self, pools: int) -> int:
        """Freed buffers that MLX may keep, beside ``pools`` bytes of pools.

        As many as a step needs, so that one of the same sizes allocates nothing.
        """
        held = self.weights + pools + self.activations
        wanted = self.activations + int(_CACHE_SLACK * held)
        return max(self.activations, min(wanted, self.limit - held))


def sequences_to_hold(device: DeviceName, max_num_seqs: int) -> int:
    """How many sequences of full length a pool is made for at most."""
    return min(max_num_seqs, _CPU_POOL_SEQUENCES) if device == "cpu" else max_num_seqs


def divide(room: int, pools: Sequence[Pool]) -> list[int]:
    """Units of each pool within ``room`` bytes: at least ``least``, and up to ``enough``.

    What the least leaves is shared by what each could still use for one request, then for usual
    ones, then for all.

    Raises:
        DoesNotFit: ``room`` does not hold the least of all.
    """
    units = [pool.least for pool in pools]
    for wanted in zip(*(pool.steps for pool in pools), strict=True):
        rest = room - sum(n * pool.unit_bytes for n, pool in zip(units, pools, strict=True))
        if rest < 0:
            raise DoesNotFit
        more = [max(0, want - n) for want, n in zip(wanted, units, strict=True)]
        missing = sum(n * pool.unit_bytes for n, pool in zip(more, pools, strict=True))
        part = min(1.0, rest / max(1, missing))
        units = [
            n + int(part * each * pool.unit_bytes) // pool.unit_bytes
            for n, each, pool in zip(units, more, pools, strict=True)
        ]
        if part < 1:
            break
    return units
