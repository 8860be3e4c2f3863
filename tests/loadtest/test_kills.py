"""What a measurement of kills calls broken."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from quire.loadtest.environment import describe
from quire.loadtest.kills import End, Kill, KillsResult, broken

KILL = Kill("decode", requests=3, errors=0.2, spawned=0.8, ready=6.0, backoff=0.5)
STOP = Kill("decode", requests=3, errors=13.0, spawned=13.6, ready=19.0, backoff=0.5)
SOUND = KillsResult(
    command="python -m quire.loadtest.kills",
    kills=[KILL, replace(KILL, moment="idle", requests=0, errors=None)],
    stops=[STOP],
    end=End(0.3, port_free=True, left_behind=2, left_after_next_start=0),
    polls=100,
    longest_poll=0.2,
    failures=[],
    load_seconds=5.2,
    broken=[],
    environment=describe(),
)


def test_a_server_that_keeps_its_bounds() -> None:
    assert list(broken(SOUND)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kills": [replace(KILL, errors=1.2)]}, "ended after 1.2 s"),
        ({"kills": [replace(KILL, spawned=2.6)]}, "2.1 s after the back-off"),
        ({"stops": [replace(STOP, errors=16.0)]}, "16.0 s"),
        ({"stops": [replace(STOP, errors=None)]}, "None"),
        ({"failures": ["/health: refused"]}, "refused"),
        ({"end": replace(SOUND.end, port_free=False)}, "port_free=False"),
        ({"end": replace(SOUND.end, left_after_next_start=1)}, "left_after_next_start=1"),
    ],
)
def test_one_that_does_not(changes: dict[str, object], says: str) -> None:
    [line] = broken(replace(SOUND, **changes))
    assert says in line
