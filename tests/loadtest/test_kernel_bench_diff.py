"""What counts as a regression between two kernel benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from quire.loadtest import command
from quire.loadtest.environment import Environment
from quire.loadtest.kernels.diff import compare_kernels
from quire.loadtest.kernels.results import (
    CaseResult,
    KernelsResult,
    VariantResult,
    load_kernels,
)
from quire.loadtest.result_file import save


@pytest.mark.parametrize("change", [1.0, 1.05, 1.3])
def test_noise_alone_is_seldom_a_regression(change: float) -> None:
    """Medians of 20 samples that scatter by 3 %; above 10 % a change is nearly always seen."""
    rng = np.random.default_rng(1)
    old, new = rng.normal(100, 3, (500, 20)), rng.normal(100 * change, 3, (500, 20))
    slower = 0
    for a, b in zip(old, new, strict=True):
        (found,) = compare_kernels(_result({"a": a.tolist()}), _result({"a": b.tolist()})).changes
        slower += found.verdict == "slower"
    assert slower > 490 if change == 1.3 else slower < 5


def _around(mean: float, spread: float) -> list[float]:
    return [mean * (1 + spread * step / 10) for step in range(-10, 10)]


def _result(samples: dict[str, Sequence[float]], **fields: str) -> KernelsResult:
    variants = [VariantResult(name, False, 1000, [1.0], list(s)) for name, s in samples.items()]
    return KernelsResult(
        device=fields.get("device", "cuda"),
        chip=fields.get("chip", "NVIDIA H200"),
        copy_gb_per_s=4300.0,
        quick=False,
        runs=20,
        cases=[CaseResult("paged_decode", "8 x 1024", {"batch": 8}, 0, variants)],
        skipped=[],
        blas=None,
        environment=Environment("3.12", "Linux", "x86_64", 16, {"mlx": "0.32.4"}, "2026-01-01"),
        command="quire bench kernels",
    )


def test_only_changes_that_are_large_and_significant_count() -> None:
    old = _result({name: _around(100, 0.02) for name in ("slow", "near", "noisy", "fast", "gone")})
    new = _result(
        {
            "slow": _around(112, 0.02),
            "near": _around(109, 0.001),
            "noisy": _around(115, 0.5),
            "fast": _around(80, 0.02),
            "new": _around(1, 0.02),
        }
    )
    comparison = compare_kernels(old, new)
    verdicts = {c.name.rpartition(": ")[2]: c.verdict for c in comparison.changes}
    assert verdicts == {"slow": "slower", "near": "same", "noisy": "unclear", "fast": "faster"}
    assert [change.ratio for change in comparison.regressions] == [pytest.approx(1.12)]
    assert comparison.only_old == ["paged_decode 8 x 1024: gone"]
    assert comparison.only_new == ["paged_decode 8 x 1024: new"]


def test_a_variant_that_failed_is_not_compared() -> None:
    old, new = _result({"a": _around(1, 0.1)}), _result({"a": _around(2, 0.1)})
    new.cases[0].variants[0].failure = "RuntimeError: no such kernel"
    assert compare_kernels(old, new).only_old == ["paged_decode 8 x 1024: a"]


def test_chained_calls_are_not_compared_with_queued_ones(tmp_path: Path) -> None:
    old, new = _result({"a": _around(2, 0.1)}), _result({"a": _around(1, 0.1)})
    new.cases[0].chained = True
    comparison = compare_kernels(old, new)
    assert comparison.changes == []
    assert comparison.only_old == ["paged_decode 8 x 1024: a"]
    assert comparison.only_new == ["paged_decode 8 x 1024: a (chained)"]
    assert len(compare_kernels(new, new).changes) == 1
    # Files from before there were chains say nothing of them.
    path = tmp_path / "old.json"
    save(path, old)
    path.write_bytes(path.read_bytes().replace(b',"chained":false', b""))
    assert b"chained" not in path.read_bytes()
    assert load_kernels(path) == old


def _diff(*paths: Path) -> int:
    parser = argparse.ArgumentParser(prog="quire bench")
    command.add_arguments(parser)
    return command.run(parser.parse_args(["kernels-diff", *map(str, paths)]))


def test_the_exit_code_says_whether_anything_became_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    save(old, _result({"kernel": _around(100, 0.02)}))
    save(new, _result({"kernel": _around(125, 0.02)}, chip="NVIDIA H100"))
    assert load_kernels(new) == _result({"kernel": _around(125, 0.02)}, chip="NVIDIA H100")
    assert _diff(old, old) == 0
    assert "0 slower by more than 10 %" in capsys.readouterr().out
    assert _diff(old, new) == 1
    printed = capsys.readouterr().out
    assert "not the same chip: NVIDIA H200 and NVIDIA H100" in printed
    assert "paged_decode 8 x 1024: kernel" in printed
    assert "1.25" in printed
    assert "1 slower by more than 10 %" in printed
    assert _diff(new, old) == 0  # faster is fine


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not a kernel benchmark"),
        (b"\xff", "not a kernel benchmark"),
        (b'{"format_version": 99}', "format version 99"),
        (b'{"kind": "load", "format_version": 1}', "not a kernel benchmark"),
    ],
)
def test_files_that_are_no_kernel_benchmarks(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert _diff(path, path) == 2
    assert message in capsys.readouterr().err
