"""train.compile: the gradients are eager's, with checkpoints, several passes and tensor ranks, and what is compiled is used again."""

import shutil

import pytest
import torch

from powernap.model.compiled import compile_functions
from powernap.model.mixers import rotary
from powernap.parallel.topology import init_distributed
from tests.helpers import tiny
from tests.helpers.cases import names
from tests.helpers.processes import in_processes

PATTERN = "AG"


def compare(rank: int, store, world_size: int, backend: str, pattern: str) -> dict:
    """The largest difference of a gradient, relative to its largest; the graphs after the first and after further steps."""
    from torch._dynamo.utils import counters  # late: seconds
    from torch._inductor import config as inductor

    topology = init_distributed(world_size, store=store, rank=rank, world_size=world_size, timeout_seconds=300)
    tokens, loss_mask = tiny.batch(sequences=2, windows=3)
    tokens[0, :2] = 0  # pads
    found, graphs = [], []
    for compiled in (False, True):
        model = tiny.model_config(pattern=pattern, vocab_size=18)
        stage = tiny.build_stage(topology, model, dtype=torch.float32)
        if compiled:
            inductor.cpp.simdlen = 1  # it asks a fresh interpreter what the CPU has, and the warm one cannot answer
            compile_functions(backend)
        for passes in (4, 2, 4):
            loss = tiny.run(stage, tokens, loss_mask, passes).loss
            found.append(tiny.gradients(stage, loss))
            graphs.append(counters["stats"]["unique_graphs"])
    rotary.rotate = lambda x, cos, sin: x * cos  # what a wrong compilation would do
    wrong = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 4).loss)
    differences = [largest_difference(*pair) for pair in zip(found[:3], found[3:], strict=True)]
    return {"difference": max(differences), "wrong": largest_difference(found[0], wrong), "graphs": graphs[3:]}


def largest_difference(one: dict, other: dict) -> float:
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-6)) for n in one)


def check(results: list[dict], bound: float) -> None:
    for result in results:
        assert result["difference"] < bound < 1e-2 < result["wrong"]
        first, fewer_passes, again = result["graphs"]
        assert 0 < first and fewer_passes == first == again  # shapes repeat


@pytest.mark.parametrize("ranks", names([1], [1, 2]))
def test_gradients_are_eager_ones(ranks):
    """Without inductor: what dynamo follows, checkpoints and hands to autograd."""
    check(in_processes(compare, ranks, ranks, "aot_eager", PATTERN), 1e-5)


@pytest.mark.wide  # minutes of a C++ compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor's code for CPUs needs a C++ compiler")
@pytest.mark.parametrize(("ranks", "pattern"), [(2, PATTERN), (1, "aM")])
def test_gradients_by_inductor(ranks, pattern):
    check(in_processes(compare, ranks, ranks, "inductor", pattern), 1e-4)  # fast math
