"""A worker ends with its front end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORKER = """
import sys, time
from quire.engine.life_line import LifeLine
LifeLine(int(sys.argv[1])).start()
time.sleep(60)
"""


@pytest.mark.parametrize("asked", [False, True])
def test_it_ends_even_if_nobody_reads_the_answer_to_the_last_question(asked: bool) -> None:
    reading, writing = os.pipe()
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(writing)], stdin=subprocess.PIPE, pass_fds=[writing]
    )
    assert worker.stdin is not None
    worker.stdin.write(b"?")
    worker.stdin.flush()
    assert os.read(reading, 100) == b"0.000\n"
    os.close(writing)
    os.close(reading)
    if asked:
        worker.stdin.write(b"?")
    worker.stdin.close()
    assert worker.wait(20) == 0
