"""Run by test_messages.py in a process of its own: single ranks of large worlds, without the others.

torch's `fake` backend makes groups of any size and leaves tensors as they are. A rank joins its groups, builds its part of the
model and runs a whole training step through schedule and optimizer; what it asks of its groups is recorded. It shows groups,
shapes, and the kind, size and order of messages; not values, and not whether the others would answer.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple
from unittest import mock

import deepspeed.comm
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powernap.model.megatron import parallel_state
from powernap.model.mixers.module import MixerModule
from powernap.parallel import schedule
from powernap.parallel.planning.messages import Groups, Message
from powernap.parallel.topology import init_distributed
from powernap.parallel.zero import optimizer as zero_module
from powernap.train import trainer
from powernap.train.config import Recipe
from tests.helpers.plan_measured import batch

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "send": "send",
    "recv_": "receive",
}


class Rank(NamedTuple):
    """What one rank had and did."""

    groups: Groups
    shapes: dict[str, tuple[int, ...]]  # of its parameters, by their names in the whole model
    messages: list[Message]  # of one training step


def run_ranks(own_rank: int, store: dist.Store, cases: list[tuple[Recipe, int, str | None]]) -> list[Rank]:
    """(recipe, rank, name in FAULTS) one after the other; this process's own rank and store are not used."""
    return [run_rank(*case) for case in cases]


def run_rank(recipe: Recipe, rank: int, fault: str | None = None) -> Rank:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=recipe.parallel.world_size)
    with FAULTS[fault]() if fault else nullcontext(), Messages() as recorded:
        topology = init_distributed(recipe.parallel.tensor, recipe.parallel.pipeline)
        stage, zero = trainer.build(recipe, topology)
        recorded.found.clear()
        if fault != "another dimension":  # whose shapes nothing can compute with
            trainer.train_step(recipe, stage, zero, batch(recipe), 2, topology)
    names = {"tensor": "tp", "data": "dp", "pipeline": "pp", "model": "mp", "embedding": "embd"}
    groups = Groups(**{ours: members(getattr(topology.groups, theirs)) for ours, theirs in names.items()})
    shapes = {stage.global_name(name): tuple(p.shape) for name, p in stage.named_parameters()}
    zero.engine.destroy()
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()
    gc.collect()
    return Rank(groups, shapes, recorded.found)


def members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


class Messages(TorchDispatchMode):
    """Records what a rank asks of its groups, but for groups of itself alone.

    What it would have received are zeros: the step must stay finite, or the optimizer would skip it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Message] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As LiveBytes."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d" and (name := function._schema.name.removeprefix("c10d::")) in KINDS:
            self._record(name, args)
        return result

    def _record(self, name: str, args: tuple) -> None:
        leaves = tree_leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ranks = members(next(dist.ProcessGroup.unbox(leaf) for leaf in leaves if _is_group(leaf)))
        if name in ("send", "recv_"):
            ranks = (ranks[args[2]],)
        elif len(ranks) == 1:
            return
        if name in ("recv_", "_allgather_base_"):
            tensors[0].zero_()
        whole = max(tensors, key=torch.Tensor.numel)
        self.found.append(Message(KINDS[name], ranks, whole.numel(), whole.element_size()))


def _is_group(leaf: object) -> bool:
    return isinstance(leaf, torch.ScriptObject) and leaf._type().qualified_name().endswith(".ProcessGroup")


# ------------------------------------------------------------------------------------------------ faults


@contextmanager
def stages_before_data() -> Iterator[None]:
    original = parallel_state.initialize_model_parallel
    with mock.patch.object(parallel_state, "initialize_model_parallel", partial(original, order="tp-cp-ep-pp-dp")):
        yield


@contextmanager
def longer_messages() -> Iterator[None]:
    longest = schedule.longest
    with mock.patch.object(schedule, "longest", lambda segments: 2 * longest(segments)):
        yield


@contextmanager
def another_dimension() -> Iterator[None]:
    """The convolution's weight is split by channels, not by heads."""
    original = MixerModule._parameter

    def parameter(self, weight):
        if weight.name != "conv_weight":
            return original(self, weight)
        return torch.nn.Parameter(weight.draw(weight.shape).chunk(self.tp_size, dim=1)[self.tp_group.rank()].clone())

    with mock.patch.object(MixerModule, "_parameter", parameter):
        yield


@contextmanager
def shared_gradients_not_summed() -> Iterator[None]:
    with mock.patch.object(zero_module, "sum_shared_gradients", lambda *arguments: None):
        yield


FAULTS = {
    "another order of groups": stages_before_data,
    "longer messages": longer_messages,
    "another dimension": another_dimension,
    "shared gradients not summed": shared_gradients_not_summed,
}
