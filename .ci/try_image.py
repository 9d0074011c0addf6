"""Runs the image as a cluster would: process 1 of its own, no root, a root file system that cannot be written.

usage: python3 .ci/try_image.py IMAGE, as root, for an image that buildah holds (.ci/build-image makes one).

It takes namespaces of the kernel and no container runtime, which may not work inside of a container.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Quick ones, of torch, Megatron-core and DeepSpeed; the runs reach WebDataset and MLflow.
TESTS = ("tests/model/mixers/test_delta_rule.py", "tests/parallel/test_zero.py", "tests/train/run/test_signals.py")
# The first process of the namespace makes the container's mounts and becomes the image's entry point.
ENTER = """
root=$1 workspace=$2 tests=$3 user=$4; shift 4
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --bind "$workspace" "$root/workspace"
mount --bind "$tests" "$root/mnt"
mount -o remount,bind,ro "$root/mnt"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" "$root" env --ignore-environment --chdir=/workspace "$@"
"""


class Container:
    """An image's file system, and a folder that is /workspace inside."""

    def __init__(self, image: str, root: str, workspace: Path, tests: Path) -> None:
        config = json.loads(output("buildah", "inspect", "--type", "image", image))["OCIv1"]["config"]
        self.root, self.workspace, self._tests = root, workspace, tests
        self._environment = [*config["Env"], "OMP_NUM_THREADS=1"]
        self._entry_point, self._user = config["Entrypoint"], config["User"]
        self._started: list[subprocess.Popen] = []

    def start(self, *command: str, user: str = "", **options) -> subprocess.Popen:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", ENTER, "sh", self.root,
             str(self.workspace), str(self._tests), user or self._user, *self._environment, *self._entry_point, *command],
            text=True, **options,
        )  # fmt: skip
        self._started.append(process)
        return process

    def end(self) -> None:
        """Whatever still runs; with its first process ends a namespace."""
        for process in self._started:
            process.kill()
            process.wait()

    def run(self, *command: str, expected: int = 0, user: str = "") -> str:
        """What the command printed; its exit code must be `expected`."""
        started = time.monotonic()
        process = self.start(*command, user=user, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed, _ = process.communicate(timeout=180)
        print(
            f"{time.monotonic() - started:6.1f} s  exit code {process.returncode}  {' '.join(command)[:90]}", flush=True
        )
        if process.returncode != expected:
            raise SystemExit(f"exit code {expected} expected:\n{printed}")
        return printed

    def health(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        """What the health check says, run as Docker and Kubernetes do: one more process inside."""
        inside = ["nsenter", f"--target={first_process(process)}", "--mount", "--pid", "chroot", "--userspec=1000:1000"]
        command = [*inside, self.root, "powernap-health"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def first_process(process: subprocess.Popen) -> int:
    """Process 1 of the container, by its number outside."""
    return children(process.pid)[0]


def ranks(process: subprocess.Popen) -> list[int]:
    """tini, powernap, and below it the ranks."""
    return sorted(children(children(first_process(process))[0]))


def wait_for_steps(metrics: Path, steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, f"{metrics}: no {steps} steps"
        time.sleep(0.1)


def leftovers(root: Path) -> list[str]:
    """What a build may leave in an image: caches, sources, and where its packages came from."""
    found = [*root.glob("root/.cache"), *root.glob("source"), *root.glob("tmp/*"), *root.glob("var/lib/apt/lists/*")]
    found += [*root.glob("var/cache/apt/archives/*.deb"), *root.glob("opt/powernap/lib/python*/site-packages/build")]
    found += [path for path in root.glob("etc/pip.conf") if path.stat().st_size]
    return [str(path.relative_to(root)) for path in found]


def check(container: Container, commit: str) -> None:
    assert "usage: powernap" in container.run("powernap", "--help")
    assert "no program 'pwernap'" in container.run("pwernap", "train", expected=2)
    assert "nowhere" in container.run("powernap", "train", "nowhere.yaml", expected=2)
    written = container.run(
        "sh", "-c", "id -u; touch /written || touch /home/powernap/written; cat /etc/pip.conf", expected=1
    )
    assert written.startswith("1000\n") and written.count("Read-only file system") == 2 and "index" not in written
    assert not leftovers(Path(container.root)), leftovers(Path(container.root))

    container.run("powernap", "data", "build", "depo", "data", "nodes=8", "max_hop=4", "queries=18", "names=ends",
                  "--train-samples", "256", "--test-samples", "64")  # fmt: skip
    recipe = ("powernap", "train", "demo", "data.train=data/train-*.tar", "data.test=data/test-*.tar",
              "evaluation.samples=16", "train.global_batch_size=8", "optimizer.warmup_steps=2")  # fmt: skip
    container.run(*recipe, "train.steps=6", "run.name=two", "parallel.data=2")
    # OpenShift chooses such users.
    container.run(*recipe, "train.steps=6", "run.root=alone", "parallel.data=1", user="12345:0")
    origin = json.loads((container.workspace / "runs/two/origin.json").read_text())
    assert origin["commit"] == commit, origin
    assert (container.workspace / "runs/mlflow.db").is_file()

    long = (*recipe, "run.name=long", "train.steps=100000", "parallel.data=2", "checkpoint.every=50000")
    metrics = container.workspace / "runs/long/metrics.jsonl"

    process = container.start(*long)
    wait_for_steps(metrics, 5, process)
    healthy = container.health(process)
    assert healthy.returncode == 0 and healthy.stdout.count("rank") == 2, healthy
    stopped = ranks(process)
    for rank in stopped:
        os.kill(rank, signal.SIGSTOP)
    for file in Path(f"/proc/{first_process(process)}/root/tmp/powernap-heartbeats").iterdir():
        os.utime(file, (time.time() - 400,) * 2)
    unwell = container.health(process)
    assert unwell.returncode == 1 and "s ago" in unwell.stdout, unwell
    for rank in stopped:
        os.kill(rank, signal.SIGCONT)
    os.kill(first_process(process), signal.SIGTERM)
    assert process.wait(60) == 75, process.returncode
    steps = metrics.read_text().count("\n")
    assert [path.name for path in (container.workspace / "runs/long/checkpoints").iterdir()] == [f"step_{steps:08d}"]
    print(
        f"SIGTERM to process 1: exit code 75, checkpoint after step {steps}; {healthy.stdout.splitlines()}", flush=True
    )

    process = container.start(*long, "--resume")
    wait_for_steps(metrics, steps + 5, process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL, process.returncode
    print("SIGKILL to a rank: exit code 137", flush=True)

    process = container.start("sh", "-c", "kill -9 $$")
    assert process.wait(60) == 128 + signal.SIGKILL, process.returncode
    environment = ("env", "PYTHONDONTWRITEBYTECODE=1", "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    printed = container.run("sh", "-c", 'cd /mnt && exec "$@"', "sh", *environment, *TESTS)
    print(printed.splitlines()[-1])


def main(image: str) -> None:
    folder = Path(tempfile.mkdtemp())
    workspace, tests = folder / "workspace", folder / "tests"
    workspace.mkdir()
    for name in ("tests", "benchmarks"):
        shutil.copytree(REPOSITORY / name, tests / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(REPOSITORY / "pyproject.toml", tests)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    workspace.chmod(0o777)
    mounted = output("buildah", "from", "--pull-never", image)
    container = Container(image, output("buildah", "mount", mounted), workspace, tests)
    try:
        check(container, output("git", "rev-parse", "HEAD"))
    finally:
        container.end()
        output("buildah", "rm", mounted)
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main(sys.argv[1])
