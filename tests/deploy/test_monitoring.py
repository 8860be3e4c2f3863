"""Alert rules and dashboard: accepted by promtool, and answered by a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from live_server import PATIENCE, Server, eventually

HERE = Path(__file__).parent
PACKAGED = ("prometheus.yml", "alerts.yml", "grafana.json")

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (apt-get install prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="Prometheus is not installed"
)


@pytest.fixture
def deployed(tmp_path) -> Path:
    """The package's files, as a user copies them."""
    for name in PACKAGED:
        (tmp_path / name).write_text(files("quire.deploy").joinpath(name).read_text())
    return tmp_path


def promtool(*argv: str, cwd: Path) -> None:
    done = subprocess.run(["promtool", *argv], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_configuration_and_rules(deployed):
    promtool("check", "config", "prometheus.yml", cwd=deployed)
    promtool("check", "rules", "--lint-fatal", "alerts.yml", cwd=deployed)


@needs_promtool
def test_each_alert_fires_for_what_it_is_meant_for(deployed):
    shutil.copy(HERE / "alerts.test.yml", deployed)
    promtool("test", "rules", "alerts.test.yml", cwd=deployed)


def test_the_unit_tests_miss_no_alert():
    rules = files("quire.deploy").joinpath("alerts.yml").read_text()
    tested = (HERE / "alerts.test.yml").read_text()
    names = re.findall(r"alert: (\w+)", rules)
    assert len(names) > 5
    assert [name for name in names if f'alertname="{name}"' not in tested] == []


def dashboard() -> dict[str, Any]:
    loaded = json.loads(files("quire.deploy").joinpath("grafana.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def expressions() -> list[str]:
    """Every expression of the dashboard, with its variables filled in."""
    filled = []
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "10s")
            filled.append(re.sub(r"\$\w+", ".*", expression))
    return filled


def test_the_dashboard_can_be_imported():
    board = dashboard()
    assert board["id"] is None
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(board["panels"])))
    assert used == names
    cells = [
        (x, y)
        for panel in board["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24


class Prometheus:
    """A Prometheus that scrapes ``target`` every second, with the package's rules."""

    def __init__(self, folder: Path, target: str) -> None:
        config = (folder / "prometheus.yml").read_text()
        assert "127.0.0.1:8000" in config
        config = config.replace("127.0.0.1:8000", target).replace(": 15s", ": 500ms")
        config = config.replace("global:\n", "global:\n  evaluation_interval: 500ms\n")
        (folder / "prometheus.yml").write_text(config)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._process = subprocess.Popen(
            [
                *("prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"),
                f"--web.listen-address={self.address}",
            ],
            cwd=folder,
            stderr=subprocess.DEVNULL,
        )

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector; empty while Prometheus is not ready."""
        query = urllib.parse.urlencode({"query": expression})
        url = f"http://{self.address}/api/v1/query?{query}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                result = json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise ValueError(f"{expression}: {error.read()!r}") from error
            return []
        except urllib.error.URLError:
            if self._process.poll() is not None:
                raise
            return []
        assert isinstance(result, list)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def scraped_server(folder: Path) -> Iterator[tuple[Server, Prometheus]]:
    server = Server("--kv-cache-memory", "8MiB").wait_ready()
    prometheus = Prometheus(folder, server.url.removeprefix("http://"))
    try:
        yield server, prometheus
    finally:
        prometheus.close()
        server.stop()


@needs_prometheus
def test_the_dashboard_shows_data_and_a_dead_worker_is_an_alert(deployed):
    def chat() -> None:
        messages = [{"role": "user", "content": "What is 12 plus 30?"}]
        body = {"model": "quire-demo", "messages": messages}
        assert server.post("/v1/chat/completions", body)[0] == 200

    with scraped_server(deployed) as (server, prometheus):
        for _ in range(4):  # some in each scrape, so that rates are not empty
            chat()
            count = server.metrics()["quire_generated_tokens_total"]
            eventually(
                lambda: prometheus.query(f"quire_generated_tokens_total >= {count}"),  # noqa: B023
                "the scrape has come",
            )
        for expression in expressions():
            found = prometheus.query(expression)
            assert found, f"no data: {expression}"
            for series in found:
                assert math.isfinite(float(series["value"][1])), f"{expression}: {series}"
        firing = 'ALERTS{alertstate="firing"}'
        assert prometheus.query(firing) == []

        subprocess.run(["kill", "-9", str(server.worker_pid())], check=True)
        eventually(lambda: prometheus.query(firing), "the alert fires")
        names = {series["metric"]["alertname"] for series in prometheus.query(firing)}
        assert names == {"QuireWorkerRestarted"}
        server.process.kill()
        eventually(lambda: prometheus.query('up{job="quire"} == 0'), "the scrape fails")
