"""Kernels of recurrent layers broken on purpose fail the very checks that the real ones pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from conv_case import ConvCase
from delta_case import DeltaCase
from metal_sim import KernelFault, Mutation, build_all, changed, collected_texts, simulated_kernels
from recurrent_case import COPIES, CUT, IN_PLACE, MIXED
from ssm_case import SsmCase


@dataclass(frozen=True)
class Mutant:
    name: str
    kernel: str
    mutate: Mutation
    case: DeltaCase | ConvCase | SsmCase


DELTA = DeltaCase(MIXED)
DELTA_CUT = DeltaCase(CUT)
DELTA_NARROW = DeltaCase(MIXED, (2, 4, 64, 24))
VECTOR = DeltaCase(MIXED, vector=True)
RAW = DeltaCase(MIXED, raw=True)
CONV = ConvCase(MIXED)
SSM = SsmCase(MIXED)
CONV_CUT = ConvCase(CUT)
HEADS = ConvCase(MIXED, bias=False, channels=128, heads=(2, 16))


def delta(name: str, old: str, new: str, case: DeltaCase = DELTA) -> Mutant:
    return Mutant(f"delta rule: {name}", "delta_rule", changed(old, new), case)


def ssm(name: str, old: str, new: str, case: SsmCase = SSM) -> Mutant:
    return Mutant(f"ssm: {name}", "ssm_scan", changed(old, new), case)


def conv(name: str, old: str, new: str, case: ConvCase = CONV) -> Mutant:
    return Mutant(f"convolution: {name}", "conv_window", changed(old, new), case)


MUTANTS = [
    delta("the gate is dropped", "state[i] *= g_tile[n", "state[i] *= 1.0f + 0.0f * g_tile[n"),
    delta("one gate for all channels", "4 * Keys::place(i / 4, lane) + i % 4 : 0", "0 : 0",
          VECTOR),
    delta("the bias of another head", "float(dt_bias[head])", "float(dt_bias[0])", RAW),
    delta("every head fades alike", "a_log[head]", "a_log[0]", RAW),
    delta("the bias is left out", "gate + float(dt_bias[head])", "gate", RAW),
    delta("factors are taken as they are", "new_beta = RAW ?", "new_beta = false ?", RAW),
    delta("gates are taken as they are", "if (RAW) gate", "if (false) gate", RAW),
    delta("no correction by what is held", "own_place]) - held)", "own_place]))"),
    delta("states are not carried", "first = end;",
          "first = end; for (int i = 0; i < int(Keys::SIZE); ++i) state[i] = 0.0f;", DELTA_CUT),
    delta("a segment that goes on begins with the first", "first = end;", "", DELTA_CUT),
    delta("segments that go on start too", "if (source < 0) return;", "", DELTA_CUT),
    delta("a sequence that begins takes slot 0", "if (source > 0)", "if (source >= 0)"),
    delta("what is dropped goes to slot 0", "if (target > 0", "if (target >= 0"),
    delta("states go back to where they came from", "int target = targets[segment]",
          "int target = source"),
    delta("states are not kept", "if (target > 0", "if (target > 1000"),
    delta("the query sees the state before", "const float read = quire",
          "float keys[Keys::SIZE]; Keys::read(k_tile + n * FOURS, lane, keys);"
          "const float read = -delta * quire::sum_over<LANES>(Keys::product(keys, values))"
          " + quire"),
    delta("key heads in turns", "head / SHARE", "head % KEY_HEADS"),
    delta("the last row is left out", "row < end; row += TILE", "row < end - 1; row += TILE"),
    delta("every tile is the first", "const size_t key = (size_t(row)",
          "const size_t key = (size_t(first)"),
    delta("the last row of a tile keeps old keys", "KeyTile::store(k_tile, new_k, count,",
          "KeyTile::store(k_tile, new_k, count - 1,"),
    delta("rows of state behind the last are kept", "first_place + own_place < VALUE_DIM",
          "first_place >= 0", DELTA_NARROW),
    delta("padding is not filled", "row < int(q_shape[0])", "row < 0"),
    delta("an empty segment keeps nothing", "if (target > 0", "if (target > 0 && end > first",
          DeltaCase(COPIES)),
    ssm("states do not fade", "state[i] * decay", "state[i]"),
    ssm("the step is left out", "whole * step", "whole"),
    ssm("nothing goes around the state", "+ around * whole", ""),
    ssm("groups in turns", "head / SHARE", "head % GROUPS"),
    ssm("a sequence that begins takes slot 0", "if (source > 0)", "if (source >= 0)"),
    ssm("segments that go on start too", "if (source < 0) return;", "", SsmCase(CUT)),
    ssm("a segment that goes on begins with the first", "first = end;", "", SsmCase(CUT)),
    ssm("states go back to where they came from", "int target = targets[segment]",
        "int target = source"),
    ssm("the last row is left out", "row < end; row += TILE", "row < end - 1; row += TILE"),
    ssm("every tile is the first", "const size_t group = (size_t(row)",
        "const size_t group = (size_t(first)"),
    ssm("the last row of a tile keeps an old one", "StateTile::store(b_tile, new_b, count,",
        "StateTile::store(b_tile, new_b, count - 1,"),
    ssm("padding is not filled", "row < int(x_shape[0])", "row < 0"),
    conv("the window is one row off", "size_t(row - KEPT + i)", "size_t(row - K + i)"),
    conv("first rows see another slot's tail", "size_t(source) * KEPT + i",
         "size_t(source ^ 1) * KEPT + i"),
    conv("a sequence that begins sees slot 0", "if (source > 0)", "if (source >= 0)"),
    conv("tails of short segments are not old", "quire::pack<T>(window + (i + 1) * VEC)",
         "quire::pack<T>(window + i * VEC)"),
    conv("tails are one row early", "end - KEPT + i", "quire::max(end - K + i, 0)"),
    conv("segments that go on have no rows before", "if (sources[segment] >= 0) begin",
         "begin", CONV_CUT),
    conv("segments that go on start too", "if (source < 0) return;", "", CONV_CUT),
    conv("no way back to where a sequence starts", "while (sources[origin] < 0) --origin;", "",
         CONV_CUT),
    conv("padding is not filled", "results[size_t(row) * width] = zeros;", ""),
    conv("the bias is left out", "HAS_BIAS ? float", "false ? float"),
    conv("values are normed too", "is_normed = place < 2 * KEY_PACKS", "is_normed = true", HEADS),
    conv("queries are scaled as keys", "part == 0 ? QUERY_SCALE", "part < 0 ? QUERY_SCALE", HEADS),
    conv("keys stand where queries do", "is_normed ? KEY_PACKS : 2 * KEY_PACKS",
         "is_normed ? 0 : 2 * KEY_PACKS", HEADS),
    conv("rows of parts are as wide as all", "is_normed ? KEY_PACKS : PACKS - 2 * KEY_PACKS",
         "PACKS", HEADS),
    conv("a lane's share for a head's length", "sum_over<LANES>(sum)", "sum * LANES", HEADS),
    conv("tails are read while they are written", "row < begin + KEPT; ++row",
         "row < begin + 1; ++row", ConvCase(IN_PLACE)),
]  # fmt: skip


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
