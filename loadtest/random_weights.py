"""A safetensors file of random weights, written as fast as the disk takes it.

Values are drawn in blocks of rows on all cores and written in order, a few blocks at a time in
memory: the file may be for a model larger than this machine.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Dtype = Literal["float32", "bfloat16"]
Bits = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]
PerRow = float | npt.NDArray[np.float32]  # one value for all rows or one for each

_BLOCK_VALUES = 1 << 18  # stays in a core's own cache
_FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_ITEM_BYTES = {"F32": 4, "BF16": 2, "U32": 4}


class Normal(NamedTuple):
    """Normal values with mean 0, in the file's dtype."""

    std: PerRow


class Constant(NamedTuple):
    """One value for all or for each row, in the file's dtype."""

    value: PerRow


class Words(NamedTuple):
    """Uniform uint32 words, whatever the file's dtype: all bits are independent."""


class Tensor(NamedTuple):
    """One tensor to write; the last of ``dims`` must be even for ``Words``."""

    name: str
    dims: tuple[int, ...]
    fill: Normal | Constant | Words


class _Block(NamedTuple):
    tensor: Tensor
    number: int  # of the tensor in the file
    rows: slice


def write_safetensors(path: Path, tensors: Sequence[Tensor], dtype: Dtype, seed: int) -> None:
    """Write ``tensors`` back to back; equal arguments give equal bytes, whatever the machine.

    ``dtype`` is that of all tensors but ``Words``.

    The format: 8 bytes little-endian length, that many bytes of JSON, then the tensors
    (https://github.com/huggingface/safetensors#format).
    """
    head = _header(tensors, dtype)
    workers = os.cpu_count() or 1
    with path.open("wb") as file, ThreadPoolExecutor(workers) as pool:
        file.write(len(head).to_bytes(8, "little") + head)
        drawn: deque[Future[Bits]] = deque()
        for block in _blocks(tensors):
            drawn.append(pool.submit(_draw, block, dtype, seed))
            if len(drawn) > 2 * workers:
                file.write(drawn.popleft().result().data)
        for future in drawn:
            file.write(future.result().data)


def _header(tensors: Sequence[Tensor], dtype: Dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in tensors:
        stored = "U32" if isinstance(tensor.fill, Words) else _FORMAT_NAMES[dtype]
        end = offset + math.prod(tensor.dims) * _ITEM_BYTES[stored]
        entries[tensor.name] = {
            "dtype": stored,
            "shape": tensor.dims,
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(entries).encode()
    return head + b" " * (-len(head) % 8)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[_Block]:
    for number, tensor in enumerate(tensors):
        rows = tensor.dims[0]
        step = max(1, _BLOCK_VALUES // math.prod(tensor.dims[1:]))
        for start in range(0, rows, step):
            yield _Block(tensor, number, slice(start, min(start + step, rows)))


def _draw(block: _Block, dtype: Dtype, seed: int) -> Bits:
    """The block's bytes. Each block has a random stream of its own."""
    tensor, rows = block.tensor, block.rows
    dims = (rows.stop - rows.start, *tensor.dims[1:])
    if isinstance(tensor.fill, Constant):
        values = np.empty(dims, np.float32)
        values[:] = _of_rows(tensor.fill.value, rows)
    else:
        rng = np.random.Generator(np.random.SFC64([seed, block.number, rows.start]))
        if isinstance(tensor.fill, Words):
            # Two words at a time: numpy draws 64 bits at once twice as fast.
            pairs = rng.integers(1 << 64, size=(*dims[:-1], dims[-1] // 2), dtype=np.uint64)
            return pairs.view(np.uint32)
        values = rng.standard_normal(dims, np.float32)
        values *= _of_rows(tensor.fill.std, rows)
    return values.view(np.uint32) if dtype == "float32" else bfloat16_bits(values)


def _of_rows(value: PerRow, rows: slice) -> np.float32 | npt.NDArray[np.float32]:
    return np.float32(value) if isinstance(value, float) else value[rows, None]


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even, as numpy has no bfloat16. Finite values only."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)
