"""A stage whose segments take fixed times, and steps of it in real processes; benchmarks use it, too.

Everything around the stage is real: processes over gloo, Megatron-core's schedule, parallel/schedule.py. The stage
only sleeps (time.sleep), which needs no core, so two cores are enough to time a pipeline of four.
"""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from powernap.model.config import SleepConfig
from powernap.model.megatron import TransformerConfig
from powernap.model.recompute import Recompute
from powernap.model.segments import Segment
from powernap.parallel.planning.timeline import Timeline, schedule, simulate
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import init_distributed, shutdown_distributed

WINDOW, HIDDEN_SIZE, BATCH = 2, 8, 1


@dataclass(frozen=True)
class Case:
    """Steps of a pipeline; times in seconds.

    Args:
        forward: of each segment on each stage, [stages][segments].
        backward_over_forward: time of the backward pass, without recomputation, over that of the forward pass.
        flushes: how often the segments run, each time until the pipeline is empty.
    """

    passes: tuple[int, ...]  # N of each window
    micro_batches: int
    forward: tuple[tuple[float, ...], ...]
    backward_over_forward: float = 2.0
    recompute: Recompute = "segment"
    flushes: int = 1

    @property
    def stages(self) -> int:
        return len(self.forward)

    def plan(self) -> Timeline:
        """One flush as parallel/planning/timeline.py simulates it."""
        factor = self.backward_over_forward + (self.recompute == "segment")
        backward = [[factor * seconds for seconds in stage] for stage in self.forward]
        return simulate(schedule(self.stages, self.micro_batches, sum(self.passes)), self.forward, backward)


def even(passes: tuple[int, ...], micro_batches: int, stages: int, forward: float, **options) -> Case:
    """A case in which every segment takes equally long on every stage."""
    return Case(passes, micro_batches, ((forward,) * sum(passes),) * stages, **options)


def time_steps(rank: int, store: dist.Store, cases: list[Case], steps: int) -> list[list[float] | None]:
    """Seconds of `steps` steps of every case, on the first ranks it needs; the others wait for the next case."""
    return [
        _time(case, steps, store=dist.PrefixStore(f"case {number}", store), rank=rank) if rank < case.stages else None
        for number, case in enumerate(cases)
    ]


def _time(case: Case, steps: int, **process_group) -> list[float]:
    topology = init_distributed(pipeline=case.stages, timeout_seconds=60, world_size=case.stages, **process_group)
    stage = FixedCostStage(case, topology.pp_rank)
    tokens = torch.zeros((BATCH, len(case.passes) * WINDOW + 1), dtype=torch.long)
    batches = [MicroBatch(segments(case.passes), tokens, tokens > 0) for _ in range(case.micro_batches)]
    seconds = []
    for number in range(1 + steps):
        topology.barrier()
        start = time.perf_counter()
        for _ in range(case.flushes):
            forward_backward(stage, batches, 1.0, topology, recompute=case.recompute)  # ends with an all-reduce
        if number > 0:
            seconds.append(time.perf_counter() - start)
    shutdown_distributed()
    return seconds


def segments(passes: tuple[int, ...]) -> list[Segment]:
    """One sequence's; the last window's last pass predicts."""
    order = [(window, number) for window, n in enumerate(passes) for number in range(1, n + 1)]
    return [
        Segment(
            window,
            number,
            range(window * WINDOW, (window + 1) * WINDOW),
            range(1),
            range(1),
            from_embeddings=number == 1,
            predicts=index + 1 == len(order),
        )  # fmt: skip
        for index, (window, number) in enumerate(order)
    ]


class FixedCostStage:
    """The part of HybridStage that parallel/schedule.py uses; each segment takes its time forward and backward."""

    sequence_shards = 1
    model = SimpleNamespace(hidden_size=HIDDEN_SIZE)
    sleep = SleepConfig()

    def __init__(self, case: Case, stage: int):
        self.config = TransformerConfig(num_layers=1, hidden_size=HIDDEN_SIZE, num_attention_heads=1)
        self.is_first, self.is_last = stage == 0, stage == case.stages - 1
        self.like = torch.zeros(())
        self.dtype, self.device = self.like.dtype, self.like.device
        self.weight = torch.zeros((), requires_grad=True)  # so that every segment has a backward pass
        self.backward_over_forward = case.backward_over_forward
        self.seconds = {
            (segment.window, segment.pass_number): seconds
            for segment, seconds in zip(segments(case.passes), case.forward[stage], strict=True)
        }

    def empty_layer_states(self, batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(batch, HIDDEN_SIZE),)

    def __call__(self, segment: Segment, tokens: torch.Tensor, hidden_states: torch.Tensor | None, fast_weights):
        if hidden_states is None:
            hidden_states = torch.zeros(WINDOW, len(tokens), HIDDEN_SIZE)
        forward = self.seconds[segment.window, segment.pass_number]
        backward = self.backward_over_forward * forward
        hidden_states, *fast_weights = _Sleep.apply(forward, backward, self.weight, hidden_states, *fast_weights)
        return hidden_states, tuple(fast_weights)

    def loss(self, hidden_states: torch.Tensor, targets: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        return hidden_states.sum()


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, weight, *states):
        ctx.seconds = backward
        ctx.save_for_backward(weight)  # so that a checkpointed segment is recomputed before its backward pass
        time.sleep(forward)
        return tuple(state.clone() for state in states)

    @staticmethod
    def backward(ctx, *gradients):
        (weight,) = ctx.saved_tensors
        time.sleep(ctx.seconds)
        return None, None, torch.zeros_like(weight), *gradients
