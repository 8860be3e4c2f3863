"""Welch's t-test, and what counts as a regression between two kernel benchmarks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.loadtest import command
from quire.loadtest.environment import Environment
from quire.loadtest.kernels.diff import compare_kernels
from quire.loadtest.kernels.results import (
    CaseResult,
    KernelsResult,
    VariantResult,
    load_kernels,
    save_kernels,
)
from quire.loadtest.kernels.welch import incomplete_beta, t_tails, welch_test

# Two-sided 95 % and 99 % quantiles of Student's t, as printed in tables.
TABLE = [
    (1, 0.05, 12.7062),
    (2, 0.05, 4.3027),
    (5, 0.05, 2.5706),
    (10, 0.05, 2.2281),
    (38, 0.05, 2.0244),
    (120, 0.05, 1.9799),
    (1e6, 0.05, 1.9600),
    (3, 0.01, 5.8409),
    (10, 0.01, 3.1693),
    (30, 0.01, 2.7500),
]


@pytest.mark.parametrize(("degrees", "p", "t"), TABLE)
def test_tails_are_those_of_the_tables(degrees: float, p: float, t: float) -> None:
    assert t_tails(t, degrees) == pytest.approx(p, rel=1e-4)
    assert t_tails(-t, degrees) == t_tails(t, degrees)


@given(st.floats(0, 50))
def test_tails_in_closed_form(t: float) -> None:
    assert t_tails(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
    assert t_tails(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


@given(st.floats(0.1, 60), st.floats(0, 1))
def test_incomplete_beta_in_closed_form(a: float, x: float) -> None:
    assert incomplete_beta(a, 1, x) == pytest.approx(x**a, abs=1e-12)
    assert incomplete_beta(1, a, x) == pytest.approx(1 - (1 - x) ** a, abs=1e-12)


def test_welch_against_worked_examples() -> None:
    a = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    b = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    found = welch_test(a, b)
    assert found.t == pytest.approx(-2.46, abs=0.005)
    assert found.degrees == pytest.approx(25.0, abs=0.05)
    assert found.p == pytest.approx(0.021, abs=0.0005)
    a = [17.2, 20.9, 22.6, 18.1, 21.7, 21.4, 23.5, 24.2, 14.7, 21.8]
    b = [21.5, 22.8, 21.0, 23.0, 21.6, 23.6, 22.5, 20.7, 23.4, 21.8]
    b += [20.7, 21.7, 21.5, 22.5, 23.6, 21.5, 22.5, 23.5, 21.5, 21.8]
    found = welch_test(a, b)
    assert found.t == pytest.approx(-1.57, abs=0.005)
    assert found.degrees == pytest.approx(9.9, abs=0.05)
    assert found.p == pytest.approx(0.149, abs=0.0005)


def test_welch_of_constant_samples() -> None:
    assert welch_test([2.0, 2.0], [2.0, 2.0]).p == 1
    assert welch_test([2.0, 2.0], [3.0, 3.0]) == (-math.inf, 2.0, 0.0)
    with pytest.raises(ValueError, match="two values"):
        welch_test([1.0], [1.0, 2.0])


def test_welch_rejects_equal_means_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (2000, 8)), rng.normal(0, 3, (2000, 20))
    rejected = sum(welch_test(x.tolist(), y.tolist()).p < 0.05 for x, y in zip(a, b, strict=True))
    assert 0.035 < rejected / 2000 < 0.065


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
            "noisy": [*_around(100, 0.02)[:-1], 600.0],
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
    save_kernels(path, old)
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
    save_kernels(old, _result({"kernel": _around(100, 0.02)}))
    save_kernels(new, _result({"kernel": _around(125, 0.02)}, chip="NVIDIA H100"))
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
