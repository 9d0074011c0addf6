"""Where code comes from: what git would not say, or say only in part, is in the patch or named there; wheels know it too."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from powernap.train.run import provenance

REPOSITORY = Path(__file__).resolve().parents[3]
USER = ("-c", "user.name=n", "-c", "user.email=e", "-c", "protocol.file.allow=always")


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *USER, *arguments], cwd=where, check=True, capture_output=True)
    return done.stdout.decode(errors="replace").strip()


def repository(path: Path, *files: str) -> Path:
    """With one commit of `files`."""
    path.mkdir(parents=True)
    git(path, "init", "--quiet")
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("before\n")
    git(path, "add", ".")
    git(path, "commit", "--quiet", "--message", "first")
    return path


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A checkout that `provenance` takes for its own."""
    monkeypatch.setattr(provenance, "IMAGE_COMMIT", tmp_path / "none")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "code")
    return repository(tmp_path / "code", "train/run/provenance.py")


def notes(patch: bytes) -> str:
    return "\n".join(line for line in patch.decode(errors="replace").splitlines() if line.startswith("# "))


def applied(code: Path, patch: bytes, *clone: str) -> Path:
    """A fresh clone with the patch."""
    again = code.parent / "again"
    git(code.parent, "clone", "--quiet", *clone, str(code), str(again))
    (code.parent / "patch").write_bytes(patch)
    git(again, "apply", str(code.parent / "patch"))
    return again


def test_a_repository_inside_is_in_the_patch_with_its_name_and_commit(code):
    nested = repository(code / "train/nested", "a.py", "deep/b.py")
    repository(nested / "deeper", "c.py")
    (nested / "a.py").write_text("after\n")
    (nested / "new.py").write_text("new\n")
    assert provenance.commit()["uncommitted_changes"]
    patch = provenance.code_changes()
    assert f"train/nested/, a git repository of its own at {git(nested, 'rev-parse', 'HEAD')}" in notes(patch)
    again = applied(code, patch)
    for name in ("a.py", "deep/b.py", "new.py", "deeper/c.py"):
        assert (again / "train/nested" / name).read_text() == (nested / name).read_text()


def test_what_a_submodule_has_is_in_the_patch(code, tmp_path):
    source = repository(tmp_path / "source", "a.py")
    git(code, "submodule", "add", "--quiet", str(source), "train/module")
    git(code, "commit", "--quiet", "--message", "module")
    assert provenance.code_changes() == b""
    (code / "train/module/a.py").write_text("after\n")
    (code / "train/module/new.py").write_text("new\n")
    again = applied(code, provenance.code_changes(), "-c", "protocol.file.allow=always", "--recurse-submodules")
    for name in ("a.py", "new.py"):
        assert (again / "train/module" / name).read_text() == (code / "train/module" / name).read_text()


def test_odd_files_and_a_user_s_settings_do_not_change_the_patch(code):
    files = {
        "crlf.py": b"a\r\nb\r\n",
        "latin.py": b"\xe4\n",
        "\xfc b.py": b"x\n",
        "empty.py": b"",
        "bin.so": bytes(range(256)),
    }
    for name, content in files.items():
        (code / "train" / name).write_bytes(content)
    (code / "train/run/provenance.py").write_bytes(b"\xe4 after\r\n")
    for setting, value in {
        "color.ui": "always", "diff.noprefix": "true", "status.showUntrackedFiles": "no", "diff.external": "false",
    }.items():  # fmt: skip
        git(code, "config", setting, value)
    again = applied(code, provenance.code_changes())
    for name, content in (files | {"run/provenance.py": b"\xe4 after\r\n"}).items():
        assert (again / "train" / name).read_bytes() == content, name


def test_what_is_not_in_the_patch_is_named(code, monkeypatch):
    monkeypatch.setattr(provenance, "LARGEST", 1000)
    (code / "train/weights.bin").write_bytes(bytes(2000))
    (code / "train/mine.py").write_text("x\n")
    (code / ".git/info/exclude").write_text("mine.py\n")
    said = notes(provenance.code_changes())
    assert (
        "Not in this patch: train/weights.bin: " in said and "Not in this patch: train/mine.py: ignored by git" in said
    )


def test_a_checkout_of_another_user_and_git_s_variables_in_a_hook(code, tmp_path, monkeypatch):
    head = git(code, "rev-parse", "HEAD")
    other = repository(tmp_path / "other", "train/run/provenance.py", "more.py")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests of "dubious ownership" use it
    assert provenance.commit() == {"commit": head, "uncommitted_changes": False}
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert provenance.commit()["commit"] == head


def test_no_commit_is_given_a_reason(code, monkeypatch, tmp_path):
    shutil.rmtree(code / ".git")
    assert provenance.commit() == {"commit": "unknown", "uncommitted_changes": False, "reason": "no git repository"}
    git(code, "init", "--quiet")
    assert "does not have this code" in provenance.commit()["reason"]
    git(code, "add", ".")
    assert provenance.commit()["reason"] == "the repository has no commit yet"
    assert b"train/run/provenance.py" in provenance.code_changes()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit()["reason"] == "git is not installed"
    assert provenance.code_changes() == b""


def built(source: Path, what: str) -> Path:
    """A wheel or an sdist of `source`, by its own build backend."""
    out = source.parent / f"{source.name}-{what}"
    out.mkdir(exist_ok=True)
    build = f"import setuptools.build_meta as b; b.build_{what}({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


def test_wheels_and_archives_know_their_commit(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in provenance.CODE:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "commit.json"))
    git(source, "init", "--quiet")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "first")
    commit = {"commit": git(source, "rev-parse", "HEAD"), "uncommitted_changes": False}

    gone = source / "build" / "lib" / "powernap" / "gone.py"  # left by an earlier build
    gone.parent.mkdir(parents=True)
    gone.touch()
    installed = tmp_path / "installed"
    with zipfile.ZipFile(built(source, "wheel")) as wheel:
        assert json.loads(wheel.read("powernap/train/run/commit.json")) == commit
        assert "powernap/py.typed" in wheel.namelist() and "powernap/gone.py" not in wheel.namelist()
        wheel.extractall(installed)
    said = subprocess.check_output(
        [sys.executable, "-m", "powernap.launch.cli", "--version"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, text=True,
    )  # fmt: skip
    assert said.endswith(f"commit {commit['commit']}\n") and said.startswith("powernap 0.")

    (source / "train/new.py").write_text("")
    with tarfile.open(built(source, "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(built(unpacked, "wheel")) as wheel:
        assert json.loads(wheel.read("powernap/train/run/commit.json")) == commit | {"uncommitted_changes": True}
    assert not (source / "train/run/commit.json").exists()
