"""Errors of gloo, NCCL and the ranks' common store after a peer has exited or the network to it has failed, in one line."""

import re

_GLOO = re.compile(r"gloo.*Connection (closed|reset) by peer|Did the remote server shutdown or crash", re.DOTALL)
# torch 2.13: NCCLUtils.cpp getNcclErrorDetailedStr, NCCLComm::getNcclComm; ProcessGroupNCCL.cpp checkTimeout. A peer that exits
# while ranks connect is ncclInternalError to some, with NCCL's own line about the socket (NVIDIA/nccl issue 795).
_NCCL = re.compile(
    r"ncclRemoteError|remote process exited or there was a network error|NCCL communicator was aborted"
    r"|Watchdog caught collective operation timeout"
    r"|nccl.*(Connection (closed|reset|refused)|Broken pipe|completion from peer)",
    re.DOTALL | re.IGNORECASE,
)
_NCCL_SYSTEM = re.compile(r"ncclSystemError|NCCL error.*unhandled system error", re.DOTALL)
_LAST = re.compile(r"Last error:\s*(\S.*)")


def why_lost(error: str) -> str | None:
    """Why this rank cannot reach others, from an exception's text; None if the text is of something else."""
    if _GLOO.search(error):
        return "another rank is gone, and said why if it could"
    last = _LAST.search(error)
    of_nccl = f" (NCCL: {last[1].strip()})" if last else ""
    if _NCCL.search(error):
        return f"another rank is gone, and said why if it could, or the network to it has failed{of_nccl}"
    if _NCCL_SYSTEM.search(error):
        return f"a system call of NCCL has failed, as when /dev/shm is full or too small; NCCL_DEBUG=WARN says more{of_nccl}"
    return None
