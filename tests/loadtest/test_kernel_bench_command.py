"""`quire bench kernels` on the CPU, and the cases it would run on a GPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import lazy_kernels

from quire.kernels.attention_problem import Pages
from quire.kernels.choice.problem import Problem, to_float64
from quire.kernels.choice.spec import AnySpec
from quire.kernels.choice.timing import chained, check_evaluated
from quire.kernels.fused_ops_spec import ADD_RMS_NORM
from quire.kernels.kv_write_spec import KV_WRITE, WriteShape, WriteVariant
from quire.kernels.specs import SPECS
from quire.loadtest import command
from quire.loadtest.kernels.bench import run_case
from quire.loadtest.kernels.cases import Profile, cases_of
from quire.loadtest.kernels.command import OPERATIONS
from quire.loadtest.kernels.device import use_device
from quire.loadtest.kernels.results import load_kernels
from quire.loadtest.result_file import save

ON_CPU = Profile("cpu", quick=True)


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="quire bench")
    command.add_arguments(parser)
    return command.run(parser.parse_args(["kernels", *argv]))


def test_the_command_prints_a_table_and_writes_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "new" / "x.json", tmp_path / "plots" / "x.png"
    arguments = ("--quick", "--op", "kv_write", "--device", "cpu", "--out", str(out))
    assert _run(*arguments, "--plot", str(plot)) == 0
    printed = capsys.readouterr().out
    assert "kv_write rows 8, kv_heads 8, " in printed
    assert ": scatter " in printed
    assert "a copy moves" in printed
    assert "of copy" in printed
    assert "latency, each call evaluated alone" in printed
    result = load_kernels(out)
    assert (result.device, result.quick, result.runs) == ("cpu", True, 20)
    assert result.copy_gb_per_s > 0
    assert "mlx" in result.environment.packages
    (case,) = result.cases
    scatter, quire = case.variants
    assert (scatter.name, quire.name) == ("scatter", "quire")
    assert len(scatter.latency_us) == len(scatter.throughput_us) == len(scatter.host_us) == 20
    # Keys and values of 8 rows, 8 heads of 32 in float32, read and written.
    assert scatter.bytes_moved == 2 * 2 * 8 * 8 * 32 * 4
    save(tmp_path / "again.json", result)
    assert load_kernels(tmp_path / "again.json") == result
    picture = plot.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_the_module_runs_without_the_rest_of_the_load_test(tmp_path: Path) -> None:
    """A GPU machine may have MLX, numpy, msgspec and rich only."""
    code = "import sys, quire.loadtest.kernels.command as c; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in shown.stdout.split() if name.startswith("quire.loadtest.")}
    assert loaded == {"quire.loadtest.kernels", "quire.loadtest.kernels.command"}
    assert "mlx.core" not in shown.stdout.split()
    broken = tmp_path / "x.json"
    broken.write_text("{}")
    module = [sys.executable, "-m", "quire.loadtest.kernels", "kernels-diff"]
    ended = subprocess.run([*module, broken, broken], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "not a kernel benchmark" in ended.stderr


def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = mx.default_device()
    missing = "cuda" if not mx.cuda.is_available() else "metal"
    assert _run("--device", missing, "--op", "kv_write") == 2
    assert f"no {missing} device" in capsys.readouterr().err
    assert mx.default_device() == before


def test_unknown_operations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _run("--op", "convolution")
    assert ended.value.code == 2
    assert "paged_decode" in capsys.readouterr().err


@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_variants_of_an_operation_agree_on_the_cpu(operation: str) -> None:
    assert use_device("cpu") == "cpu"
    for case in cases_of([operation], ON_CPU):
        result = run_case(case, [case.inputs(0)], runs=2, limit=float("inf"))
        assert [v.failure for v in result.variants] == [None] * len(case.variants), case.name
        # float32: far below what the same check allows on a GPU.
        assert all((v.difference or 0) < 1e-3 for v in result.variants), case.name


def test_every_operation_can_be_measured() -> None:
    assert [*(spec.name for spec in SPECS), "attention_table"] == list(OPERATIONS)


def test_decode_calls_are_chained_by_their_queries() -> None:
    assert use_device("cpu") == "cpu"
    (case,) = cases_of(["paged_decode"], ON_CPU)
    first, second = case.inputs(0), case.inputs(1)
    queries = second.pages.queries
    found = {}
    for name, function in case.variants.items():
        chained = second.chained(function(first))
        assert chained.pages.keys is second.pages.keys
        assert chained.pages.queries.shape == queries.shape
        assert chained.pages.queries.dtype == queries.dtype
        (found[name],) = function(chained)
    assert second.pages.queries is queries
    expected = found.pop(case.baselines[0])
    assert not mx.allclose(expected, case.variants[case.baselines[0]](second)[0], atol=1e-3)
    for name, result in found.items():
        assert mx.allclose(result, expected, atol=1e-5), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_calls_of_a_chain_have_the_values_of_single_ones(spec: AnySpec) -> None:
    """But for attention, whose queries are the results before."""
    assert use_device("cpu") == "cpu"
    variant = spec.variants[spec.reference]
    first, second, same = (
        spec.problem(spec.checked[0], mx.float32, seed, False) for seed in (0, 1, 1)
    )
    results = variant.run(first, {})
    chained = second.chained(results)
    assert chained is not second
    found = to_float64(variant.run(chained, {}))
    if isinstance(getattr(second, "pages", None), Pages) or spec in (KV_WRITE, ADD_RMS_NORM):
        assert len(found) == len(results)
        return
    assert second.difference(found, to_float64(variant.run(same, {}))) == 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_variant_can_be_timed_in_a_chain(spec: AnySpec) -> None:
    """Kernels too, which only depend on their inputs here: each call waits for the one before."""
    assert use_device("cpu") == "cpu"
    inputs = [spec.problem(spec.checked[0], mx.float32, seed, False) for seed in (0, 1)]
    functions = [variant.with_settings({}) for variant in spec.variants.values()]
    functions += [partial(_with_settings, run) for run in spec.baselines.values()]
    with lazy_kernels():
        for function in functions:
            check_evaluated(function, inputs, chained)


def _with_settings(run: Callable[..., Sequence[mx.array]], problem: Problem) -> Sequence[mx.array]:
    return run(problem, {})


def test_a_write_in_a_chain_waits_for_the_one_before() -> None:
    problem = KV_WRITE.problem(WriteShape(5, 2, 64, 64, 16), mx.float32, 0, False)
    fence = mx.array([1], mx.int32)
    chained = problem.chained([*problem.in_place, fence])
    assert chained.fence is fence
    assert problem.fence is not fence


def test_writes_of_a_chain_are_all_made_in_one_pool() -> None:
    assert use_device("cpu") == "cpu"
    shape = WriteShape(5, 2, 64, 64, 16)
    first, second = (KV_WRITE.problem(shape, mx.float32, seed, False) for seed in (0, 1))
    write = KV_WRITE.variants[WriteVariant.SCATTER].with_settings({})
    pages = write(second.chained(write(first)))
    for index, array in enumerate(pages):
        before = first.fresh_pages()[index].swapaxes(1, 2)
        expected = np.ascontiguousarray(to_float64([before])[0])
        flat = expected.reshape(-1, *expected.shape[2:])
        for x in (first, second):
            flat[x.mapping] = np.array(x.rows[index])[:, :, 0]
        assert np.array_equal(np.array(array.swapaxes(1, 2)), expected)
        assert mx.array_equal(second.scattered[index], second.fresh_pages()[index])


@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_cases_on_gpus(device: str) -> None:
    """They can be listed anywhere: nothing is computed before a case is run."""
    cases = list(cases_of(OPERATIONS, Profile("cuda" if device == "cuda" else "metal", False)))
    names = Counter((case.operation, case.name) for case in cases)
    assert max(names.values()) == 1
    for case in cases:
        assert "quire" in case.variants, case.name
    decodes = [case for case in cases if case.operation == "paged_decode"]
    assert {(case.labels["rows"], case.labels["context"]) for case in decodes} > {
        *((64, 4096), (64, 1024), (16, 4096), (4, 16384), (1, 4096))
    }
    # The last has contexts of all lengths.
    assert [case.name.endswith(", ragged") for case in decodes][-2:] == [False, True]
    assert len(list(cases_of(OPERATIONS, Profile("cuda", True)))) < len(cases)


def test_bytes_of_a_decode() -> None:
    """Keys and values, queries and outputs."""
    assert use_device("cpu") == "cpu"
    (case,) = cases_of(["paged_decode"], ON_CPU)
    problem = case.inputs(0)
    assert (case.labels["rows"], case.labels["context"]) == (1, 512)
    assert problem.num_bytes == 2 * 512 * 4 * 64 * 4 + 2 * 8 * 64 * 4
    assert problem.flops == 4 * 512 * 8 * 64
