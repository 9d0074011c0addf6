"""The cluster that other tests submit to: it runs jobs of several nodes, and nothing of it is left afterwards."""

import time
from collections.abc import Callable

import psutil
import pytest

from tests.helpers.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.clusters


def test_a_step_has_ranks_on_two_nodes_and_gpus_for_them(slurm):
    said = slurm.run(
        *("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "sh", "-c"),
        "echo $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES",
    )
    assert sorted(said.splitlines()) == ["0 n1 0,1", "1 n1 0,1", "2 n2 0,1", "3 n2 0,1"]


def test_an_urgent_job_requeues_what_runs(slurm):
    running = slurm.run(*"sbatch --parsable --nodes=3 --output=/dev/null --wrap".split(), "sleep 60").strip()
    _until(lambda: _state(slurm, running) == "RUNNING")
    slurm.run(*"srun --partition=urgent --nodes=3 --exclusive true".split())
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", running)
    slurm.run("scancel", running)


def test_accounting_knows_how_a_job_ended(slurm_with_accounting):
    job = slurm_with_accounting.run(*"sbatch --parsable --output=/dev/null --wrap".split(), "exit 75").strip()
    command = f"sacct --noheader --parsable2 --allocations --format=State,ExitCode --jobs={job}".split()
    _until(lambda: slurm_with_accounting.run(*command).strip() == "FAILED|75:0")


def test_no_process_outlives_its_cluster(slurm):
    """Nor does a job that heeds no SIGTERM and cleared its environment; another cluster is left alone."""
    with SlurmCluster(nodes=1) as other:
        stubborn = f"trap '' TERM; env -i sh -c 'sleep 1000; true' job of {other.folder}"
        other.run(*"sbatch --parsable --output=/dev/null --wrap".split(), stubborn)
        _until(lambda: _processes(f"job of {other.folder}"))
        assert len(_processes(str(other.folder))) >= 6  # munged, slurmctld, slurmd, slurmstepd, the script, its shell
    assert not _processes(str(other.folder)) and not other.folder.exists()
    assert slurm.run("sinfo", "--noheader", "--partition=main", "--format=%D").strip() == "3"


def _state(cluster: SlurmCluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", "--jobs", job, "--format=%T", check=False).strip()


def _processes(words: str) -> list[int]:
    """Whose command line, environment or working directory has these words."""
    found = []
    for process in psutil.process_iter():
        try:
            if words in " ".join([*process.cmdline(), *process.environ().values(), process.cwd()]):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def _until(there: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            pytest.fail("waited in vain")
        time.sleep(0.1)
