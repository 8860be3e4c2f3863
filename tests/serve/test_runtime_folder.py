"""Workers' temporary files: nobody else can put anything there, and none are left for ever."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from quire.serve.runtime_folder import make_worker_folder, remove_leftovers


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_mlx_compiled_is_found_again_by_the_next_worker(temporary):
    first, second = make_worker_folder(), make_worker_folder()
    (first / "mlx" / "library.so").write_text("x")
    assert (second / "mlx" / "library.so").read_text() == "x"
    assert (first / "mlx").resolve().stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_enter_is_not_used(temporary):
    taken = temporary / f"quire-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    folder = make_worker_folder()
    assert not folder.is_relative_to(taken)
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert list(taken.iterdir()) == []


def test_a_link_in_its_place_is_not_followed(temporary):
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (temporary / f"quire-{os.getuid()}").symlink_to(elsewhere)
    assert not make_worker_folder().resolve().is_relative_to(elsewhere)
    assert list(elsewhere.iterdir()) == []


def test_leftovers_of_ended_processes_go_and_others_stay(temporary):
    own = make_worker_folder()
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = own.parent / f"{ended.pid}-abcdef"
    left.mkdir()
    (left / "requests").write_text("")
    remove_leftovers()
    assert not left.exists()
    assert own.exists()
    assert (own.parent / "mlx").exists()
