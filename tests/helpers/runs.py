"""Real runs for tests: small shards, a small recipe, the command in processes of its own."""

import gc
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil
import torch
import yaml

from powernap.launch import cli
from powernap.parallel.topology import Topology
from powernap.train import trainer
from powernap.train.data.build import build_task
from powernap.train.run.folder import RunFolder
from powernap.train.tasks import TASKS
from tests.helpers import warm
from tests.helpers.processes import in_processes

RECIPE = {
    "run": {"name": "tiny"},
    "model": {
        "pattern": "AG", "window": 12, "vocab_size": 15, "pad_token_id": 0, "hidden_size": 32,
        "mlp": {"ffn_hidden_size": 64}, "attention": {"heads": 2},
        "gdn": {"heads": 2, "key_dim": 16, "value_dim": 16, "conv_kernel": 2},
    },
    "sleep": {"passes": 2},
    "data": {"train": "data/train-*.tar", "test": "data/test-*.tar", "sequence_length": 24, "lanes": 2},
    # Recomputing takes a third of a step's time.
    "train": {"steps": 10, "global_batch_size": 16, "log_every": 5, "recompute": "none"}, "checkpoint": {"every": 5},
    # With the usual eps, a gradient that is only rounding becomes a step of full size.
    "optimizer": {"lr": 5.0e-3, "eps": 1.0e-6, "warmup_steps": 2, "clip": 0.5},
    "evaluation": {"samples": 64},
}  # fmt: skip


def prepare(
    folder: Path, train_samples: int = 256, seed: int = 0, max_hop: int = 2, database: bool = True, **sections: dict
) -> Path:
    """Shards of 6-node cycles in folder/data and a recipe folder/tiny.yaml, RECIPE with `sections` changed.

    database: an empty one for MLflow in folder/runs, too; otherwise the first run makes it.
    """
    task = TASKS["depo"](nodes=6, max_hop=max_hop, queries=4, names="ends")
    build_task(
        "depo",
        task,
        folder / "data",
        train_samples=train_samples,
        test_samples=64,
        samples_per_shard=64,
        seed=seed,
        workers=1,
    )
    if database:
        (folder / "runs").mkdir()
        shutil.copyfile(empty_database(), folder / "runs" / "mlflow.db")
    recipe = {name: {**RECIPE.get(name, {}), **sections.get(name, {})} for name in RECIPE | sections}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def empty_database() -> Path:
    """An MLflow database to copy: making one takes a CPU second, and seconds of waiting for the disk."""
    from powernap.train.tracking.database import prepare_database
    from powernap.train.tracking.delivery import prepare_mlflow

    prepare_mlflow()
    path = Path(warm.begin_session()) / "mlflow.db"
    prepare_database(path)
    return path


# In a process of its own.
COMMAND = [sys.executable, "-m", "powernap.launch.cli"]


def warm_command() -> list[str]:
    """The same, its libraries imported. Its processes are not children of the one started: see tests/helpers/warm.py."""
    return [warm.python(), *COMMAND[1:]]


def rank_of(argument: str, rank: int) -> psutil.Process:
    """The rank of a command with such an argument, whoever started it; of a warm one, the process that stands for it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(argument in one for one in process.cmdline()) and process.environ().get("RANK") == str(rank):
                return process
    raise LookupError(f"rank {rank} of {argument}")


def wait_for(condition, seconds: float = 90):
    """Wait until `condition` is true, for `seconds` at most, and return its value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def powernap(
    *arguments: str, cwd: Path, timeout: float = 300, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    """Run one command; a run that does not end in `timeout` seconds fails the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "", **environment}
    return subprocess.run(
        [python, *COMMAND[1:], *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def warm_powernap(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    """The same for commands that compute: they and the ranks they start have their libraries when they begin."""
    return powernap(*arguments, cwd=cwd, python=warm.python(), **options)


def train_in_turn(folder: Path, processes: int, runs: dict[str, list[str]], **environment: str) -> dict[str, Path]:
    """Train folder/tiny.yaml once for each of `runs`, name -> overrides; name -> the run's folder.

    The same processes join for one run after the other, since libraries take longer to import than a tiny run trains.
    """
    runs = {name: [f"run.name={name}", *overrides] for name, overrides in runs.items()}
    rendezvous_names = [uuid.uuid4().hex for _ in runs]
    in_processes(_train_in_turn, processes, processes, folder, list(runs.values()), rendezvous_names, environment)
    return {name: folder / "runs" / name for name in runs}


def _train_in_turn(rank, store, processes, folder, runs, rendezvous_names, environment):
    os.chdir(folder)
    for overrides, rendezvous_name in zip(runs, rendezvous_names, strict=True):
        os.environ.pop("MASTER_PORT", None)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "POWERNAP_RENDEZVOUS": rendezvous_name, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "", **environment,
        }  # fmt: skip
        assert cli.main(["train", "tiny.yaml", *overrides]) == 0, overrides
        gc.collect()  # cycles that hold process groups and their threads


def free_port() -> int:
    """A port for processes that will meet there later, drawn below the ephemeral ports."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The master weights in a run's newest checkpoint by name."""
    checkpoint = RunFolder(run).newest_checkpoint()
    return {name: checkpoint.whole(name) for name in checkpoint.parameters}


def write_drawn(run: RunFolder, topology: Topology) -> None:
    """Write a checkpoint of the recipe's initial weights."""
    recipe = run.recipe()
    stage, zero = trainer.build(recipe, topology)
    writer = trainer.checkpoint_writer(recipe, run, topology)
    writer.save(1, stage, zero, {"data": None})
    writer.finish()
    zero.engine.destroy()


@contextmanager
def seconds_of_commands_below(limit: float) -> Iterator[None]:
    """The commands run inside must take less CPU time than `limit`: wall time would depend on parallel tests."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < limit


def assert_refused(arguments: list[str], capfd, *words: str) -> None:
    """The command, run in this process, fails with a usage error of one line that holds all of `words`."""
    with mock.patch.dict(os.environ):  # a command on a single process records that there
        assert cli.main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("powernap: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """The command failed with an error of one line that holds all of `words`."""
    assert result.returncode != 0, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("powernap: error: ") or lines[0].startswith("powernap: rank "), lines[0]
    for word in words:
        assert word in lines[0], lines[0]
