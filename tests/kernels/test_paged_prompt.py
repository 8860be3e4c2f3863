"""The prompt kernel's exact Metal text, run by the simulator, against float64; and broken ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decode_case import BF16, F16
from metal_sim import KernelFault, build_all, changed, collected_texts, simulated_kernels
from prompt_case import PromptCase

from quire.kernels import paged_prompt

CASES = [
    PromptCase(num_after=6),
    PromptCase(F16, (128, 128), 4, 16, chunks=((0, 70), (50, 9))),
    PromptCase(BF16, (80, 72), 7, 8, sinks=True, window=11, chunks=((0, 40), (90, 9))),
    PromptCase(F16, (64, 64), 2, 16, part=32, chunks=((300, 5), (0, 3)), sinks=True, num_after=4),
    PromptCase(BF16, (128, 128), 3, 32, part=16, window=40, chunks=((100, 20),), kv_heads=1),
    PromptCase(F16, (256, 256), 1, 8, chunks=((30, 20),)),
    PromptCase(BF16, (64, 64), 4, 32, chunks=((100, 9), (0, 70)), stages=2),
    PromptCase(F16, (72, 40), 2, 8, chunks=((100, 9),), window=50, part=20, stages=2),
    PromptCase(BF16, (192, 128), 16, 16, window=3, chunks=((30, 5), (0, 1))),
    PromptCase(F16, (16, 8), 2, 8, chunks=((20, 9), (0, 1))),
    # Rows that see nothing of the first keys.
    PromptCase(BF16, (64, 64), 7, 8, window=11, chunks=((100, 9),)),
    # More query heads than one threadgroup takes, the last of which takes fewer.
    PromptCase(BF16, (112, 96), 19, 32, chunks=((3, 7), (0, 2)), kv_heads=1),
    # Values that are shared out among threadgroups, the last of which takes fewer.
    PromptCase(BF16, (512, 512), 2, 16, chunks=((30, 9), (0, 5)), num_after=3),
    PromptCase(F16, (320, 296), 19, 8, part=16, chunks=((40, 5),), kv_heads=1, sinks=True),
]
WIDE = CASES[-2]

# A change of the text, and a case it must break.
MUTANTS: dict[str, tuple[str, str, PromptCase]] = {
    "keys after the row are seen": ("&& key <= position &&", "&&", CASES[0]),
    "the row's own key is not seen": ("key <= position &&", "key < position &&", CASES[0]),
    "the window shows one key less": (
        "key > position - WINDOW",
        "key > position - WINDOW + 1",
        CASES[2],
    ),
    "the window's edge is not masked": (
        "(WINDOW > 0 && base <= last_position - WINDOW)",
        "false",
        replace(CASES[2], window=40, chunks=((103, 9),)),
    ),
    "the part's end is not masked": ("|| base + KEYS > end ||", "||", replace(CASES[3], part=40)),
    "keys before the part are seen": ("key >= begin && key < end", "key < end", CASES[4]),
    "the neighbouring key head": ("KV_HEADS + kv_head)", "KV_HEADS + 0)", CASES[0]),
    "the key head's first query head": (
        "* HEADS + head[0]) * DK",
        "* HEADS + first_head) * DK",
        CASES[1],
    ),
    # Fused, the difference of two products that are alike is what rounding takes from one.
    "hidden keys weigh before others": (
        "highest > quire::HIDDEN ? highest * scale : 0.0f",
        "highest * scale",
        PromptCase(BF16, (64, 64), 1, 8, window=20, chunks=((0, 64),)),
    ),
    "sums are not rescaled": ("if (quire::any(grew))", "if (false)", CASES[1]),
    "no barrier before keys are read": (
        "BARRIER();\n}\nif (base < first_base)",
        "}\nif (base < first_base)",
        CASES[1],
    ),
    "no barrier before keys are replaced": ("if (STAGES == 1) BARRIER();", "", CASES[1]),
    "no barrier between stages": (
        "if (STAGES == 2) {\nquire::wait_for_copies();\nBARRIER();",
        "if (STAGES == 2) {",
        replace(CASES[0], stages=2),
    ),
    "blocks outside the stretch are looked up": (
        "quire::min(quire::max(position, begin), end - 1)",
        "position",
        CASES[2],
    ),
    "values behind the end are multiplied by zero": (
        "ahead + key < end && pack < DV / VEC;",
        "pack < DV / VEC;",
        CASES[0],
    ),
    "all sum the first values": (
        "slice * VALUE_PACKS + at % VALUE_PACKS",
        "at % VALUE_PACKS",
        WIDE,
    ),
    "all write the first values": ("slice * SLICE + own", "own", WIDE),
    "queries are loaded once": ("if (SLICES > 1) q[0]", "if (SLICES > 1 && s == 0) q[0]", WIDE),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    texts = []
    with collected_texts() as found:
        for case in CASES:
            case.run()
    texts += found
    for old, new, case in MUTANTS.values():
        with collected_texts({"paged_prompt": changed(old, new)}) as found:
            case.run()
        texts += found
    build_all(texts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks(case: PromptCase) -> None:
    with simulated_kernels():
        case.check()


@pytest.mark.parametrize("is_metal", [True, False], ids=["metal", "cuda"])
def test_threadgroup_memory_holds_heads_of_all_sizes(
    is_metal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: is_metal)
    size = 32 << 10 if is_metal else 48 << 10
    for value_dim in range(8, 513, 8):
        slices, width = paged_prompt._slices(value_dim)
        assert (slices - 1) * width < value_dim <= slices * width
        for key_dim in (8, value_dim, 512, 576):
            chosen = paged_prompt._threadgroup(key_dim, width)
            # As the kernel's text declares it.
            key_stride = (-(-key_dim // 32) | 1) * 4
            value_stride = -(-width // 16) * 2 | 1
            held = int(chosen["STAGES"]) * int(chosen["KEYS"]) * (key_stride + value_stride)
            assert 16 * held <= size  # bytes of a pack


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    old, new, case = MUTANTS[name]
    with simulated_kernels():
        case.check()
    with (
        pytest.raises((AssertionError, KernelFault)),
        simulated_kernels({"paged_prompt": changed(old, new)}),
    ):
        case.check()
