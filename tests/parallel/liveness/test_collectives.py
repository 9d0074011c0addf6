"""What ranks wait for, where their stacks do not say it: as on NCCL, collectives are enqueued and waited for elsewhere."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from powernap.parallel.grid import Grid
from powernap.parallel.liveness import collectives
from powernap.parallel.liveness.collectives import Enqueued, Operation, explain
from powernap.parallel.liveness.watchdog import Progress
from powernap.parallel.topology import distributed_session
from tests.helpers.processes import in_processes

TIMEOUT = 6
GRID = Grid(tensor=2, data=2, pipeline=1)  # tensor groups 01 and 23, data groups 02 and 13


def stall_rank_3(rank, store, recorder) -> None:
    """Rank 3 reads a batch and does not come back; the others wait for it, directly or not, outside torch.distributed."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCH_FR_BUFFER_SIZE": recorder}
    with distributed_session(tensor=2, timeout_seconds=TIMEOUT) as topology:
        progress = topology.progress
        for progress.step in (1, 2):
            if (progress.step, rank) == (2, 3):
                progress.note("reading the batch")
                time.sleep(60)
            progress.note("averaging gradients")
            averaged = dist.all_reduce(torch.ones(5, 3), group=topology.groups.dp, async_op=True)
            progress.note("summing the loss")
            if rank != 1 or progress.step == 1:  # in step 2, rank 1 reads the average first
                summed = dist.all_reduce(torch.ones(7), group=topology.groups.tp, async_op=True)
                on_the_device(summed)
            on_the_device(averaged)


def on_the_device(work) -> None:
    """Stands for `.item()` of a result."""
    while not work.is_completed():
        time.sleep(0.01)


def lines_of_stalled_ranks(capfd, recorder: str) -> dict[int, str]:
    with pytest.raises(RuntimeError, match="exit code.*70"):
        in_processes(stall_rank_3, 4, recorder)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("powernap: error: rank ")]
    return {int(line.split()[3]): line.removeprefix("powernap: error: ") for line in lines}


@pytest.mark.faults
def test_a_report_names_the_collective_and_the_rank_that_has_not_enqueued_it(capfd):
    lines = lines_of_stalled_ranks(capfd, "2000")
    rank_3 = r"rank 3 \(data 1, stage 0, tensor 1\) has not enqueued it: step 2, reading the batch"
    own = r"rank {} \(data ., stage 0, tensor .\) waited 6 s and gives up: step 2, summing the loss; it waits for all_reduce number "
    for_average = r"\d+ of the data ranks of stage 0, tensor 1 \(c10d's group \d+, Float \[5, 3\]\)"
    for_loss = r"\d+ of the tensor ranks of data {}, stage 0 \(c10d's group \d+, Float \[7\]\)"
    assert re.fullmatch(
        own.format(1) + for_average + rf", enqueued in step 2, averaging gradients; {rank_3}", lines[1]
    ), lines[1]
    assert re.match(own.format(2) + for_loss.format(1) + rf", enqueued in step 2, summing the loss; {rank_3}", lines[2])
    assert re.fullmatch(
        own.format(0)
        + for_loss.format(0)
        + r", enqueued in step 2, summing the loss; rank 1 \(data 0, stage 0, tensor 1\) has not enqueued it: step 2, summing "
        + rf"the loss; rank 1 waits for all_reduce number {for_average}; {rank_3}",
        lines[0],
    ), lines[0]


@pytest.mark.faults
def test_without_the_recorder_the_report_says_so(capfd):
    """The control: nothing else knows who waits."""
    lines = lines_of_stalled_ranks(capfd, "0")
    for rank in range(3):
        assert "for which collective is not known: torch's flight recorder is empty" in lines[rank]
        assert "rank 3 (data 1, stage 0, tensor 1) is busy: step 2, reading the batch" in lines[rank]
        assert "enqueued" not in lines[rank]


def entry(
    name,
    number,
    *,
    group="5",
    about="undefined",
    done=False,
    p2p=False,
    at=0,
    sizes=((4,),),
    dtypes=("Float",),
    state="scheduled",
):
    """One of torch 2.13's flight recorder, without what is not read."""
    return {
        "process_group": [group, about],
        "collective_seq_id": 0 if p2p else number,
        "p2p_seq_id": number if p2p else 0,
        "is_p2p": p2p,
        "profiling_name": name,
        "time_created_ns": at,
        "input_sizes": sizes,
        "input_dtypes": dtypes,
        "state": "completed" if done else state,
        "retired": False,
    }


@pytest.fixture
def recorders(monkeypatch):
    """Both of a build with NCCL: lists of entries, to be filled."""
    nccl, gloo = [], []
    for name, entries in (("_dump_nccl_trace_json", nccl), ("_dump_fr_trace_json", gloo)):
        dump = lambda entries=entries: json.dumps({"entries": entries} if entries else {}).encode()  # noqa: E731
        monkeypatch.setattr(torch._C._distributed_c10d, name, dump, raising=False)
    monkeypatch.setattr(torch._C._distributed_c10d, "_resolve_process_group", lambda name: name)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [1, 3])
    return nccl, gloo


def test_nccl_has_a_recorder_of_its_own(recorders):
    """Seen on an H100 with both: NCCL's collectives are in the first alone."""
    nccl, gloo = recorders
    gloo.append(entry("gloo:all_gather", 3, group="1", done=True, at=5))
    nccl += [entry("nccl:all_reduce", 7, done=True, at=1), entry("nccl:_all_gather_base", 8, state="started", at=6)]
    progress = Progress()
    found = collectives.enqueued(progress.noted_at)
    assert found == (Operation("5", [1, 3], 8, "_all_gather_base", "Float [4]", None), {"5": 8, "1": 3})


def test_operations_that_nccl_sends_off_together_are_done_when_the_last_is(recorders):
    nccl, _ = recorders
    nccl += [entry("nccl:all_gather", 4), entry("nccl:all_gather", 4), entry("nccl:coalesced", 4, done=True, sizes=())]
    nccl += [entry("nccl:recv 0<-1", 2, p2p=True)]
    assert collectives.enqueued(lambda _: "note").pending == Operation("5", [1, 3], 2, "recv 0<-1", "Float [4]", "note")
    assert collectives.enqueued(lambda _: "note").pending.peer == 3
    nccl[2]["state"] = "started"
    assert collectives.enqueued(lambda _: "note").pending.name == "all_gather"


def test_a_checkpoint_that_is_being_written_is_waited_for_last(recorders):
    _, gloo = recorders
    gloo.append(entry("gloo:gather", 1, group="9", about=collectives.BESIDE_TRAINING, at=1))
    assert collectives.enqueued(lambda _: None).pending.name == "gather"
    gloo.append(entry("gloo:all_reduce", 4, at=2))
    assert collectives.enqueued(lambda _: None).pending.name == "all_reduce"


def test_no_recorder(monkeypatch):
    for name in collectives._DUMPS:
        monkeypatch.delattr(torch._C._distributed_c10d, name, raising=False)
    assert collectives.enqueued(lambda _: None) is None


def all_reduce(number, ranks, tensors="Float [4]", name="all_reduce"):
    return Operation("".join(map(str, ranks)), ranks, number, name, tensors, None)


def test_a_collective_of_another_kind_or_size_in_its_place():
    of = {
        0: Enqueued(all_reduce(5, [0, 1]), {"01": 5}),
        1: Enqueued(all_reduce(5, [0, 1], "Float [8]"), {"01": 5}),
    }
    sentences, named = explain(0, of, {0: "a", 1: "b"}, GRID)
    assert named == {0}
    assert sentences[1:] == [
        "rank 1 (data 0, stage 0, tensor 1) has enqueued all_reduce (Float [8]) in its place",
        "all of them have enqueued it",
    ]
    of[1] = Enqueued(all_reduce(5, [0, 1]), {"01": 5})
    assert explain(0, of, {}, GRID)[0][1:] == ["all of them have enqueued it"]


def test_the_other_side_of_a_message():
    received = Operation("7", [0, 2], 9, "recv 0<-1", "Float [4]", "step 3, forward of window 1 pass 0, micro-batch 2")
    of = {0: Enqueued(received, {}), 2: Enqueued(None, {})}
    sentences, _ = explain(0, of, {0: "a", 2: "reading"}, Grid(2, 1, 2))
    assert sentences == [
        "it waits for recv 0<-1 number 9 of the stages of data 0, tensor 0 (c10d's group 7, Float [4]), enqueued in "
        "step 3, forward of window 1 pass 0, micro-batch 2",
        "on its other side is rank 2 (data 0, stage 1, tensor 0): reading",
    ]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([4, 5], "the tensor ranks of data 0, stage 1"),
        ([1, 3], "the data ranks of stage 0, tensor 1"),
        ([2, 6], "the stages of data 1, tensor 0"),
        ([0, 1, 4, 5], "the stages and tensor ranks of data 0"),
        (list(range(8)), "all ranks"),
        ([1, 2, 3, 4], "ranks 1, 2, 3 and 1 more"),
    ],
)
def test_groups_by_their_ranks(ranks, words):
    assert Grid(tensor=2, data=2, pipeline=2).describe_group(ranks) == words


@pytest.mark.faults
def test_a_recorder_that_does_not_answer_ends_the_process():
    """NCCL's asks the device while no thread of Python can run; the exit code allows a restart."""
    code = (
        "import ctypes, os, threading, torch\n"
        "from powernap.parallel.grid import Grid\n"
        "from powernap.parallel.liveness.watchdog import Progress, Watchdog\n"
        "torch._C._distributed_c10d._dump_fr_trace_json = lambda: ctypes.PyDLL(None).sleep(60)\n"
        "Watchdog(Progress(), Grid(1, 2, 1), 0, 5)._report()\n"
    )
    start = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert process.returncode == 1 and "_report" in process.stderr, process.stderr
    assert time.monotonic() - start < 40


def test_what_was_noted_at_a_time():
    progress = Progress()
    progress.step = 4
    before = time.time_ns()
    progress.note("reading", lambda number: f"reading batch {number}", 7)
    assert progress.describe() == "step 4, reading batch 7" and progress.describe(brief=True) == "step 4, reading"
    progress.step = 5
    progress.note("stepping")
    assert progress.noted_at(before - 10**12) is None
    assert progress.noted_at(time.time_ns()) == "step 5, stepping"
