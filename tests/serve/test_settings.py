"""One table, four sources, and errors that name theirs."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.serve.setting_values import parse_size
from quire.serve.settings import (
    SETTINGS,
    ServeSettings,
    SettingsError,
    add_arguments,
    flags_of,
    load,
    misspelt_variables,
)


def flags(*argv: str) -> dict[str, str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return flags_of(parser.parse_args(argv))


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults():
    settings = load({}, {})
    assert settings == ServeSettings()
    assert (settings.host, settings.port, settings.drain_timeout) == ("127.0.0.1", 8000, 30.0)


def test_flags_beat_variables_beat_the_file(tmp_path):
    config = write(tmp_path / "quire.toml", "port = 1\nmax_queue = 1\nblock_size = 32\n")
    environ = {"QUIRE_CONFIG": config, "QUIRE_PORT": "2", "QUIRE_MAX_QUEUE": "2"}
    settings = load(flags("--port", "3"), environ)
    assert (settings.port, settings.max_queue, settings.block_size) == (3, 2, 32)
    assert settings.max_num_seqs == 64


def test_the_config_flag_beats_the_variable(tmp_path):
    one = write(tmp_path / "one.toml", "port = 1")
    two = write(tmp_path / "two.toml", "port = 2")
    assert load(flags("--config", two), {"QUIRE_CONFIG": one}).port == 2


SAMPLES = {
    "model": ("org/name", "org/name"),
    "served_model_name": ("demo", "demo"),
    "model_aliases": ("gpt-*,mine", ("gpt-*", "mine")),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "max_model_len": ("4096", 4096),
    "pooling": ("mean", "mean"),
    "tool_parser": ("hermes", "hermes"),
    "reasoning_parser": ("think", "think"),
    "chat_template_kwargs": (
        "enable_thinking=False, reasoning_effort=low,thinking_budget=5",
        (("enable_thinking", False), ("reasoning_effort", "low"), ("thinking_budget", 5)),
    ),
    "memory_fraction": ("0.5", 0.5),
    "kv_cache_memory": ("2GiB", 2 * 2**30),
    "block_size": ("32", 32),
    "max_num_seqs": ("8", 8),
    "max_num_batched_tokens": ("1024", 1024),
    "max_queue": ("0", 0),
    "eviction_policy": ("cost", "cost"),
    "device": ("metal", "metal"),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "log_prompts": ("yes", True),
    "drain_timeout": ("2.5", 2.5),
    "step_timeout": ("300", 300.0),
    "api_key": ("sk-1", "sk-1"),
    "api_key_file": ("/etc/keys.toml", "/etc/keys.toml"),
    "admin_key": ("sk-2", "sk-2"),
    "allowed_origins": (
        "https://A.example,tauri://localhost",
        ("https://a.example", "tauri://localhost"),
    ),
    "tls_cert_file": ("/etc/cert.pem", "/etc/cert.pem"),
    "tls_key_file": ("/etc/key.pem", "/etc/key.pem"),
    "vllm_metrics": ("yes", True),
    "models": ("a=org/a, b=/models/b", (("a", {"model": "org/a"}), ("b", {"model": "/models/b"}))),
    "models_from": ("cache", "cache"),
    "max_loaded_models": ("2", 2),
    "model_idle_ttl": ("600", 600.0),
    "allowed_hosts": ("A.example, *.b.example,[::1]", ("a.example", "*.b.example", "[::1]")),
    "otlp_traces_endpoint": ("http://localhost:4318/v1/traces", "http://localhost:4318/v1/traces"),
    "max_body_size": ("1MB", 10**6),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_read_from_every_source(setting, tmp_path):
    text, value = SAMPLES[setting.name]
    config = write(tmp_path / "quire.toml", f'{setting.name} = "{text}"')
    for settings in (
        load(flags(setting.flag, text), {}),
        load({}, {setting.variable: text}),
        load({"config": config}, {}),
    ):
        assert settings == dataclasses.replace(ServeSettings(), **{setting.name: value})


def test_paths_in_a_file_start_at_its_folder(tmp_path, monkeypatch):
    (tmp_path / "own" / "model").mkdir(parents=True)
    text = """
    model = "own/model"
    models_from = "all"
    api_key_file = "keys.toml"
    tls_cert_file = "../cert.pem"
    tls_key_file = "/etc/key.pem"
    [models.there]
    model = "./own/model"
    [models.missing]
    model = "nope"
    [models.hub]
    model = "owner/name"
    """
    write(tmp_path / "quire.toml", text)
    monkeypatch.chdir(tmp_path.parent)
    settings = load({"config": f"{tmp_path.name}/quire.toml"}, {})
    monkeypatch.chdir("/")
    assert load({"config": str(tmp_path / "quire.toml")}, {}) == settings
    assert settings == ServeSettings(
        model=str(tmp_path / "own/model"),
        models_from=str(tmp_path / "all"),
        api_key_file=str(tmp_path / "keys.toml"),
        tls_cert_file=str(tmp_path.parent / "cert.pem"),
        tls_key_file="/etc/key.pem",
        models=(
            ("there", {"model": str(tmp_path / "own/model")}),
            ("missing", {"model": str(tmp_path / "nope")}),
            ("hub", {"model": "owner/name"}),
        ),
    )


def test_toml_takes_its_own_types(tmp_path):
    text = 'port = 9000\ndrain_timeout = 5\nallowed_hosts = ["a.example"]\nmax_body_size = 1000\n'
    settings = load({"config": write(tmp_path / "quire.toml", text)}, {})
    assert settings == ServeSettings(
        port=9000, drain_timeout=5.0, allowed_hosts=("a.example",), max_body_size=1000
    )


@pytest.mark.parametrize(
    ("argv", "environ", "text", "message"),
    [
        (["--port", "70000"], {}, "", "flag --port must be from 0 to 65535, not '70000'"),
        (["--port", "8e3"], {}, "", "flag --port must be a whole number, not '8e3'"),
        ([], {"QUIRE_PORT": "x"}, "", "QUIRE_PORT must be a whole number, not 'x'"),
        ([], {}, "port = true", "{config}: port must be a whole number, not True"),
        ([], {}, "prot = 1", "{config}: unknown key 'prot'; did you mean port?"),
        ([], {}, "zzz = 1", "{config}: unknown key 'zzz'"),
        ([], {}, "[serve]\nport = 1", "{config}: unknown key 'serve'"),
        ([], {}, "host = ''", "{config}: host must be a non-empty string, not ''"),
        ([], {}, "device = 3", "{config}: device must be one of auto, metal, cuda, cpu, not 3"),
        (["--kv-cache-memory", "2 potatoes"], {}, "", "flag --kv-cache-memory must be a size"),
        (["--drain-timeout", "-1"], {}, "", "flag --drain-timeout must be a number of seconds"),
        (
            ["--chat-template-kwargs", "x=1"],
            {},
            "",
            "flag --chat-template-kwargs must be name=value pairs",
        ),
        (["--allowed-hosts", "http://x"], {}, "", "flag --allowed-hosts must be host names"),
        (["--allowed-hosts", "x:8000"], {}, "", "flag --allowed-hosts must be host names"),
        (["--allowed-hosts", "*x"], {}, "", "flag --allowed-hosts must be host names"),
    ],
)
def test_a_bad_value_names_its_source_in_one_line(argv, environ, text, message, tmp_path):
    given_flags = flags(*argv)
    if text:
        given_flags["config"] = write(tmp_path / "quire.toml", text)
    with pytest.raises(SettingsError) as caught:
        load(given_flags, environ)
    assert str(caught.value).startswith(message.format(config=given_flags.get("config")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"port = ", b"\xff\xfe"])
def test_an_unreadable_file_is_named(content, tmp_path):
    path = tmp_path / "quire.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load({}, {"QUIRE_CONFIG": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_variable_counts_as_unset():
    assert load({}, {"QUIRE_PORT": "", "QUIRE_CONFIG": ""}) == ServeSettings()


def test_a_misspelt_variable_is_noticed():
    environ = {"QUIRE_PROT": "1", "QUIRE_PORT": "1", "QUIRE_SOMETHING_ELSE": "1", "PATH": ""}
    assert misspelt_variables(environ) == ["QUIRE_PROT is not a setting; did you mean QUIRE_PORT?"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("1.5 gb", 1_500_000_000), ("512kib", 2**19), ("7", 7), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@given(
    st.one_of(
        st.text(),
        st.from_regex("[0-9]{1,400}[kmgKMG]?i?[bB]?", fullmatch=True),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.none(),
        st.lists(st.text()),
    )
)
def test_parsers_only_ever_raise_a_one_line_value_error(value):
    for setting in SETTINGS:
        message = ""
        try:
            setting.parse(value)
        except ValueError as error:
            message = str(error)
        assert "\n" not in message


def test_the_help_shows_every_setting():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for setting in SETTINGS:
        assert setting.flag in text


@pytest.mark.parametrize("argv", [("a/b",), ("--model", "a/b"), ("a/b", "--model", "a/b")])
def test_a_model_needs_no_flag(argv):
    assert flags(*argv) == {"model": "a/b"}
    assert flags("--port", "1", *argv) == {"model": "a/b", "port": "1"}
    assert flags() == {}


def test_two_models_are_refused():
    with pytest.raises(SettingsError, match="two models are named, 'a/b' and --model 'c/d'"):
        flags("a/b", "--model", "c/d")
