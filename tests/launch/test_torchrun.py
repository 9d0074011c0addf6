"""Processes that others started, and which of several ranks that failed is the cause."""

import os
from types import SimpleNamespace

import pytest

from powernap.launch import torchrun
from powernap.parallel.liveness import exit_codes


@pytest.mark.parametrize(
    ("exit_codes_and_times", "cause"),
    [
        ([(exit_codes.FAILED, 10), (-9, 10)], 1),  # torchrun knows seconds, and looks five times in one
        ([(exit_codes.FAILED, 10), (exit_codes.FAILED, 9)], 1),
        ([(exit_codes.WRONG_USE, 10), (-6, 10)], 0),
    ],
)
def test_the_cause_is_not_a_rank_that_left_because_another_was_gone(exit_codes_and_times, cause):
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in enumerate(exit_codes_and_times)
    }
    assert torchrun._cause(SimpleNamespace(failures=failures)) == (cause, failures[cause])


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[03-05,7],login", "n03"),
        ("a-1,b[2-3]", "a-1"),
        ("r[1-2]n[8,9]", "r1n8"),
        ("x[5]-ib,y", "x5-ib"),
    ],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert torchrun.first_host(nodes) == first


@pytest.fixture
def slurm(monkeypatch):
    """Sets SLURM's variables, and no others that say how a process was started."""

    def environment(**variables: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "POWERNAP_RENDEZVOUS"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
        for name, value in ({"SLURM_JOB_ID": "37", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"} | variables).items():
            monkeypatch.setenv(name, value)

    return environment


def test_a_batch_script_without_srun_is_one_process(slurm):
    slurm()
    assert not torchrun.already_started()
    assert torchrun.share_of_this_machine(2) == 2
    slurm(SLURM_JOB_NUM_NODES="2")
    assert not torchrun.already_started()
    assert torchrun.share_of_this_machine(1) == 1
    with pytest.raises(torchrun.LaunchError, match="this job has 2 nodes.*write srun powernap train"):
        torchrun.share_of_this_machine(2)


def test_ranks_of_srun_meet_on_the_steps_first_node(slurm, monkeypatch):
    """Not where srun was called. Two steps of a job have names of their own."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,n2"}
    met = []
    for number in "01":
        slurm(SLURM_LAUNCH_NODE_IPADDR="192.0.2.1", SLURM_STEP_ID=number, **step)
        assert torchrun.already_started()
        met.append((os.environ["MASTER_ADDR"], os.environ["POWERNAP_RENDEZVOUS"]))
    assert met == [("localhost", "37.0.0"), ("localhost", "37.1.0")]


def test_ranks_without_a_place_to_meet_are_refused(slurm, monkeypatch):
    slurm(RANK="0", WORLD_SIZE="2")
    with pytest.raises(torchrun.LaunchError, match="MASTER_ADDR is missing"):
        torchrun.already_started()
