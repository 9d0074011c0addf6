"""Forward and backward over the micro-batches of one optimizer step.

Today a loop over segments on one stage. Pipeline parallelism replaces this function and nothing around it: the segments
are already what its virtual chunks will be.
"""

from dataclasses import dataclass

import torch

from powernap.model.health import FastWeightHealth
from powernap.model.segments import Segment
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage


@dataclass
class MicroBatch:
    segments: list[Segment]
    tokens: torch.Tensor  # [b, T]
    loss_mask: torch.Tensor  # [b, T]


def forward_backward(
    stage: HybridStage,
    micro_batches: list[MicroBatch],
    loss_scale: float,
    *,
    recompute: bool,
    health: FastWeightHealth | None = None,
) -> torch.Tensor:
    """Add every micro-batch's gradient of `loss_scale` x (sum of token losses); return the unscaled sum.

    `health` watches the first micro-batch.
    """
    total = torch.zeros((), device=micro_batches[0].tokens.device)
    for micro_batch in micro_batches:
        loss = sleep_and_predict(
            stage,
            micro_batch.segments,
            micro_batch.tokens,
            micro_batch.loss_mask,
            recompute=recompute,
            health=health,
        ).loss
        health = None
        (loss * loss_scale).backward()
        total += loss.detach()
    return total
