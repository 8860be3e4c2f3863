"""A log that cannot be written costs lines, and neither time nor anything else."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.serve.log_writer import LogWriter
from quire.serve.metrics import Metrics

LIMIT = 30.0  # seconds; only a hang gets this far
PIPE_BYTES = 4096


def read_to_end(descriptor: int) -> str:
    with open(descriptor, "rb") as file:
        return file.read().decode()


def small_pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read_end, write_end


@given(st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_lines_arrive_whole_and_in_order(lines):
    read_end, write_end = os.pipe()
    log = LogWriter(write_end)
    for line in lines:
        log.write(line)
    assert log.flush(LIMIT)
    os.close(write_end)
    assert read_to_end(read_end).split("\n")[:-1] == [
        line.encode(errors="backslashreplace").decode() for line in lines
    ]
    assert log.dropped == 0


def test_a_reader_that_has_ended_costs_lines_only():
    read_end, write_end = os.pipe()
    os.close(read_end)
    log = LogWriter(write_end)
    for number in range(100):
        log.write(str(number))
    assert log.flush(LIMIT)
    assert log.dropped == 100
    os.close(write_end)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_lines_and_the_first_after_it_says_how_many(tmp_path):
    log = LogWriter(os.open("/dev/full", os.O_WRONLY))
    for number in range(7):
        log.write(str(number))
    assert log.flush(LIMIT)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, log.descriptor)  # space again
    log.write("back")
    log.write("again")
    assert log.flush(LIMIT)
    assert (tmp_path / "log").read_text() == "7 lines of this log were lost\nback\nagain\n"
    assert log.dropped == 7


def test_a_pipe_that_nobody_reads_holds_nobody_up():
    read_end, write_end = small_pipe()
    log = LogWriter(write_end, max_waiting=50)
    for number in range(10_000):
        log.write(f"{number:100}")
    assert not log.flush(0.01)
    assert log.dropped >= 10_000 - 50 - 2 * PIPE_BYTES
    metrics = Metrics(log)
    assert metrics.registry.get_sample_value("quire_log_lines_dropped_total") == log.dropped
    dropped = log.dropped
    received = b""
    while not log.flush(0.01):
        received += os.read(read_end, 1 << 16)
    log.write("10000")
    assert log.flush(LIMIT)
    os.close(write_end)
    lines = (received.decode() + read_to_end(read_end)).splitlines()
    assert sum(int(line.split()[0]) for line in lines if "were lost" in line) == dropped
    numbers = [int(line) for line in lines if "lost" not in line]
    assert numbers == sorted(numbers)
    assert len(numbers) == 10_001 - dropped


def test_a_pipe_that_does_not_block_is_waited_for():
    read_end, write_end = small_pipe()
    os.set_blocking(write_end, False)
    log = LogWriter(write_end)
    for _ in range(20):
        log.write("x" * 1000)
    received = b""
    while not log.flush(0.01):
        received += os.read(read_end, 1 << 16)
    os.close(write_end)
    assert (received.decode() + read_to_end(read_end)) == ("x" * 1000 + "\n") * 20
    assert log.dropped == 0


def test_a_command_whose_output_nobody_wants_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "quire.serve.cli", "service", "install", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=LIMIT)
    assert b"Traceback" not in errors
    assert b"BrokenPipeError" not in errors
