"""Processes on this machine: start the ones a layout needs, or recognise that torchrun or srun already did.

If the command was started once on each of several machines, such as the pods of a Kubernetes job, torchrun's own variables
tell which one this is: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT.
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

    from powernap.train.config import Recipe
    from powernap.train.run.signals import Signals

MEETING_SECONDS = 900  # machines start at different times, as when one still pulls the image

# Environment variable with the same value in all ranks of an srun step; read by parallel/rendezvous.py, which imports torch.
RENDEZVOUS = "POWERNAP_RENDEZVOUS"


class LaunchError(PowernapError):
    """The layout does not fit the started processes; one line."""


class MeetingError(LaunchError):
    """Machines did not find each other; a restart may help."""

    exit_code = exit_codes.FAILED


def already_started() -> bool:
    """Whether torchrun or srun started this process as one of several; translates srun's variables to torchrun's.

    A batch script is one process, whatever its job requested: only srun, which sets SLURM_STEP_*, starts tasks.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if os.environ["WORLD_SIZE"] != "1" and not os.environ.get(name) and RENDEZVOUS not in os.environ:
                raise LaunchError(f"{name} is missing: all ranks meet there, as RANK and WORLD_SIZE are set")
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
    """Address of the node of rank 0; srun itself may have been called elsewhere, such as on a login node."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1" or not nodes:
        return loopback.address()
    first = first_host(nodes)
    try:
        socket.getaddrinfo(first, None)
    except OSError:  # a name that only SLURM knows
        with suppress(OSError, subprocess.TimeoutExpired):
            command = ["scontrol", "show", "node", "-o", first]
            output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
            if match := re.search(r" NodeAddr=(\S+)", output):
                return match[1]
    return first


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: n[03-05,7],login -> n03"""
    first = re.match(r"(\[[^]]*\]|[^,[])*", nodes)
    assert first is not None  # the pattern also matches nothing
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def check_world_size(needed: int, layout: str) -> None:
    """Raise LaunchError unless as many processes were started as the recipe's layout needs."""
    started = int(os.environ["WORLD_SIZE"])
    if started != needed:
        raise LaunchError(
            f"{layout} needs {needed} processes, {started} were started: start {needed}, or change the layout"
        )


def share_of_this_machine(world_size: int) -> int:
    """Number of the layout's processes on this machine: all, or an equal share if several machines were started.

    Raises:
        LaunchError: if the machines cannot meet or do not divide the layout.
    """
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if nodes != "1" and world_size > 1 and not os.environ.get("SLURM_STEP_NUM_TASKS"):
        raise LaunchError(
            f"this job has {nodes} nodes, but all {world_size} processes would run on this one: write srun powernap train"
        )
    machines = os.environ.get("PET_NNODES", "1")
    if not machines.isdigit() or not int(machines):
        raise LaunchError(f"PET_NNODES={machines}: write the number of machines")
    if int(machines) > 1:
        rank = os.environ.get("PET_NODE_RANK", "")
        if not rank.isdigit() or int(rank) >= int(machines):
            raise LaunchError(f"PET_NODE_RANK={rank}: with PET_NNODES={machines} write 0 to {int(machines) - 1}")
        for name in ("PET_MASTER_ADDR", "PET_MASTER_PORT"):
            if not os.environ.get(name):
                raise LaunchError(f"{name} is missing: all PET_NNODES={machines} machines meet there")
    processes, remainder = divmod(world_size, int(machines))
    if remainder:
        raise LaunchError(
            f"the layout's {world_size} processes cannot be shared equally by PET_NNODES={machines} machines"
        )
    return processes


SMALL = 2_000_000  # parameters up to which a second thread gains nothing


def set_threads(recipe: "Recipe", processes: int = 1) -> None:
    """Before torch is imported: the threads of each process, unless OMP_NUM_THREADS says it.

    An equal share of the cores; one for a small model. Threads wait for each other by spinning: where others use the machine, a step of
    23,000 parameters took a hundred times as long with two.
    """
    from powernap.model.parameters import count_parameters

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_small = count_parameters(recipe.model, recipe.sleep) <= SMALL
    os.environ.setdefault("OMP_NUM_THREADS", "1" if is_small else str(max(1, cores // processes)))


def run_alone() -> None:
    """Set the environment of a world of one process, this one."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def start(arguments: list[str], recipe: "Recipe", signals: "Signals") -> int:
    """Run `powernap ARGUMENTS` in this machine's processes under torchrun; return the exit code of the first to fail.

    torchrun ends the others as soon as one fails. Signals are forwarded to all of them, and they agree on a step to stop
    after. If `signals` has received one before they start, exit at once: nothing is lost.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    world_size = recipe.parallel.world_size
    processes = share_of_this_machine(world_size)
    machines = world_size // processes
    set_threads(recipe, processes)
    # The failed process has reported its error; torchrun's tables would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if machines == 1:
        address = loopback.address()
        rendezvous: dict[str, Any] = {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": f"[{address}]:0" if ":" in address else f"{address}:0",
            "local_addr": address,  # the default, the host's name, need not resolve in a container
        }
    else:
        rendezvous = {
            "run_id": "powernap",
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}",
            "rdzv_configs": {"rank": int(os.environ["PET_NODE_RANK"]), "timeout": MEETING_SECONDS},
        }
    # torchrun would handle these even if this process was started with them ignored.
    handled = [] if is_ignored(signal.SIGQUIT) else [signal.SIGQUIT.name]
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        **rendezvous,
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(handled),
        shutdown_timeout=10,  # seconds from SIGTERM to SIGKILL for the remaining processes
    )
    os.environ.update(not_to_outlive_this())
    with forwarding(signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT) as forwarded:
        if signals.stop:  # received while torch was imported
            return exit_codes.PREEMPTED
        try:
            elastic_launch(config, sys.executable)("-m", "powernap.launch.cli", *arguments)
        except ChildFailedError as error:
            rank, failure = _cause(error)
            if failure.exitcode >= 0:
                return failure.exitcode or exit_codes.FAILED
            if -failure.exitcode in forwarded:  # a rank without a handler yet: no rank has trained
                return exit_codes.INTERRUPTED if -failure.exitcode == signal.SIGINT else exit_codes.PREEMPTED
            name = signal.Signals(-failure.exitcode).name
            print(f"powernap: error: rank {rank} was ended by {name}; continue with --resume", file=sys.stderr)
            return 128 - failure.exitcode
        except (RendezvousError, DistError) as error:
            raise MeetingError(f"the machines did not meet at {config.rdzv_endpoint}: {error}") from None
        except SignalException as stopped:
            return 128 + stopped.sigval
    return 0


def _cause(error: "ChildFailedError") -> "tuple[int, ProcessFailure]":
    """The rank that failed first; of several found at once, preferably not one that may only have lost a peer (FAILED)."""

    failures = error.failures
    rank = min(failures, key=lambda rank: (failures[rank].exitcode == exit_codes.FAILED, failures[rank].timestamp))
    return rank, failures[rank]


@contextmanager
def forwarding(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Forward these signals to the child processes and collect them in the list; without a child yet, exit.

    SIGHUP and SIGINT stay ignored if they were.
    """
    forwarded: list[int] = []

    def forward(number: int, frame: object) -> None:
        children = psutil.Process().children()
        if not children and not forwarded:
            sys.exit(exit_codes.INTERRUPTED if number == signal.SIGINT else exit_codes.PREEMPTED)
        forwarded.append(number)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    handled = [n for n in numbers if n not in (signal.SIGHUP, signal.SIGINT) or not is_ignored(n)]
    handlers = {number: signal.signal(number, forward) for number in handled}
    try:
        yield forwarded
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
