"""What a run's numbers depend on beside its recipe: machine, versions, commit. Nothing that names the machine or its folders."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository, where this is one
CODE = ("launch", "model", "parallel", "train")
IMAGE_COMMIT = Path(__file__).with_name("commit.json")  # what `commit` found when this code was put into an image


def origin() -> dict:
    """Date, commit and machine, as a run keeps them in origin.json."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", **commit(), "machine": machine()}


def machine() -> dict:
    import torch  # late: reports read an origin without it

    return {
        "cpu": _cpu_model(),
        "cores": len(_usable_cores()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str]:
    """Of what a checkpoint's numbers depend on."""
    packages = ("powernap", "torch", "megatron-core", "deepspeed", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": commit()["commit"],
    }


def code_changes(paths: Sequence[str] = CODE) -> str:
    """What `paths` have that the commit has not, as a patch that `git apply` takes; new files too. Of an image, nothing."""
    if IMAGE_COMMIT.is_file() or not commit(paths)["uncommitted_changes"]:
        return ""
    new = _git("ls-files", "--others", "--exclude-standard", "--", *paths).splitlines()
    # Of a file and nothing, which git calls a difference by its exit code.
    added = [_git("diff", "--binary", "--no-index", "/dev/null", path, differs=True) for path in new]
    return "".join([_git("diff", "--binary", "HEAD", "--", *paths), *added])


def commit(paths: Sequence[str] = CODE) -> dict:
    """The commit of this code and whether `paths` differ from it; "unknown" where it is no checkout and no image."""
    if IMAGE_COMMIT.is_file():
        return json.loads(IMAGE_COMMIT.read_text())
    # Installed, the code may lie in somebody else's checkout.
    ours = _git("ls-files", "--error-unmatch", "--", "train/origin.py") is not None
    found = _git("rev-parse", "HEAD") if ours else None
    return {
        "commit": found.strip() if found else "unknown",
        "uncommitted_changes": bool(found and _git("status", "--porcelain", "--", *paths)),
    }


def _git(*arguments: str, differs: bool = False) -> str | None:
    """What git prints; None from an unpacked archive, or where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == differs else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _usable_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
