"""OpenBLAS is found, and gets kernels that fit the processor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quire.engine.startup import openblas


@pytest.mark.parametrize(
    ("flags", "core"),
    [
        ({"avx", "avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl"}, "SKYLAKEX"),
        ({"avx", "avx2", "fma", "avx512f"}, "HASWELL"),  # Knights Landing lacks the rest
        ({"avx", "avx2", "fma"}, "HASWELL"),
        ({"avx", "sse4_2"}, None),
        (set(), None),
    ],
)
def test_kernels_fit_the_processor(flags: set[str], core: str | None) -> None:
    assert openblas._core_for(flags) == core


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch):
    """A library that takes OPENBLAS_CORETYPE's word, and detects Prescott without it."""
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(openblas, "_cpu_flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(
        openblas, "_probe", lambda library: os.environ.get("OPENBLAS_CORETYPE", "Prescott")
    )
    yield
    os.environ.pop("OPENBLAS_CORETYPE", None)


def test_a_fallback_is_overruled(probed: None) -> None:
    assert openblas._choose_core("lib") == "HASWELL"


def test_what_the_user_set_stands(probed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "CORE2")
    assert openblas._choose_core("lib") == "CORE2"


def test_what_the_library_detects_stands(probed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblas, "_probe", lambda library: "Zen")
    assert openblas._choose_core("lib") == "Zen"
    assert "OPENBLAS_CORETYPE" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
def test_a_worker_says_which_blas_it_uses() -> None:
    code = "from quire.engine.startup.openblas import load_openblas; print(load_openblas())"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "OpenBLAS" in output


def test_too_late_is_an_error() -> None:
    import mlx.core  # noqa: F401

    with pytest.raises(RuntimeError, match="before mlx"):
        openblas.load_openblas()
