"""Accuracy by depth: how many hops, steps or operations a model can do in its sleep, for several N."""

from collections import defaultdict

import torch

from powernap.model.segments import plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch, evaluation_batches

Accuracy = dict[str, dict[str, float]]  # N -> depth -> share of answers with every token right


@torch.no_grad()
def evaluate(stage: HybridStage, recipe: Recipe, passes: list[int], samples: int, topology: Topology) -> Accuracy:
    """Read the first `samples` test samples with each N in `passes`, split over the data-parallel ranks.

    An answer is right when each of its tokens is the likeliest one given the true tokens before it, which is the case
    exactly when greedy decoding would produce it.
    """
    right: dict[tuple[int, int], int] = defaultdict(int)
    asked: dict[tuple[int, int], int] = defaultdict(int)
    batches = evaluation_batches(
        recipe.data.test,
        batch_size=recipe.micro_batch_size,
        sequence_length=recipe.data.sequence_length,
        vocab_size=recipe.model.vocab_size,
        rank=topology.data_rank,
        world_size=topology.data_size,
        limit=samples,
    )
    for batch in batches:
        for number in passes:
            for depth, is_right in _mark(stage, recipe, batch, number, topology.device):
                asked[number, depth] += 1
                right[number, depth] += is_right
    totals = _sum_over_ranks(right, asked, topology)
    return {
        str(number): {str(depth): r / a for (n, depth), (r, a) in sorted(totals.items()) if n == number}
        for number in passes
    }


def _mark(stage: HybridStage, recipe: Recipe, batch: Batch, passes: int, device: torch.device):
    """(depth, whether right) of every answer in the batch."""
    segments = plan_segments(batch.tokens, batch.loss_mask, recipe.model, recipe.sleep, passes)
    output = sleep_and_predict(
        stage, segments, batch.tokens.to(device), batch.loss_mask.to(device), recompute=False, predict=True
    )
    wrong = (output.predictions.cpu() != batch.tokens).cumsum(dim=1)
    for row, answers in zip(wrong, batch.answers, strict=True):
        for start, stop, depth in answers.tolist():
            yield depth, bool(row[stop - 1] == row[start - 1])


def _sum_over_ranks(right: dict, asked: dict, topology: Topology) -> dict[tuple[int, int], tuple[int, int]]:
    """Ranks may have met different depths, so the counts travel as objects."""
    gathered: list[tuple[dict, dict]] = [None] * topology.data_size
    torch.distributed.all_gather_object(gathered, (dict(right), dict(asked)), group=topology.groups.dp)
    totals: dict[tuple[int, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for rights, askeds in gathered:
        for key, count in askeds.items():
            totals[key] = (totals[key][0] + rights.get(key, 0), totals[key][1] + count)
    return totals
