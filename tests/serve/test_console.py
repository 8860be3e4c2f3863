"""What the person at the terminal reads."""

from __future__ import annotations

import json
import logging
import shlex

import pytest

from quire.engine.messages import LoadProgress
from quire.serve.console import LoadDisplay, configure_logging, print_ready, server_url
from quire.serve.log_writer import LogWriter


@pytest.fixture
def logging_restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("llm.lan", "http://llm.lan:80"),
    ],
)
def test_the_url_is_one_a_client_can_use(host, url):
    assert server_url(host, 80) == url


@pytest.mark.parametrize("chat", [True, False])
def test_the_curl_line_survives_the_shell(chat, capsys):
    print_ready("http://localhost:80", 'it\'s a "model"', chat=chat)
    curl = shlex.split(capsys.readouterr().out.splitlines()[2])
    assert curl[:2] == [
        "curl",
        f"http://localhost:80/v1/{'chat/completions' if chat else 'completions'}",
    ]
    assert json.loads(curl[-1])["model"] == 'it\'s a "model"'


def test_progress_off_a_terminal_is_one_line_per_stage(capfd):
    log = LogWriter()
    display = LoadDisplay(log)
    for done in range(3):
        display.show(LoadProgress("loading weights", done, 2))
    display.show(LoadProgress("warming up", 0, 1))
    display.close()
    assert log.flush(10)
    captured = capfd.readouterr()
    assert captured.err == "loading weights...\nwarming up...\n"
    assert captured.out == ""


def test_a_log_record_is_one_line_whatever_it_quotes(capfd, logging_restored):
    log = LogWriter()
    configure_logging("info", log)
    logging.getLogger("quire.test").info("said %s", "hello\n2026-01-01 ERROR forged\r\n")
    logging.getLogger("quire.test").debug("not shown")
    assert log.flush(10)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(r"INFO quire.test: said hello\n2026-01-01 ERROR forged\r\n")
