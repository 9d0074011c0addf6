"""A whole training step under ZeRO and AdamW on one rank, and the memory it takes; benchmarks use it, too."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.stage import HybridStage
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import Topology
from powernap.parallel.zero.optimizer import ZeroOptimizer
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer
from tests.helpers.live_bytes import LiveBytes


class TrainingStep(NamedTuple):
    """A model under ZeRO, and a step of it.

    Attributes:
        input_bytes: of one segment that starts from hidden states.
    """

    stage: HybridStage
    zero: ZeroOptimizer
    run: Callable[[], object]
    input_bytes: int

    def weights_and_states(self) -> list[torch.Tensor]:
        states = [[partition, self.zero._state(partition)] for partition in self.zero._partitions()]
        return [*self.stage.parameters(), *(leaf for leaf in tree_leaves(states) if torch.is_tensor(leaf))]


def training_step(
    topology: Topology,
    model: ModelConfig,
    tokens: torch.Tensor,
    loss_mask: torch.Tensor,
    passes: int,
    precision: Literal["fp32", "bf16"],
    micro_batches: int = 1,
) -> TrainingStep:
    """A step on as many micro-batches, each of all `tokens`; tokens, loss_mask: [B, T]."""
    stage = HybridStage(model, SleepConfig(), topology.groups)
    optimizer = build_optimizer(stage, OptimizerConfig())
    zero = ZeroOptimizer(stage, optimizer, topology, precision=precision, clip=1.0, micro_batch_size=len(tokens))
    segments = plan_segments(tokens, loss_mask, model, SleepConfig(), passes)
    scale = 1.0 / (micro_batches * int(loss_mask.sum()))
    hidden = model.window * len(tokens) * model.hidden_size * stage.embedding.weight.element_size()

    def run():
        with zero.accumulation():
            forward_backward(
                stage, [MicroBatch(segments, tokens, loss_mask)] * micro_batches, scale, topology, recompute="segment"
            )
        zero.step()

    return TrainingStep(stage, zero, run, hidden + sum(state.nbytes for state in stage.empty_layer_states(len(tokens))))


def peak_bytes(run: Callable[[], object], known: Callable[[], Iterable[torch.Tensor]]) -> int:
    """The most bytes of tensors alive at once in `run`, those that are `known` after a first one left out."""
    run()  # rotary tables and optimizer states are made outside the count
    with LiveBytes(known()) as live:
        run()
    return live.peak
