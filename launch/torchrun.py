"""Processes on this machine: start the ones a layout needs, or recognise that torchrun or srun already did.

On several machines that one command each was started on, such as the pods of a Kubernetes job, torchrun's own variables
say which this one is: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil

from powernap.model.errors import PowernapError
from powernap.parallel import loopback
from powernap.parallel.liveness import exit_codes
from powernap.parallel.liveness.parent import not_to_outlive_this
from powernap.train.run.signals import is_ignored

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from powernap.train.run.signals import Signals

MEETING_SECONDS = 900  # for machines that start after each other, such as while one still fetches the image


# What ranks that srun started have in common, in the environment: parallel/rendezvous.py, which imports torch.
RENDEZVOUS = "POWERNAP_RENDEZVOUS"


class LaunchError(PowernapError):
    """A layout and the started processes do not fit, in one line."""


class MeetingError(LaunchError):
    """Machines did not find each other: starting them again may help."""

    exit_code = exit_codes.FAILED


def already_started() -> bool:
    """Whether torchrun or srun started this process as one of several; srun's variables are put in torchrun's terms.

    A batch script is one process whatever its job asked for: only srun, which sets SLURM_STEP_*, starts tasks.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if os.environ["WORLD_SIZE"] != "1" and not os.environ.get(name) and RENDEZVOUS not in os.environ:
                raise LaunchError(f"{name} is missing: with RANK and WORLD_SIZE set all ranks meet there")
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if "SLURM_PROCID" not in os.environ or tasks == 1:
        return False
    names = "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"
    environment = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split("(")[0].split(",")[0],
        "MASTER_ADDR": _first_node(),
        RENDEZVOUS: ".".join(os.environ.get(name, "0") for name in names),
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return True


def _first_node() -> str:
    """Where rank 0 of a step runs; srun itself may have been called elsewhere, such as on a login node."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1" or not nodes:
        return loopback.address()
    first = first_host(nodes)
    try:
        socket.getaddrinfo(first, None)
    except OSError:  # known to SLURM alone
        with suppress(OSError, subprocess.TimeoutExpired):
            command = ["scontrol", "show", "node", "-o", first]
            said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
            if found := re.search(r" NodeAddr=(\S+)", said):
                return found[1]
    return first


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: n[03-05,7],login -> n03"""
    first = re.match(r"(\[[^]]*\]|[^,[])*", nodes)
    assert first is not None  # it may be empty
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def check_world_size(wanted: int, layout: str) -> None:
    """Raise LaunchError unless as many processes were started as the recipe's layout needs."""
    started = int(os.environ["WORLD_SIZE"])
    if started != wanted:
        raise LaunchError(
            f"{layout} needs {wanted} processes, {started} were started: start {wanted}, or change the layout"
        )


def share_of_this_machine(world_size: int) -> int:
    """How many of the layout's processes run here: all, or an equal share where several machines were started.

    Raises:
        LaunchError: if the machines cannot meet or do not divide the layout.
    """
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if nodes != "1" and world_size > 1 and not os.environ.get("SLURM_STEP_NUM_TASKS"):
        raise LaunchError(
            f"this job has {nodes} nodes, and all {world_size} processes would run here: write srun powernap train"
        )
    machines = os.environ.get("PET_NNODES", "1")
    if not machines.isdigit() or not int(machines):
        raise LaunchError(f"PET_NNODES={machines}: write how many machines there are")
    if int(machines) > 1:
        rank = os.environ.get("PET_NODE_RANK", "")
        if not rank.isdigit() or int(rank) >= int(machines):
            raise LaunchError(f"PET_NODE_RANK={rank}: with PET_NNODES={machines} write 0 to {int(machines) - 1}")
        for name in ("PET_MASTER_ADDR", "PET_MASTER_PORT"):
            if not os.environ.get(name):
                raise LaunchError(f"{name} is missing: with PET_NNODES={machines} all machines meet there")
    processes, left = divmod(world_size, int(machines))
    if left:
        raise LaunchError(f"the layout's {world_size} processes do not share PET_NNODES={machines} machines")
    return processes


def run_alone() -> None:
    """Describe a world of one process, this one."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def start(arguments: list[str], world_size: int, signals: "Signals") -> int:
    """Run `powernap ARGUMENTS` in this machine's processes under torchrun; return the exit code of the first to fail.

    torchrun ends the others as soon as one fails. SIGTERM, SIGUSR1 and SIGHUP are passed on to all: it is for them to agree
    on a step to stop after. Before they listen, `signals` has what came meanwhile, and nothing is lost by leaving at once.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = share_of_this_machine(world_size)
    machines = world_size // processes
    # Without this every process starts a thread per core and they fight over them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The process that failed has said why; torchrun's tables would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if machines == 1:
        here = loopback.address()
        rendezvous: dict[str, Any] = {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": f"[{here}]:0" if ":" in here else f"{here}:0",
            "local_addr": here,  # or it asks for its own host's name, which a container need not know
        }
    else:
        rendezvous = {
            "run_id": "powernap",
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}",
            "rdzv_configs": {"rank": int(os.environ["PET_NODE_RANK"]), "timeout": MEETING_SECONDS},
        }
    # torchrun takes these over even where they were to be ignored.
    torchruns = [number.name for number in (signal.SIGINT, signal.SIGQUIT) if not is_ignored(number)]
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        **rendezvous,
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(torchruns),
        shutdown_timeout=10,  # seconds between asking the processes that are left to end, and ending them
    )
    os.environ.update(not_to_outlive_this())
    with passing_on(signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP) as passed_on:
        if signals.stop:  # while torch was imported
            return exit_codes.PREEMPTED
        try:
            elastic_launch(config, sys.executable)("-m", "powernap.launch.cli", *arguments)
        except ChildFailedError as error:
            rank, failure = _cause(error)
            if failure.exitcode >= 0:
                return failure.exitcode or exit_codes.FAILED
            if -failure.exitcode in passed_on:  # a rank that did not listen yet: none has trained
                return exit_codes.PREEMPTED
            name = signal.Signals(-failure.exitcode).name
            print(f"powernap: error: rank {rank} was ended by {name}; go on with --resume", file=sys.stderr)
            return 128 - failure.exitcode
        except (RendezvousError, DistError) as error:
            raise MeetingError(f"the machines did not meet at {config.rdzv_endpoint}: {error}") from None
        except SignalException as stopped:
            return 128 + stopped.sigval
    return 0


def _cause(error: "ChildFailedError") -> "tuple[int, ProcessFailure]":
    """The rank that failed first: of several that torchrun found at once, not one that left because another was gone."""
    failures = error.failures
    rank = min(failures, key=lambda rank: (failures[rank].exitcode == exit_codes.FAILED, failures[rank].timestamp))
    return rank, failures[rank]


@contextmanager
def passing_on(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Inside, these signals go to the processes that this one started, and into the list; before there is any, this one ends.

    SIGHUP and SIGINT stay ignored where they were.
    """
    passed_on: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        children = psutil.Process().children()
        if not children and not passed_on:
            sys.exit(exit_codes.INTERRUPTED if number == signal.SIGINT else exit_codes.PREEMPTED)
        passed_on.append(number)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    heeded = [n for n in numbers if n not in (signal.SIGHUP, signal.SIGINT) or not is_ignored(n)]
    before = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
