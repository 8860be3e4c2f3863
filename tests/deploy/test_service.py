"""What the service runs: validated, absolute, without secrets, patient enough for the drain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quire.deploy.service import Service, describe_service, lasting_path
from quire.serve.settings import SettingsError, load

HOME = Path("/home/someone")


def settings_of(service: Service):
    """Read the command line back the way ``quire serve`` will."""
    words = service.command[4:]
    flags = {
        flag.removeprefix("--").replace("-", "_"): value
        for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    return load(flags, {})


def test_the_flags_reach_quire_serve():
    service = describe_service({"port": "9000", "max_queue": "7"}, {}, HOME)
    assert service.command[:4] == (sys.executable, "-m", "quire.serve.cli", "serve")
    settings = settings_of(service)
    assert (settings.port, settings.max_queue) == (9000, 7)


def test_a_bad_flag_is_refused_before_anything_is_installed():
    with pytest.raises(SettingsError, match="flag --port must be a whole number"):
        describe_service({"port": "many"}, {}, HOME)
    with pytest.raises(SettingsError, match="needs a port"):
        describe_service({"port": "0"}, {}, HOME)


def test_paths_do_not_depend_on_where_it_was_installed_from(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "quire.toml").write_text('model = "model"\nport = 9000\n')
    monkeypatch.chdir(tmp_path)
    service = describe_service({"config": "quire.toml"}, {}, HOME)
    monkeypatch.chdir("/")
    settings = settings_of(service)
    assert settings.model == str(tmp_path / "model")
    assert settings.port == 9000


@pytest.mark.parametrize("given", ["flag", "file"])
def test_so_does_the_folder_of_models(tmp_path, monkeypatch, given):
    (tmp_path / "models").mkdir()
    (tmp_path / "quire.toml").write_text('models_from = "models"\n')
    flags = {"models_from": "models"} if given == "flag" else {"config": "quire.toml"}
    monkeypatch.chdir(tmp_path)
    service = describe_service(flags, {}, HOME)
    monkeypatch.chdir("/")
    assert settings_of(service).models_from == str(tmp_path / "models")
    assert settings_of(describe_service({"models_from": "cache"}, {}, HOME)).models_from == "cache"


def test_so_do_files_and_further_models(tmp_path, monkeypatch):
    (tmp_path / "dir").mkdir()
    (tmp_path / "keys.toml").touch()
    monkeypatch.chdir(tmp_path)
    given = {"models": "a=./dir,b=dir,c=owner/name", "api_key_file": "keys.toml"}
    service = describe_service(given, {}, HOME)
    monkeypatch.chdir("/")
    settings = settings_of(service)
    assert [(name, table["model"]) for name, table in settings.models] == [
        ("a", str(tmp_path / "dir")),
        ("b", str(tmp_path / "dir")),
        ("c", "owner/name"),
    ]
    assert settings.api_key_file == str(tmp_path / "keys.toml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("api_key_file", "--api-key-file .*/none: no such file"),
        ("tls_cert_file", "--tls-cert-file .*/none: no such file"),
        ("models_from", "--models-from .*/none: no such folder"),
    ],
)
@pytest.mark.parametrize("given", ["flag", "file"])
def test_what_is_not_there_is_noticed_at_once(name, message, given, tmp_path, monkeypatch):
    (tmp_path / "quire.toml").write_text(f'{name} = "none"\n')
    monkeypatch.chdir(tmp_path)
    flags = {name: "none"} if given == "flag" else {"config": "quire.toml"}
    with pytest.raises(SettingsError, match=message):
        describe_service(flags, {}, HOME)


def test_a_hub_name_stays_a_name():
    assert settings_of(describe_service({"model": "org/name"}, {}, HOME)).model == "org/name"


def test_the_manager_waits_longer_than_the_drain(tmp_path):
    config = tmp_path / "quire.toml"
    config.write_text("drain_timeout = 100\n")
    for flags in ({"config": str(config)}, {"drain_timeout": "100"}):
        service = describe_service(flags, {}, HOME)
        assert service.stop_timeout > 100
        # A later change of the file does not make the drain outlast the manager's patience.
        config.write_text("drain_timeout = 5000\n")
        assert settings_of(service).drain_timeout == 100
        config.write_text("drain_timeout = 100\n")


def test_only_harmless_variables_are_passed_on():
    environ = {
        "HF_HOME": "/models",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_secret",
        "QUIRE_PORT": "9000",
        "LD_PRELOAD": "x",
    }
    service = describe_service({}, environ, HOME)
    assert set(service.environment) == {"PATH", "PYTHONUNBUFFERED", "HF_HOME", "HF_HUB_OFFLINE"}
    assert settings_of(service).port == 8000


def test_control_characters_are_refused():
    with pytest.raises(SettingsError, match="control characters"):
        describe_service({"served_model_name": "a\nExecStart=b"}, {}, HOME)


def test_the_command_runs_in_the_bare_environment_of_a_service(tmp_path):
    missing = tmp_path / "no model & <here>"
    missing.mkdir()
    service = describe_service({"model": str(missing), "port": "1"}, {}, tmp_path)
    missing.rmdir()
    command = [word if word != "1" else "0" for word in service.command]
    result = subprocess.run(
        command,
        env=dict(service.environment),
        cwd=service.working_directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2  # which no service manager tries again
    assert result.stderr.startswith(f"quire: error: {missing}: no such folder")


def test_a_model_that_is_not_there_is_not_installed(tmp_path):
    with pytest.raises(SettingsError, match="no such folder"):
        describe_service({"model": str(tmp_path / "none")}, {}, tmp_path)
    with pytest.raises(SettingsError, match=r"models\.b: .*no such folder"):
        describe_service({"models": "a=owner/name,b=./none"}, {}, tmp_path)
    describe_service({"model": "owner/name"}, {}, tmp_path)
    describe_service({"model": "quire-demo"}, {}, tmp_path)


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_keys_are_not_written_where_everybody_can_read(name, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="--api-key-file"):
        describe_service({name: "sk-secret"}, {}, tmp_path)
    monkeypatched = describe_service({}, {f"QUIRE_{name.upper()}": "sk-secret"}, tmp_path)
    assert "sk-secret" not in repr(monkeypatched)
    (tmp_path / "keys.toml").touch()
    monkeypatch.chdir(tmp_path)
    keys = describe_service({"api_key_file": "keys.toml"}, {}, tmp_path).arguments
    assert Path(keys[keys.index("--api-key-file") + 1]).is_absolute()


def test_a_path_that_homebrew_removes_is_not_written_down(tmp_path):
    lasting = tmp_path / "opt" / "quire" / "bin" / "python"
    versioned = str(tmp_path / "Cellar" / "quire" / "0.1.0" / "bin" / "python")
    assert lasting_path(versioned) == versioned  # nothing lasting is there
    lasting.parent.mkdir(parents=True)
    lasting.touch()
    assert lasting_path(versioned) == str(lasting)
    assert lasting_path("/usr/bin/python3") == "/usr/bin/python3"
