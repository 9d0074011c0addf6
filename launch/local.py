"""Processes on this machine: start the ones a layout needs, or recognise that torchrun or srun already did.

On several machines that one command each was started on, such as the pods of a Kubernetes job, torchrun's own variables
say which this one is: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from powernap.model.errors import PowernapError
from powernap.parallel import exit_codes, loopback

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from powernap.train.interruption import Signals

MEETING_SECONDS = 900  # for machines that start after each other, such as while one still fetches the image


class LaunchError(PowernapError):
    """A layout and the started processes do not fit, in one line."""


def already_started() -> bool:
    """Whether torchrun or srun started this process as one of several; srun's variables are put in torchrun's terms."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
    if "SLURM_PROCID" not in os.environ or tasks == 1:
        return False
    environment = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split("(")[0].split(",")[0],
        "MASTER_ADDR": os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        # The same port on all nodes, different for jobs that share one.
        "MASTER_PORT": str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000),
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return True


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

    torchrun ends the others as soon as one fails. SIGTERM and SIGUSR1 are passed on to all: it is for them to agree on a
    step to stop after. Before they listen, `signals` has what came meanwhile, and nothing is lost by leaving at once.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = share_of_this_machine(world_size)
    machines = world_size // processes
    # Without this every process starts a thread per core and they fight over them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The process that failed has said why; torchrun's tables would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if machines == 1:
        here = loopback.address()
        meeting = {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": f"[{here}]:0" if ":" in here else f"{here}:0",
            "local_addr": here,  # or it asks for its own host's name, which a container need not know
        }
    else:
        meeting = {
            "run_id": "powernap",
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}",
            "rdzv_configs": {"rank": int(os.environ["PET_NODE_RANK"]), "timeout": MEETING_SECONDS},
        }
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        **meeting,
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        shutdown_timeout=10,  # seconds between asking the processes that are left to end, and ending them
    )
    with _passing_on(signal.SIGTERM, signal.SIGUSR1) as passed_on:
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
        except _AskedToStopError:
            return exit_codes.PREEMPTED
        except SignalException as stopped:
            return 128 + stopped.sigval
    return 0


def _cause(error: "ChildFailedError") -> "tuple[int, ProcessFailure]":
    """The rank that failed first: of several that torchrun found at once, not one that left because another was gone."""
    failures = error.failures
    rank = min(failures, key=lambda rank: (failures[rank].exitcode == exit_codes.FAILED, failures[rank].timestamp))
    return rank, failures[rank]


class _AskedToStopError(Exception):
    """Before there was a process to ask."""


@contextmanager
def _passing_on(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Inside, these signals go to the processes that this one started, and into the list; without any, an error is raised."""
    passed_on: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        children = psutil.Process().children()
        if not children and not passed_on:
            raise _AskedToStopError
        passed_on.append(number)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
