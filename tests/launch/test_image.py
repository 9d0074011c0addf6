"""The image's files, read by tools that know their traps, and what its scripts do outside of it. `make test-image` builds it."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from powernap.parallel.liveness import heartbeat
from powernap.parallel.liveness.watchdog import Progress
from powernap.train.run import provenance

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
SCRIPTS = [
    path
    for folder in (DOCKER, REPOSITORY / ".ci")
    for path in sorted(folder.iterdir())
    if path.is_file() and path.read_bytes().startswith(b"#!/bin/sh")
]


def run(*command: object, **options) -> subprocess.CompletedProcess:
    # Programs that pip installed lie beside Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(str(command[0]), path=path)
    assert program, f"{command[0]} is missing: install the extra 'test'"
    return subprocess.run([program, *map(str, command[1:])], capture_output=True, text=True, **options)


def test_the_dockerfile_has_none_of_the_known_mistakes(tmp_path):
    result = run("hadolint", DOCKER / "Dockerfile")
    assert result.returncode == 0, result.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text((DOCKER / "Dockerfile").read_text().replace("USER 1000:1000", "USER root"))
    assert "DL3002" in run("hadolint", broken).stdout


@pytest.mark.skipif(platform.machine() == "aarch64", reason="no package of shellcheck for it")
def test_the_shell_scripts_have_none_of_the_known_mistakes(tmp_path):
    assert len(SCRIPTS) >= 6
    result = run("shellcheck", *SCRIPTS)
    assert result.returncode == 0, result.stdout
    broken = tmp_path / "broken"
    broken.write_text((DOCKER / "powernap-entry").read_text().replace('exec "$@"', "exec $@"))
    assert "SC2068" in run("shellcheck", broken).stdout


def test_the_commit_of_an_image_is_the_one_it_was_built_from(tmp_path, monkeypatch):
    built = {"commit": "abc", "uncommitted_changes": True}
    assert provenance.commit() != built
    (tmp_path / "commit.json").write_text(json.dumps(built))
    monkeypatch.setattr(provenance, "IMAGE_COMMIT", tmp_path / "commit.json")
    assert provenance.commit() == built and b"uncommitted changes" in provenance.code_changes()


@pytest.mark.parametrize(
    ("base_torch", "extras", "wanted", "torch"),
    [
        ("2.13.0+cu130", "cuda, text", "fla-core", "torch==2.13.0+cu130"),
        (None, "text,test", "pytest", "torch==2.13.0"),
    ],
)
def test_a_base_keeps_its_torch(tmp_path, base_torch, extras, wanted, torch):
    for file in (DOCKER / "requirements.py", REPOSITORY / "pyproject.toml", REPOSITORY / "constraints.txt"):
        shutil.copy(file, tmp_path)
    if base_torch:
        metadata = tmp_path / f"torch-{base_torch}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Name: torch\nVersion: {base_torch}\n")
    # -S: without what this environment has installed
    subprocess.run([sys.executable, "-S", "requirements.py", extras], cwd=tmp_path, check=True)
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert any(line.startswith(wanted) for line in lines) and any(line.startswith("torch>=") for line in lines)
    pins = (tmp_path / "pinned.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == [torch]


def test_an_unknown_extra_is_named(tmp_path):
    for file in (DOCKER / "requirements.py", REPOSITORY / "pyproject.toml", REPOSITORY / "constraints.txt"):
        shutil.copy(file, tmp_path)
    result = run(sys.executable, "requirements.py", "cuda,texts", cwd=tmp_path)
    assert result.returncode == 1 and "no extra 'texts': there are cuda, text, " in result.stderr


def test_the_builder_names_what_is_missing(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    for builder in ("", "dokcer"):
        result = run("sh", DOCKER / "build", env={"PATH": str(tmp_path), "BUILDER": builder})
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith("make image: neither docker") and builder in result.stderr


def test_the_entry_point_becomes_the_program(tmp_path):
    """With its process id, so that signals reach it, and with a HOME that it can write to."""
    code = "import os, sys; print(os.getpid(), os.environ['HOME']); sys.exit(75)"
    environment = {**os.environ, "HOME": "/nowhere", "TMPDIR": str(tmp_path)}
    command = [DOCKER / "powernap-entry", sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate(timeout=20)
    pid, home = printed.split()
    assert process.returncode == 75 and int(pid) == process.pid
    assert Path(home).parent == tmp_path and os.access(home, os.W_OK)
    unknown = run("sh", DOCKER / "powernap-entry", "pwernap")
    assert unknown.returncode == 2 and "no program 'pwernap'" in unknown.stderr


def health(folder: Path) -> subprocess.CompletedProcess:
    return run("sh", DOCKER / "powernap-health", env={**os.environ, heartbeat.FOLDER: str(folder)}, timeout=5)


def test_health_asks_whether_a_rank_runs_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.05)
    monkeypatch.setenv(heartbeat.FOLDER, str(tmp_path))
    assert health(tmp_path).returncode == 0  # no run
    progress = Progress()
    with heartbeat.beating(progress, rank=3):
        progress.step = 7
        file = tmp_path / str(os.getpid())
        deadline = time.monotonic() + 5
        while not (file.exists() and "step 7" in file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        well = health(tmp_path)
        assert well.returncode == 0 and well.stdout.startswith("rank 3: step 7, "), well
    assert not file.exists()

    stopped = tmp_path / str(os.getpid())  # as if this process had not run for long
    stopped.write_text("rank 3: step 7\n")
    os.utime(stopped, (time.time() - 310,) * 2)
    assert health(tmp_path).returncode == 1
    ended = stopped.rename(tmp_path / "4194305")  # above the highest process id
    assert ended.exists() and health(tmp_path).returncode == 0
