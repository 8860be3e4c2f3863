"""The cases of every operation, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from quire.loadtest.kernels.case import Case, Profile
from quire.loadtest.kernels.paged_cases import decode_cases, prompt_cases, shared_cases
from quire.loadtest.kernels.row_cases import (
    matmul_cases,
    quantized_cases,
    sample_cases,
    write_cases,
)
from quire.loadtest.kernels.table_cases import attention_cases

# The names are those of command.OPERATIONS, which can be listed without MLX.
_CASES: dict[str, Callable[[Profile], Iterator[Case]]] = {
    "paged_decode": decode_cases,
    "shared_context": shared_cases,
    "prompt_attention": prompt_cases,
    "kv_write": write_cases,
    "quantized_matmul": quantized_cases,
    "sample": sample_cases,
    "matmul": matmul_cases,
    "attention_table": attention_cases,
}


def cases_of(operations: Sequence[str], profile: Profile) -> Iterator[Case]:
    """The cases of ``operations``, in their order. Each is made when it is asked for."""
    for operation in operations:
        yield from _CASES[operation](profile)
