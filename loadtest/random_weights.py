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

_BLOCK_VALUES = 1 << 18  # stays in a core's own cache
_FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    """One tensor to write: normal with mean 0, or all ones."""

    name: str
    dims: tuple[int, ...]
    std: float | npt.NDArray[np.float32] | None  # of all or of each row; None: ones


class _Block(NamedTuple):
    tensor: Tensor
    number: int  # of the tensor in the file
    rows: slice


def write_safetensors(path: Path, tensors: Sequence[Tensor], dtype: Dtype, seed: int) -> None:
    """Write ``tensors`` back to back; equal arguments give equal bytes, whatever the machine.

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
    itemsize = 4 if dtype == "float32" else 2
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.dims) * itemsize
        entries[tensor.name] = {
            "dtype": _FORMAT_NAMES[dtype],
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
    if tensor.std is None:
        values = np.ones(dims, np.float32)
    else:
        rng = np.random.Generator(np.random.SFC64([seed, block.number, rows.start]))
        values = rng.standard_normal(dims, np.float32)
        std = tensor.std
        values *= np.float32(std) if isinstance(std, float) else std[rows, None]
    return values.view(np.uint32) if dtype == "float32" else bfloat16_bits(values)


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even, as numpy has no bfloat16. Finite values only."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)
