"""A user without a home runs every command; nobody else's folder becomes one."""

import os
from pathlib import Path

import pytest

from powernap.launch import cli
from powernap.train.home import HomeError, provide_home
from powernap.train.paths import PathError, cache_folder, expand


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """No HOME, and a number for which the password file has no entry."""
    monkeypatch.setenv("HOME", "")  # undone at the end, whatever provide_home sets
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"powernap-{os.getuid()}"


def test_a_home_is_provided_for_libraries_and_not_for_paths(homeless):
    assert cache_folder() == homeless / ".cache" / "powernap"
    provide_home()
    assert Path.home() == homeless and homeless.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == homeless / ".cache" / "powernap"
    with pytest.raises(PathError, match="HOME is not set"):
        expand("~/runs")


def test_a_home_that_is_there_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    provide_home()
    assert os.environ["HOME"] == str(tmp_path) and not list(tmp_path.iterdir())


def test_another_users_folder_is_refused(homeless, monkeypatch):
    homeless.mkdir()
    mine = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: mine + 1)
    homeless.rename(homeless.with_name(f"powernap-{mine + 1}"))
    with pytest.raises(HomeError, match="is another user's: set HOME"):
        provide_home()
    assert "HOME" not in os.environ


def test_a_command_says_so_in_one_line(homeless, capsys):
    homeless.write_text("")
    assert cli.main(["recipe", "list"]) == 2
    assert f"HOME is not set, and {homeless} cannot be made (File exists): set HOME" in capsys.readouterr().err
