"""What a start's log line says of its stages."""

from __future__ import annotations

from unittest import mock

from quire.serve.load_clock import LoadClock


def test_stages_are_told_in_order_and_add_up() -> None:
    with mock.patch("quire.serve.load_clock.time.monotonic") as now:
        now.return_value = 100.0
        clock = LoadClock()
        for at, stage in [
            (102.5, "loading weights"),
            (103.0, "loading weights"),
            (110.0, "warming up"),
        ]:
            now.return_value = at
            clock.enter(stage)
        now.return_value = 114.0
        clock.stop()
    assert str(clock) == "14.0 s: starting 2.5, loading weights 7.5, warming up 4.0"
    assert clock.total == 14.0
    assert clock.last_stage == 4.0
