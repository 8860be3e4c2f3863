"""What went wrong in other model servers, each as a test here; the names are the advisories'.

Where the lesson is tested elsewhere, with more cases, the test here asks for one of them over HTTP.
"""

from __future__ import annotations

import ast
import json
import resource
import socket
import struct
from importlib.metadata import version
from pathlib import Path

import pytest
from fake_backend import (
    EOS,
    MODEL,
    FakeBackend,
    Script,
    Server,
    one_model_app,
    post,
    served_model,
    serving,
)

from quire.serve.api_keys import ApiKey, Keyring, hash_key
from quire.serve.middleware import LOOPBACK_HOSTS
from quire.serve.model_files import check_folder, check_safetensors
from quire.serve.served_model import ModelFilesError

ROOT = Path(__file__).parents[2]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture
def server():
    app = one_model_app(FakeBackend(), served_model(), allowed_hosts=LOOPBACK_HOSTS)
    with serving(app) as running:
        yield running
        assert running.request("GET", "/health").status == 200, "it harmed others"


def ask(server: Server, path: str = COMPLETIONS, **fields: object):
    body = {"model": MODEL, "max_tokens": 1, **fields}
    if path == CHAT:
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    else:
        body.setdefault("prompt", "hi")
    return server.request("POST", path, body)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


# ---- who reaches the server


@pytest.mark.parametrize(
    "host", ["evil.example", "EVIL.example:8000", "127.0.0.1.evil.example", "[::1].evil.example"]
)
def test_cve_2024_28224_dns_rebinding(host, server):
    reply = server.request("POST", COMPLETIONS, {}, {"Host": host})
    assert (reply.status, reply.error["code"]) == (403, "host_not_allowed")
    assert "--allowed-hosts" in reply.error["message"]


def test_cve_2026_48710_a_forged_host_changes_no_decision(server):
    reply = server.request("GET", "/v1/models", headers={"Host": "localhost/health?"})
    assert reply.status == 403
    assert tuple(map(int, version("starlette").split(".")[:3])) >= (1, 0, 1)
    for path in sources("serve"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_url = isinstance(node, ast.Attribute) and node.attr in ("url", "base_url")
            assert not (is_url and ast.unparse(node.value) == "request"), path


def test_cve_2024_37032_and_2026_103663_a_models_name_is_no_path(server):
    for name in ("../../etc/passwd", "/etc/passwd", "..%2f..%2fetc", "a\0b", "\\..\\x"):
        assert ask(server, model=name).status == 404
    for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e/%2e%2e/etc/passwd"):
        assert server.request("GET", path).status == 404


def test_cve_2024_45436_no_archive_is_unpacked():
    words = {"zipfile", "tarfile", "pickle", "shutil.unpack_archive"}
    for path in sources("serve", "engine", "cache", "deploy"):
        names = {
            ast.unparse(n)
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.alias)
        }
        assert not words & names, path


def test_cve_2025_51471_and_go_2025_4251_models_are_managed_with_an_admin_key_only(server):
    for path in ("/v1/models/load", "/v1/models/unload"):
        assert server.request("POST", path, {"model": "https://evil.example/x"}).status == 403
    for path in ("/api/pull", "/api/push", "/api/create", "/v1/models/pull"):
        assert server.request("POST", path, {"model": "x"}).status in (403, 404, 405)


def test_cve_2025_59425_keys_are_compared_in_constant_time():
    text = (ROOT / "serve" / "api_keys.py").read_text()
    assert "compare_digest" in text
    for path in sources("serve"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                assert "presented" not in ast.unparse(node), path


def test_a_guarded_prefix_leaves_nothing_else_open():
    keyring = Keyring({"a": ApiKey(sha256=hash_key("a"), name="a")})
    with serving(one_model_app(FakeBackend(), served_model(), keyring=keyring)) as running:
        for path in ("/tokenize", "/detokenize", "/metrics", "/v2/x", "/V1/models", "//v1/models"):
            assert running.request("GET", path).status == 401, path


# ---- what a request may cost


def test_cve_2025_48956_giant_headers(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10**6)
        assert b" 431 " in connection.recv(100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("fields", [{"n": 10**9}, {"best_of": 10**9}, {"n": -1}, {"n": 0}])
def test_cve_2026_34756_and_2024_8939_many_answers(fields, server):
    assert ask(server, **fields).status == 400


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"logprobs": 10**6}),
        (CHAT, {"logprobs": True, "top_logprobs": 129}),
        (CHAT, {"logprobs": True, "top_logprobs": -1}),
    ],
)
def test_pysec_2026_4350_many_logprobs(path, fields, server):
    assert ask(server, path, **fields).status == 400


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""]])
def test_cve_2024_8768_empty_prompts(prompt, server):
    assert ask(server, prompt=prompt).status == 400
    assert ask(server).status == 200


def strict_tool(parameters: object) -> dict[str, object]:
    function = {"name": "f", "strict": True, "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        {"structured_outputs": {"regex": "(("}},
        {"guided_regex": "(a"},
        strict_tool({"type": 7}),
        strict_tool({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}),
    ],
)
def test_cve_2025_48942_48943_48944_and_2026_105757_bad_schemas(fields, server):
    assert ask(server, CHAT, **fields).status == 400


def test_cve_2026_55574_and_2025_71379_patterns_that_take_for_ever(server):
    """Patterns are compiled by llguidance's automata, in a process that is killed if it lasts."""
    for pattern in ("(a+)+b" * 50, "(" * 10_000 + ")" * 10_000, "a{1000000}{1000000}"):
        assert ask(server, CHAT, structured_outputs={"regex": pattern}).status in (200, 400)


def test_cve_2025_29770_32381_and_57809_schemas_without_an_end(server):
    schema = {"$ref": "#"}
    deep: dict = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    for each in (schema, deep):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": each}}
        assert ask(server, CHAT, response_format=form).status == 400


def test_pysec_2026_4344_4349_cve_2025_61620_and_62426_templates_of_requests(server):
    assert ask(server, CHAT, chat_template="{{ 'a' * 10**9 }}").status == 400
    for switches in ({"messages": []}, {"tokenize": True}, {"x": "{{ 1 }}"}):
        assert ask(server, CHAT, chat_template_kwargs=switches).status == 400


def test_cve_2026_22773_images(server):
    image = {"type": "image_url", "image_url": {"url": "http://evil.example/x.png"}}
    assert ask(server, CHAT, messages=[{"role": "user", "content": [image]}]).status == 400


def test_cve_2025_62727_ranges(server):
    ranges = "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(2000))
    reply = server.request("GET", "/page/app.js", headers={"Range": ranges})
    assert reply.status in (200, 404)
    assert "content-range" not in reply.headers


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
    ],
)
def test_cve_2025_43859_smuggling(head, server):
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    with server.connect(start + head + b"\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n") as connection:
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b"quire_" not in answer


def test_rapid_mlx_d_deep_json_and_f_007_bodies(server):
    reply = server.request("POST", COMPLETIONS, b"[" * 100_000)
    assert reply.status == 400
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
    with server.connect(head) as connection:
        assert b" 413 " in connection.recv(100)


def test_rapid_mlx_f_012_and_c_01_a_client_that_leaves_ends_its_request():
    backend = FakeBackend([Script([[65], "hang"])])
    with serving(one_model_app(backend, served_model())) as running:
        for stream in (True, False):
            body = {"model": MODEL, "prompt": "a", "max_tokens": 9, "stream": stream}
            with running.connect(post(COMPLETIONS, body)):
                while not backend.streams or not backend.streams[-1].outputs_sent:
                    pass
            backend.wait_until_idle()
            assert backend.streams.pop().close_reasons == ["abort"]


# ---- what one request may learn of another


def test_cve_2025_46570_prompts_of_other_keys_are_not_found_in_the_cache():
    keys = [ApiKey(sha256=hash_key(name), name=name) for name in ("a", "b")]
    assert len({key.cache_salt for key in keys}) == 2
    assert "" not in {key.cache_salt for key in keys}


def test_cve_2026_105756_a_salt_of_any_kind_harms_nobody(server):
    for salt in ("x" * 10**6, 5, "\0", [], {}):
        assert ask(server, cache_salt=salt).status in (200, 400)


def test_cve_2026_105755_a_clients_id_names_nothing_of_the_servers():
    backend = FakeBackend([Script([[65]])])
    with serving(one_model_app(backend, served_model())) as running:
        headers = {"X-Request-Id": "1"}
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        ids = {running.request("POST", COMPLETIONS, body, headers).json["id"] for _ in range(3)}
        assert len(ids) == 3
        assert len({stream.request.request_id for stream in backend.streams}) == 3


def test_cve_2025_25183_block_names_are_cryptographic():
    assert "blake2b" in (ROOT / "cache" / "block_hash.py").read_text()


# ---- what a model's folder may do


@pytest.fixture
def folder(tmp_path) -> Path:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text("{}")
    check_folder(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    ],
)
def test_cve_2026_7482_declared_sizes_are_not_believed(entry, folder):
    header = json.dumps({"a": entry}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelFilesError):
        check_safetensors(file)


@pytest.mark.parametrize("name", ["weights.npz", "model.gguf", "model.bin", "weights.npy"])
def test_cve_2025_62608_and_62609_only_safetensors_are_read(name, folder):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelFilesError, match=r"no \*\.safetensors"):
        check_folder(folder)


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ '%s'|format(messages)|attr('__class__') }}",
        "{{ ('{0.__class__}'|string).format(messages) }}",
        "{% set f = 'x{0.__class__.__init__}'.format %}{{ f(messages) }}",
    ],
)
def test_cve_2024_34359_2026_5760_2024_56326_and_2025_27516_templates_are_sandboxed(source):
    with serving(one_model_app(FakeBackend(), served_model(template=source))) as running:
        reply = running.request(
            "POST", CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        )
        text = reply.body.decode()
        assert reply.status == 400 or "class" not in text
    assert tuple(map(int, version("jinja2").split(".")[:3])) >= (3, 1, 6)


def test_cve_2026_27893_46517_and_46432_no_code_of_a_model_runs(folder):
    (folder / "config.json").write_text('{"model_file": "evil.py"}')
    with pytest.raises(ModelFilesError, match="does not run code"):
        check_folder(folder)
    for path in sources("engine", "serve"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", path


def test_special_tokens_in_a_text_end_nothing(server):
    assert ask(server, prompt=EOS).status == 200
