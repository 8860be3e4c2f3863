"""``quire serve`` as a process: start, answers while loading, drain, and what it leaves."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fake_backend import served_model as fake_model
from fake_worker import STALL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quire.serve.middleware import LOOPBACK_HOSTS
from quire.serve.model_source import worker_config
from quire.serve.serve_command import PERMANENT, accepted_hosts
from quire.serve.settings import ServeSettings

LIMIT = 60.0  # seconds; only a hang gets this far
SCRIPT = Path(__file__).with_name("serve_with_fake_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer; the fake worker never looks at the weights."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "fake"}')
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    @contextlib.contextmanager
    def request(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> int:
        with self.request("GET", path, **headers) as response:
            response.read()
            return response.status

    def complete(
        self, prompt: list[int], **options: object
    ) -> contextlib.AbstractContextManager[http.client.HTTPResponse]:
        body = {"model": "bytes", "prompt": prompt, **options}
        return self.request("POST", "/v1/completions", body)

    def worker_pid(self) -> int:
        found: list[int] = []

        def started() -> bool:
            command = ["ps", "-o", "pid=", "--ppid", str(self.process.pid)]
            shown = subprocess.run(command, capture_output=True, text=True).stdout
            found[:] = map(int, shown.split())
            return bool(found)

        until(started)
        (pid,) = found
        return pid


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return not Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie nobody has reaped yet


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve(model: Path, tmp_path: Path, mode: str = "ok", *flags: str) -> Iterator[Server]:
    log = tmp_path / "log"
    port = free_port()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, mode, "--model", model, "--port", str(port), *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    server = Server(process, port, log)

    def accepts() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(ConnectionRefusedError):
            return server.get("/health") == 200
        return False

    try:
        until(accepts)
        if mode != "hang-load":
            until(lambda: server.get("/ready") == 200)
        yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run_to_end(model: Path, mode: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, mode, "--model", model, *flags],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_answers_and_leaves_with_0(model, tmp_path):
    with serve(model, tmp_path) as server:
        with server.complete([65], max_tokens=3) as response:
            assert response.status == 200
            assert json.load(response)["usage"]["completion_tokens"] == 3
        worker = server.worker_pid()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 0
        assert gone(worker)
        output = server.process.stdout.read()
        assert f"http://127.0.0.1:{server.port}/v1" in output
        assert f"curl http://127.0.0.1:{server.port}/v1/completions" in output
        for line in server.log.read_text().splitlines()[1:]:
            assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ quire\.", line)


def test_the_printed_curl_line_works(model, tmp_path):
    with serve(model, tmp_path) as server:
        lines = [server.process.stdout.readline() for _ in range(3)]
        curl = lines[2].strip()
        assert curl.startswith("curl http")
        result = subprocess.run(["sh", "-c", curl + " -s"], capture_output=True, text=True)
        assert json.loads(result.stdout)["object"] == "text_completion"


def test_port_0_picks_and_prints_a_free_port(model):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "ok", "--model", model, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        match = re.search(r"http://127\.0\.0\.1:(\d+)/v1", process.stdout.readline())
        assert Server(process, int(match[1]), Path()).get("/ready") == 200
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT)


def test_http_answers_while_the_model_loads(model, tmp_path):
    with serve(model, tmp_path, "hang-load") as server:
        assert server.get("/health") == 200
        assert server.get("/ready") == 503
        assert server.get("/metrics") == 200
        with server.complete([65]) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert json.load(response)["error"]["type"] == "server_error"
        worker = server.worker_pid()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(LIMIT) == 0
        assert gone(worker)


def test_a_model_that_cannot_be_loaded_ends_it_for_good(model):
    result = run_to_end(model, "load-error", "--port", "0")
    assert result.returncode == PERMANENT == 2
    last = result.stderr.splitlines()[-1]
    assert last == "quire: error: The architecture frobnicator is not supported."
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_port_in_use_is_one_line(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_to_end(model, "ok", "--port", port)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"quire: error: Cannot listen on 127.0.0.1 port {port}: Address")


def test_a_worker_that_crashes_over_its_first_load_may_be_tried_again_by_a_service(model):
    result = run_to_end(model, "crash", "--port", "0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "quire: error: The worker exited with code 3."


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1"])
def test_an_impossible_address_is_one_line(host, model):
    result = run_to_end(model, "ok", "--host", host)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"quire: error: Cannot listen on {host}")
    assert "--port" not in line


def test_a_missing_model_is_one_line(tmp_path):
    result = run_to_end(tmp_path / "none", "ok", "--port", "0")
    assert result.returncode == PERMANENT
    assert len(result.stderr.splitlines()) == 1
    assert "no such folder" in result.stderr


def test_so_is_a_missing_one_of_several(model, tmp_path):
    models = f"a={model},hub=owner/name,b={tmp_path / 'none'}"
    result = run_to_end(model, "ok", "--models", models, "--port", "0")
    assert result.returncode == PERMANENT
    assert result.stderr == (
        f"quire: error: models.b: {tmp_path / 'none'}: no such folder, and not a Hugging Face "
        "owner/name.\n"
    )


def test_a_running_stream_survives_sigterm(model, tmp_path):
    with serve(model, tmp_path) as server:
        with server.complete([65], max_tokens=120, stream=True) as response:
            assert response.readline().startswith(b"data: {")
            server.process.send_signal(signal.SIGTERM)
            rest = response.read()
        assert b'"finish_reason":"length"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.process.wait(LIMIT) == 0


def test_new_requests_are_refused_while_draining(model, tmp_path):
    with (
        serve(model, tmp_path) as server,
        server.complete([STALL], max_tokens=9, stream=True) as stalled,
    ):
        stalled.readline()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "finishing running requests" in server.log.read_text())
        with server.complete([65]) as response:
            assert response.status == 503
            assert "shutting down" in json.load(response)["error"]["message"]
        worker = server.worker_pid()
        # The second signal does not wait for the stalled request.
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 128 + signal.SIGTERM
        assert gone(worker)


def test_the_drain_has_a_limit(model, tmp_path):
    with serve(model, tmp_path, "ok", "--drain-timeout", "0.1") as server:
        with server.complete([STALL], max_tokens=9, stream=True) as stalled:
            stalled.readline()
            server.process.send_signal(signal.SIGTERM)
            rest = stalled.read()
        assert b"The server is shutting down." in rest
        assert b"[DONE]" not in rest
        assert server.process.wait(LIMIT) == 0


def test_a_killed_worker_is_replaced_behind_the_open_port(model, tmp_path):
    with serve(model, tmp_path) as server:
        with server.complete([STALL], max_tokens=9, stream=True) as stalled:
            stalled.readline()
            worker = server.worker_pid()
            os.kill(worker, signal.SIGKILL)
            rest = stalled.read()
        assert b"killed by SIGKILL" in rest
        until(lambda: server.get("/ready") == 200)
        assert server.worker_pid() != worker
        with server.complete([65], max_tokens=2) as response:
            assert response.status == 200


def test_changed_files_are_read_again_when_the_worker_is_replaced(model, tmp_path):
    folder = tmp_path / "bytes"
    shutil.copytree(model, folder)

    def tokens() -> list[int]:
        with server.request("POST", "/tokenize", {"model": "bytes", "prompt": "AB"}) as response:
            return json.load(response)["tokens"]

    with serve(folder, tmp_path) as server:
        before = tokens()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens(["AB"])
        tokenizer.save(str(folder / "tokenizer.json"))
        assert tokens() == before
        # Half of an upload: nothing can be served, and it is tried again.
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-1])
        os.kill(server.worker_pid(), signal.SIGKILL)
        until(lambda: "is cut off" in server.log.read_text())
        assert server.get("/ready") == 503
        (folder / "model.safetensors").write_bytes(whole)
        until(lambda: server.get("/ready") == 200)
        assert tokens() == [256]
        with server.complete([65], max_tokens=2) as response:
            assert response.status == 200


def test_unchanged_files_are_not_read_again(model, tmp_path):
    with serve(model, tmp_path) as server:
        os.kill(server.worker_pid(), signal.SIGKILL)
        until(lambda: server.get("/ready") == 503)
        until(lambda: server.get("/ready") == 200)
        assert "has changed" not in server.log.read_text()


def test_a_stopped_worker_is_replaced(model, tmp_path):
    with (
        serve(model, tmp_path) as server,
        server.complete([STALL], max_tokens=9, stream=True) as stalled,
    ):
        stalled.readline()
        os.kill(worker := server.worker_pid(), signal.SIGSTOP)
        assert b"The worker has not answered" in stalled.read()
        until(lambda: server.get("/ready") == 200)
        assert gone(worker)


def test_nothing_outlives_a_killed_server(model, tmp_path):
    with serve(model, tmp_path) as server:
        worker = server.worker_pid()
        server.process.kill()
        server.process.wait(LIMIT)
        until(lambda: gone(worker))


@pytest.mark.parametrize(
    ("address", "hosts", "expected"),
    [
        ("127.0.0.1", (), LOOPBACK_HOSTS),
        ("::1", ("llm.lan",), (*LOOPBACK_HOSTS, "llm.lan")),
        ("127.0.0.1", ("*",), None),
        ("0.0.0.0", (), None),
        ("192.0.2.1", ("llm.lan",), (*LOOPBACK_HOSTS, "llm.lan")),
    ],
)
def test_which_hosts_are_accepted(address, hosts, expected):
    assert accepted_hosts(ServeSettings(allowed_hosts=hosts), address) == expected


def test_every_setting_of_the_worker_reaches_it():
    settings = ServeSettings(
        device="cpu",
        block_size=32,
        kv_cache_memory=2**20,
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=50,
        eviction_policy="fifo",
        log_level="debug",
    )
    config = msgspec.structs.asdict(worker_config(settings, Path("/model"), fake_model()))
    assert config.pop("model_path") == "/model"
    assert config.pop("eos_token_ids") == list(fake_model().eos_token_ids)
    assert config.pop("answers") == -1
    assert (config.pop("request_address"), config.pop("output_address")) == ("", "")
    assert config == {name: getattr(settings, name) for name in config}


def test_more_hosts_can_be_allowed(model, tmp_path):
    with serve(model, tmp_path, "ok", "--allowed-hosts", "llm.lan") as server:
        assert server.get("/health", Host="llm.lan:8000") == 200
        assert server.get("/health", Host="localhost") == 200
        assert server.get("/health", Host="evil.example") == 403
