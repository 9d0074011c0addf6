"""benchmarks/device.py: a part that fails costs itself alone, and the next call measures what is missing."""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import common, device, wheels
from tests.helpers.runs import wait_for


def good(tiny: bool) -> device.Found:
    return {"tiny": tiny, "cache": os.path.isdir(os.environ["TRITON_CACHE_DIR"])}


def bad(tiny: bool) -> device.Found:
    raise RuntimeError("the kernel\nwas refused")


def dead(tiny: bool) -> device.Found:
    os._exit(7)


def slow(tiny: bool) -> device.Found:
    time.sleep(60)
    return {}


def parent(tiny: bool) -> device.Found:
    return {"child": subprocess.Popen(["sleep", "300"]).pid}


@pytest.mark.wide
def test_a_part_leaves_no_process_behind():
    """Ranks of a part that took too long kept the device's memory."""
    child = Path("/proc", str(device.alone(device.Part("parent", 100, parent), tiny=True)["child"]), "stat")
    wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z", seconds=10)


@pytest.mark.wide
def test_a_part_costs_itself_alone(tmp_path, monkeypatch, capsys):
    parts = [device.Part(part.__name__, 2 if part is slow else 50, part) for part in (good, bad, dead, slow)]
    monkeypatch.setattr(device, "PARTS", tuple(parts))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for _ in range(2):
        device.main(argparse.Namespace(tiny=True), "")
    lines = [json.loads(line) for line in (tmp_path / "device_tiny.jsonl").read_text().splitlines()]
    assert not (tmp_path / "device.jsonl").exists()  # or a device's parts would count as measured
    assert [line["part"] for line in lines] == ["good", "bad", "dead", "slow", "bad", "dead", "slow"]
    assert lines[0]["tiny"] and lines[0]["cache"]
    assert lines[1]["error"] == "RuntimeError: the kernel was refused"
    assert lines[2]["error"] == "ended with exit code 7"
    assert lines[3]["error"] == "took more than 2 s" and lines[3]["seconds"] < 20
    assert "error: RuntimeError: the kernel was refused" in capsys.readouterr().out


def test_the_parts_fit_in_two_calls_of_ten_minutes():
    seconds = [part.seconds for part in device.PARTS]
    assert sum(seconds) <= 15 * 60 and max(seconds) <= 2 * 60


def test_wheels_are_what_the_machine_lacks():
    found = set(wheels.needed({"torch", "triton", "mlflow", "numpy"}))
    assert {"deepspeed", "megatron-core", "pydantic", "pydantic-core", "webdataset", "fla-core"} <= found
    assert not found & {"torch", "sympy", "mlflow", "flask", "pytest", "kubernetes", "transformers"}


def test_a_machine_without_torch_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "have.txt").write_text("numpy 2.3.1\ntriton==3.6.0\n")
    monkeypatch.setattr("sys.argv", ["wheels", str(tmp_path / "to"), "--have", str(tmp_path / "have.txt")])
    with pytest.raises(SystemExit, match="have.txt: torch is not there and cannot travel"):
        wheels.main()
    assert not (tmp_path / "to").exists()
