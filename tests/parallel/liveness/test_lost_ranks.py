"""Errors after a rank is lost are one line. NCCL's texts are as its users have reported them."""

import pytest
import torch.distributed as dist

from powernap.parallel import topology
from powernap.parallel.liveness.lost_ranks import why_lost
from powernap.parallel.topology import RankLostError, distributed_session

REMOTE = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.26.2
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketPollConnect: connect returned Connection refused, exceeded error retry count (35)"""
INTERNAL = """NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.20.5
ncclInternalError: Internal check failed.
Last error:
Net : Connection closed by remote peer node7<50260>"""
INFINIBAND = """NCCL error in: ProcessGroupNCCL.cpp:1, internal error, NCCL version 2.20.5
Last error:
NET/IB : Got completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129"""
TIMEOUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=78, OpType=BROADCAST, NumelIn=80, NumelOut=80, "
    "Timeout(ms)=600000) ran for 600096 milliseconds before timing out."
)
ABORTED = "NCCL communicator was aborted on rank 2.  Original reason for failure was: [Rank 2] ..."
SYSTEM = """NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1333, unhandled system error, NCCL version 2.18.6
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
Error while creating shared memory segment /dev/shm/nccl-UEUyTq (size 9637888)"""
USAGE = """NCCL error in: ProcessGroupNCCL.cpp:1331, invalid usage, NCCL version 2.18.6
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"""
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40002"

LOST = "another rank is gone, and said why if it could"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GLOO, LOST),
        (
            REMOTE,
            f"{LOST}, or the network to it has failed (NCCL: socketPollConnect: connect returned Connection refused, ",
        ),
        (
            INTERNAL,
            f"{LOST}, or the network to it has failed (NCCL: Net : Connection closed by remote peer node7<50260>)",
        ),
        (
            INFINIBAND,
            f"{LOST}, or the network to it has failed (NCCL: NET/IB : Got completion from peer 11.214.147.122",
        ),
        (TIMEOUT, f"{LOST}, or the network to it has failed"),
        (ABORTED, f"{LOST}, or the network to it has failed"),
        (SYSTEM, "a system call of NCCL has failed, as when /dev/shm is full or too small"),
    ],
)
def test_a_lost_rank(text, reason):
    assert str(why_lost(text)).startswith(reason)


@pytest.mark.parametrize("text", [USAGE, "CUDA error: device-side assert triggered", "Connection closed by peer", ""])
def test_what_is_something_else_keeps_its_traceback(text):
    assert why_lost(text) is None


def test_nccls_error_becomes_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(topology, "init_distributed", lambda *arguments: None)
    with pytest.raises(RankLostError, match=r"rank 1 \(data 0, stage 0, tensor 1\): another rank is gone.*; starting$"):
        with distributed_session(tensor=2):
            raise dist.DistBackendError(REMOTE)
