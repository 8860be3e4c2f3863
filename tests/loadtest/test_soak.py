"""What a soak concludes from its samples and counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.loadtest.soak import _spec
from quire.loadtest.soak_plot import save_plot
from quire.loadtest.soak_samples import ProcessSample, Sample
from quire.loadtest.soak_traffic import Tally
from quire.loadtest.soak_verdict import flat, same_counts, same_tokens, trends


def samples(growth: float = 0.0, threads: int = 7, count: int = 100) -> list[Sample]:
    """``growth`` is that of the front end's memory over all of them, relative."""
    series = {"quire_requests_running": 1.0, "quire_requests_waiting": 0.0}
    return [
        Sample(
            20.0 * number,
            [
                ProcessSample(
                    "front end",
                    1,
                    60_000,
                    50_000,
                    int(36_000 * (1 + growth * number / count)),
                    threads if number > count // 2 else 7,
                    36 + number % 2,
                    1.0,
                )
            ],
            series,
            10.0,
        )
        for number in range(count)
    ]


def failures(found: list[Sample]) -> set[str]:
    return {check.name for check in flat(trends(found, ["front end"])) if not check.holds}


def test_what_grows_is_told() -> None:
    assert failures(samples()) == set()
    assert failures(samples(growth=0.015)) == set()
    assert failures(samples(growth=0.05)) == {"front end: memory"}
    assert failures(samples(growth=-0.05)) == {"front end: memory"}
    assert failures(samples(threads=12)) == {"front end: threads"}


def test_the_cpu_of_a_step_is_that_of_one_worker() -> None:
    found = []
    for number, (pid, cpu, steps) in enumerate(
        [(8, 1.0, 10), (8, 1.5, 60), (9, 0.2, 90), (9, 0.5, 100)]
    ):
        worker = ProcessSample("worker", pid, 1, 1, 1, 1, 1, cpu)
        found.append(Sample(20.0 * number, [worker], {"quire_steps_total": float(steps)}, None))
    trend = trends(found, ["worker"])[-1]
    assert trend.name == "step, ms of a CPU"
    assert (trend.first, trend.last) == pytest.approx((10.0, 30.0))


COUNTED = {
    'quire_http_requests_total{code="200",method="POST",route="/v1/completions"}': 5.0,
    'quire_http_requests_total{code="200",method="GET",route="/metrics"}': 3.0,
    'quire_http_requests_total{code="404",method="POST",route="unmatched"}': 0.0,
    "quire_client_disconnects_total": 1.0,
    'quire_requests_total{finish_reason="stop"}': 2.0,
    'quire_requests_total{finish_reason="length"}': 2.0,
    'quire_requests_total{finish_reason="abort"}': 1.0,
    'quire_requests_total{finish_reason="error"}': 0.0,
    "quire_prompt_tokens_total": 50.0,
    "quire_generated_tokens_total": 25.0,
}


def tally() -> Tally:
    return Tally(
        responses={"POST /v1/completions 200": 5},
        finishes={"stop": 2, "length": 2, "abort": 1},
        kinds={},
        prompt_tokens=50,
        generated_tokens=20,
        unseen_tokens=10,
        hang_ups=1,
    )


def test_equal_counts_hold() -> None:
    checks = [*same_counts(tally(), COUNTED, 3), *same_tokens(tally(), COUNTED)]
    assert [check.name for check in checks if not check.holds] == []


@pytest.mark.parametrize("series", [name for name, count in COUNTED.items() if count])
def test_a_count_that_differs_is_told(series: str) -> None:
    counted = {**COUNTED, series: COUNTED[series] + 11}
    checks = [*same_counts(tally(), counted, 3), *same_tokens(tally(), counted)]
    assert len([check for check in checks if not check.holds]) == 1


def test_the_plot_shows_a_gap_where_a_process_is_missing(tmp_path: Path) -> None:
    save_plot(tmp_path / "a" / "soak.svg", samples(), "100 samples")
    assert "100 samples" in (tmp_path / "a" / "soak.svg").read_text()


def test_models_that_are_swapped_do_not_fit_together(tmp_path: Path) -> None:
    assert "--max-loaded-models" not in _spec({}).command
    command = _spec({"quire-demo": tmp_path, "other": tmp_path}).command
    assert command[command.index("--max-loaded-models") + 1] == "1"
