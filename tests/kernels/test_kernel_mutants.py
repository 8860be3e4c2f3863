"""Kernels broken on purpose fail the very checks that the real ones pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
from decode_case import F32, DecodeCase
from latent_case import LatentCase
from metal_sim import (
    KernelFault,
    Mutation,
    build_all,
    changed,
    collected_texts,
    simulated_kernels,
)
from write_case import WriteCase

# Several tiles and blocks a row, and key heads that differ.
DIRECT = DecodeCase(sinks=True, lengths=(0, 1, 16, 43))
# The second item of a row has higher scores than the first, or lower ones.
SPLIT = DecodeCase(direct=False, sinks=True, lengths=(0, 1, 16, 75), split=8, magnitude=3.0)
WINDOW = replace(DIRECT, window=11)
MANY_ITEMS = replace(SPLIT, lengths=(75,), split=2)
SOFTCAP = DecodeCase(softcap=2.0, lengths=(5, 43))
# More heads than fit in shared memory at a time.
CHUNKED = DecodeCase(dims=(32, 256), group=4, simdgroups=8, lengths=(3, 75), kv_heads=1)
# The second threadgroup of a key head has one query head less.
UNEVEN = DecodeCase(group=9, lengths=(3, 20))
LATENT = LatentCase(settings={"split": 32, "simdgroups": 2, "unroll_keys": 2})
WRITE = WriteCase(F32, 8, (2, 32), (2, 64), 9)


def without_barrier(number: int) -> Mutation:
    """Remove one BARRIER() of the kernel."""

    def mutate(text: str) -> str:
        places = [match.start() for match in re.finditer(r"BARRIER\(\);", text)]
        return text[: places[number]] + text[places[number] + len("BARRIER()") :]

    return mutate


@dataclass(frozen=True)
class Mutant:
    name: str
    kernel: str
    mutate: Mutation
    case: DecodeCase | LatentCase | WriteCase


MUTANTS = [
    Mutant(
        "decode: no barrier before reading statistics",
        "paged_decode",
        without_barrier(1),
        DIRECT,
    ),
    Mutant("decode: no barrier before reading sums", "paged_decode", without_barrier(2), DIRECT),
    Mutant(
        "decode: no barrier before replacing sums",
        "paged_decode",
        without_barrier(3),
        CHUNKED,
    ),
    Mutant(
        "decode: further scores are left out",
        "paged_decode",
        changed("scores[u * GROUP + g] += extra_q", "scores[u * GROUP + g] += 0.0f * extra_q"),
        LATENT,
    ),
    Mutant(
        "decode: further keys of the tile before",
        "paged_decode",
        changed(
            "blocks, next % BLOCK_SIZE, kv_head, KV_HEADS, lane,\nextra_k)",
            "blocks, tile % BLOCK_SIZE, kv_head, KV_HEADS, lane,\nextra_k)",
        ),
        LATENT,
    ),
    Mutant(
        "decode: further queries are scaled as others are",
        "paged_decode",
        changed("(SOFTCAP == 0 ? quire::LOG2_E : 1.0f) : 0.0f;", "scale : 0.0f;"),
        LATENT,
    ),
    Mutant("merge: no barrier", "paged_merge", without_barrier(0), SPLIT),
    Mutant(
        "decode: the window shows one key less",
        "paged_decode",
        changed("token >= begin && token < stop", "token > begin && token < stop"),
        WINDOW,
    ),
    Mutant(
        "decode: the window's tile is not masked",
        "paged_decode",
        changed("token >= begin && token < stop", "token < stop"),
        WINDOW,
    ),
    Mutant(
        "decode: the last tile is not masked",
        "paged_decode",
        changed("token >= begin && token < stop", "token >= begin"),
        DIRECT,
    ),
    Mutant(
        "decode: one key beyond the end",
        "paged_decode",
        changed("token >= begin && token < stop", "token >= begin && token <= stop"),
        DIRECT,
    ),
    Mutant(
        "decode: values beyond the end are multiplied by zero",
        "paged_decode",
        changed("if (place < begin || place >= stop)", "if (false)"),
        DIRECT,
    ),
    Mutant(
        "decode: blocks beyond the end are looked up",
        "paged_decode",
        lambda text: re.sub(r"quire::min\((\w+ / BLOCK_SIZE \+ i), [^;]*\);", r"\1 + 9;", text),
        DIRECT,
    ),
    Mutant(
        "decode: values of the neighbouring key head",
        "paged_decode",
        changed("kv_head, KV_HEADS, lane, v)", "(kv_head + 1) % KV_HEADS, KV_HEADS, lane, v)"),
        DIRECT,
    ),
    Mutant(
        "decode: queries of the key head's first query head",
        "paged_decode",
        changed("first_head + (g < num_heads ? g : 0)", "first_head"),
        DIRECT,
    ),
    Mutant(
        "decode: every row takes the first one's blocks",
        "paged_decode",
        changed("size_t(row) * size_t(block_tables_shape[1])", "0"),
        DIRECT,
    ),
    Mutant(
        "decode: heads beyond the group are written",
        "paged_decode",
        changed("if (g >= num_heads) continue;", ""),
        UNEVEN,
    ),
    Mutant(
        "decode: sums are not rescaled",
        "paged_decode",
        changed("if (quire::any(grew))", "if (false)"),
        replace(DIRECT, magnitude=3.0),
    ),
    Mutant(
        "decode: the total is not rescaled",
        "paged_decode",
        changed("total[j] * rescale[j]", "total[j]"),
        replace(DIRECT, magnitude=3.0),
    ),
    Mutant(
        "decode: the sink counts twice",
        "paged_decode",
        changed("+ quire::exp2(sink - top)", "+ 2.0f * quire::exp2(sink - top)"),
        DIRECT,
    ),
    Mutant(
        "decode: no soft-cap",
        "paged_decode",
        changed("softcap * quire::tanh(score / softcap)", "score"),
        SOFTCAP,
    ),
    Mutant(
        "merge: the items' highest scores are ignored",
        "paged_merge",
        changed("factor = quire::exp2(peak - highest)", "factor = 1.0f"),
        SPLIT,
    ),
    Mutant(
        "merge: the sink counts twice",
        "paged_merge",
        changed(r"weight += quire::exp2(float(sinks", "weight += 2.0f * exp2(float(sinks"),
        SPLIT,
    ),
    Mutant(
        "merge: only as many items as lanes",
        "paged_merge",
        lambda text: text.replace("i += 32", "i += 64"),
        MANY_ITEMS,
    ),
    Mutant(
        "merge: only as many items as simdgroups",
        "paged_merge",
        changed("i += SIMDGROUPS", "i = count"),
        MANY_ITEMS,
    ),
    Mutant(
        "write: the neighbouring slot",
        "kv_write",
        changed("slot = slot_mapping[row];", "slot = slot_mapping[row] ^ 1;"),
        WRITE,
    ),
    Mutant(
        "write: the last row is left out",
        "kv_write",
        changed("row < int(slot_mapping_shape[0])", "row < int(slot_mapping_shape[0]) - 1"),
        WRITE,
    ),
    Mutant(
        "gather: values of the block before",
        "gather_pages",
        changed(
            "token / BLOCK_SIZE];",
            "token / BLOCK_SIZE] ^ 1;",
        ),
        WRITE,
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    texts = []
    for mutant in MUTANTS:
        for mutations in (None, {mutant.kernel: mutant.mutate}):
            with collected_texts(mutations) as found:
                mutant.case.run()
            texts += found
    build_all(texts)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant) -> None:
    with simulated_kernels():
        mutant.case.check()
    with (
        pytest.raises((AssertionError, KernelFault)),
        simulated_kernels({mutant.kernel: mutant.mutate}),
    ):
        mutant.case.check()


@pytest.mark.parametrize("off", [-1, 1])
def test_a_plan_with_another_window_is_caught(off: int) -> None:
    with simulated_kernels():
        result = replace(WINDOW, window=11 + off).run()
    with pytest.raises(AssertionError, match="values are wrong"):
        WINDOW.check(result)
