"""Key files: what they may say, that they can change, and the command that makes keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from quire.serve import api_keys, cli
from quire.serve.api_keys import ApiKey, Keyring, hash_key, make_keyring
from quire.serve.settings import SettingsError


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "keys.toml"


def table(name: str, key: str, more: str = "") -> str:
    return f'[{name}]\nsha256 = "{hash_key(key)}"\n{more}\n'


def test_each_key_is_its_owners(file):
    file.write_text(table("alice", "a") + table("bob", "b", "admin = true"))
    keyring = Keyring({}, file)
    assert keyring.identify("a").key.name == "alice"
    assert keyring.identify("b").key.admin
    for wrong in ("", "c", hash_key("a"), "A", "a "):
        assert keyring.identify(wrong) is None


def test_all_digests_are_compared_whatever_is_presented(monkeypatch):
    """The time of an answer must not tell how much of a key, or which key, was right."""
    compared = []

    def compare(left: str, right: str) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    keys = {name: ApiKey(sha256=hash_key(name), name=name) for name in "abc"}
    keyring = Keyring(keys)
    for presented in ("a", "c", "none"):
        compared.clear()
        keyring.identify(presented)
        assert compared == [key.sha256 for key in keys.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a", "not valid TOML"),
        ("a = 1", r"\[a\]"),
        ("[a]", "sha256"),
        ('[a]\nsha256 = "abc"', "64 hexadecimal digits"),
        (table("a", "a", "admin = 1"), r"\[a\].*bool"),
        (table("a", "a", "requests_per_minute = 0.5"), "at least 1"),
        (table("a", "a", "concurrency = 0"), "at least 1"),
        (table("a", "a", "queue_share = 1.5"), "at most 1"),
        (table("a", "a", "share = 1"), "share"),
        (table('"a b"', "a"), "letters, digits"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(text, message, file):
    file.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        Keyring({}, file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused(file):
    with pytest.raises(SettingsError, match="No such file"):
        Keyring({}, file)


def test_a_changed_file_counts_at_once_and_a_broken_one_does_not(file, monkeypatch):
    monkeypatch.setattr(api_keys, "_LOOK_EVERY", 0.0)
    file.write_text(table("alice", "a") + table("bob", "b"))
    keyring = Keyring({}, file)
    alice = keyring.identify("a")
    alice.running = 3
    file.write_text(table("alice", "a"))
    os.utime(file, ns=(1, 1))
    assert keyring.identify("b") is None
    assert keyring.identify("a") is alice  # what she uses stays counted
    file.write_text("[broken")
    os.utime(file, ns=(2, 2))
    assert keyring.identify("a") is alice


def test_a_key_is_given_once_and_can_be_sent(file):
    file.write_text(f'[admin]\nsha256 = "{hash_key("sk-1")}"\n')
    with pytest.raises(SettingsError, match="admin is given in a file and as a setting"):
        make_keyring(None, "sk-2", str(file))
    with pytest.raises(SettingsError, match="--api-key must be ASCII"):
        make_keyring("schlüssel", None, None)


def test_nothing_asks_for_keys_unless_told_to():
    assert make_keyring(None, None, None) is None
    keyring = make_keyring("user", "boss", None)
    assert not keyring.identify("user").key.admin
    assert keyring.identify("boss").key.admin


def test_prompts_of_two_keys_are_cached_apart_unless_shared():
    keys = [ApiKey(sha256=hash_key(name), name=name) for name in "ab"]
    assert keys[0].cache_salt != keys[1].cache_salt
    shared = [ApiKey(sha256=hash_key(name), name=name, shared_cache=True) for name in "ab"]
    assert shared[0].cache_salt == shared[1].cache_salt


def test_the_command_shows_a_key_once_and_keeps_its_hash(file, capsys):
    for name, *flags in (("alice",), ("bob@host", "--admin")):
        assert cli.main(["keys", name, "--file", str(file), *flags]) == 0
        key = capsys.readouterr().out.strip()
        assert key not in file.read_text()
        found = Keyring({}, file).identify(key).key
        assert (found.name, found.admin) == (name, bool(flags))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["alice", "a b", 'x"]\n[y'])
def test_the_command_leaves_the_file_alone_when_it_cannot_add(name, file, capsys):
    assert cli.main(["keys", "alice", "--file", str(file)]) == 0
    before = file.read_text()
    assert cli.main(["keys", name, "--file", str(file)]) == 2
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
