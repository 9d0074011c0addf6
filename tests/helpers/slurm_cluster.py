"""A real SLURM cluster of child processes on loopback: a controller, and a few nodes with fake CPUs and GPUs.

Two partitions share all nodes: "main", and "urgent", whose jobs preempt those of "main" by requeueing them. Each cluster
has its own folder and free ports: several can run side by side.
"""

import getpass
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
DATABASE_SECONDS = 60
SECONDS = 30  # for everything else to start or to end; about two on an idle machine

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 120 s by default, 5 at least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
MpiDefault=none

# Neither cgroups nor as many CPUs as the nodes claim are needed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides

# Faster than on a real cluster, which schedules every half minute and allows a job as long from SIGTERM to SIGKILL.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1,requeue_delay=1
KillWait=5
MinJobAge=600
ReturnToService=2

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=8 RealMemory=8000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
"""

ACCOUNTING_DAEMON = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
"""


class ClusterError(RuntimeError):
    """The cluster did not start, with the last output of its daemons, or did not end."""


class SlurmCluster:
    """A context manager: starts the cluster, and ends it with all of its jobs.

    Args:
        nodes: named n1, n2, ...; each claims 8 CPUs, 8 GPUs and 8000 MB.
        accounting: keep ended jobs in a database too, for sacct; takes a few more seconds to start.

    Attributes:
        folder: configuration, and the output of each daemon: NAME.out.
    """

    def __init__(self, nodes: int = 3, accounting: bool = False) -> None:
        self.nodes = nodes
        self.accounting = accounting
        self.folder = Path()
        self._daemons: dict[str, subprocess.Popen] = {}

    @staticmethod
    def missing(accounting: bool = False) -> list[str]:
        """The programs that are not installed."""
        programs = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
        return [program for program in programs if not _which(program)]

    @property
    def environment(self) -> dict[str, str]:
        """This process's, plus the one variable that makes SLURM's commands talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str, check: bool = True, seconds: float = SECONDS) -> str:
        """The output of one of SLURM's commands; CalledProcessError if it fails and `check`."""
        ended = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=seconds)
        if check:
            ended.check_returncode()
        return ended.stdout

    def start(self) -> None:
        """Return when every node is idle. ClusterError after half a minute."""
        # Not pytest's folder: the path of a Unix socket has at most 107 characters, and munge must be accessible to all.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        try:
            self._configure()
            self._start_munge()
            if self.accounting:
                self._start_database()
                self._start_accounting()
            self._start_slurm()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all daemons and jobs at once and remove the folder; ClusterError if a process is left."""
        end = time.monotonic() + SECONDS
        while left := self.processes():
            for process in left:  # several rounds: a daemon may just have started another one
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            for daemon in self._daemons.values():
                daemon.wait()
            if time.monotonic() > end:
                raise ClusterError(f"processes are left: {left}")
            time.sleep(0.02)
        self._daemons.clear()
        shutil.rmtree(self.folder)

    def processes(self) -> set[psutil.Process]:
        """All of this cluster's: daemons, jobs, and slurmstepd, the parent of jobs, which overwrites its environment."""
        ours = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                configuration, folder = process.environ().get("SLURM_CONF"), process.cwd()
                if configuration == self.environment["SLURM_CONF"] or folder == str(self.folder):
                    ours |= {process, *process.children(recursive=True)}
        return ours

    def _configure(self) -> None:
        controller, accounting, *nodes = _free_ports(2 + self.nodes)
        values = {
            "folder": self.folder,
            "user": getpass.getuser(),
            "host": socket.gethostname().split(".")[0],
            "nodes": self.nodes,
            "controller_port": controller,
            "accounting_port": accounting,
            "node_ports": ",".join(map(str, nodes)),
        }
        configuration = CONFIGURATION + (ACCOUNTING if self.accounting else "")
        (self.folder / "slurm.conf").write_text(configuration.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{self.nodes}] Name=gpu File={self.folder}/gpu[0-7]\n")
        for number in range(8):  # SLURM requires devices
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "slurmdbd.conf").write_text(ACCOUNTING_DAEMON.format(**values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(64))
        (self.folder / "munge.key").chmod(0o400)
        for name in ("state", *self._node_names()):
            (self.folder / name).mkdir()

    def _node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def _start_munge(self) -> None:
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{file}" for option, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._wait("munge's socket", (self.folder / "munge.socket").exists)

    def _start_database(self) -> None:
        data, user = f"--datadir={self.folder}/database", f"--user={getpass.getuser()}"
        subprocess.run(
            [_which("mariadb-install-db"), "--no-defaults", data, user, "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        # It need not be durable.
        lean = ("--innodb-flush-log-at-trx-commit=0", "--innodb-log-file-size=16M", "--innodb-buffer-pool-size=64M")
        options = ("--no-defaults", "--skip-networking", data, user, f"--socket={self.folder}/database.socket", *lean)
        self._daemon("database", "mariadbd", *options)
        self._wait("the database", (self.folder / "database.socket").exists, DATABASE_SECONDS)

    def _start_accounting(self) -> None:
        # Read by slurmdbd's database library.
        self._daemon("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=f"{self.folder}/database.socket")

        def registered() -> bool:
            command = ["sacctmgr", "--immediate", "add", "cluster", "test"]
            return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

        self._wait("slurmdbd", registered, DATABASE_SECONDS)

    def _start_slurm(self) -> None:
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for name in self._node_names():
            self._daemon(name, "slurmd", "-D", "-N", name)

        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t", check=False).split()
            return states == ["idle"] * self.nodes

        self._wait("idle nodes", idle)

    def _daemon(self, name: str, program: str, *arguments: str, **environment: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as output:
            self._daemons[name] = subprocess.Popen(
                # A daemon gets SIGTERM when this process ends, however it ends.
                ["setpriv", "--pdeathsig", "TERM", _which(program), *arguments],
                env=self.environment | environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for pytest alone
            )

    def _wait(self, what: str, is_ready: Callable[[], object], seconds: float = SECONDS) -> None:
        """Poll until it is ready; ClusterError if that takes too long or a daemon has ended."""
        end = time.monotonic() + seconds
        while not is_ready():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                names = ended or list(self._daemons)
                output = "\n".join(f"{name}: {(self.folder / f'{name}.out').read_text()[-2000:]}" for name in names)
                raise ClusterError(f"waited for {what} in vain; {'ended' if ended else 'running'}:\n{output}")
            time.sleep(0.05)


def _which(program: str) -> str | None:
    """The path of a program; daemons are in folders that a user's PATH may lack."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    """Ports below the kernel's ephemeral range, so that they stay free until they are used."""

    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)
