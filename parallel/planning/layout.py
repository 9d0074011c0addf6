"""Which blocks each pipeline stage owns, and what a block costs. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.errors import PowernapError


class LayoutError(PowernapError):
    """A pipeline layout that does not fit the model: one line that says what to write instead."""


@dataclass(frozen=True)
class Costs:
    """Forward FLOPs of each part of the model for one token of every window, summed over all passes of a sequence."""

    embedding: int
    blocks: tuple[int, ...]
    head: int


def split_layers(pattern: str, stages: int, layout: str | None = None, costs: Costs | None = None) -> list[range]:
    """The blocks (indices over the whole model) of each pipeline stage, in order, at least one per stage.

    Args:
        pattern: one letter per block, such as "AGAG".
        layout: the recipe's parallel.pipeline_layout, such as "AG|AG"; None: the split with the fastest slowest stage,
            among those the most even one, and in a tie the later stages get more (the earlier ones hold more live
            segments).
        costs: what to balance, the embedding on the first stage and the head on the last; None: every block costs 1.

    Raises:
        LayoutError: if the pattern cannot be split so.
    """
    assert stages >= 1
    if stages > len(pattern):
        raise LayoutError(
            f"parallel.pipeline={stages}: model.pattern={pattern} has only {len(pattern)} blocks and every stage needs "
            f"one: write parallel.pipeline={len(pattern)} or less"
        )
    balanced = _balance(costs or Costs(0, (1,) * len(pattern), 0), stages)
    if layout is None:
        return balanced
    parts = layout.split("|")
    if len(parts) != stages or not all(parts) or "".join(parts) != pattern:
        raise LayoutError(
            f"parallel.pipeline_layout={layout}: {_what_is_wrong(parts, pattern, stages)}: "
            f"write {format_layout(pattern, balanced)}, or null for a layout balanced by cost"
        )
    return _ranges([0, *accumulate(map(len, parts))])


def format_layout(pattern: str, stages: list[range]) -> str:
    """A split as parallel.pipeline_layout writes it, such as "AG|GAG|AG"."""
    return "|".join(pattern[blocks.start : blocks.stop] for blocks in stages)


def sequence_costs(
    model: ModelConfig, passes: int = 1, *, sleep: SleepConfig | None = None, consolidated: int = 1, predicted: int = 1
) -> Costs:
    """Costs of a sequence with `consolidated` windows slept on and `predicted` ones read.

    A block counts as often as it runs: N passes over a consolidation window, without what follows the last write in the
    last of them, one pass over a prediction window. The head runs in prediction windows only.

    Args:
        passes: N.
        sleep: for its loop_range and eviction; None: all blocks repeat, hard eviction.
    """
    sleep = sleep or SleepConfig()
    asleep = consolidation_flops(model, sleep, passes)
    awake = prediction_flops(model, sleep)
    return Costs(
        embedding=embedding_flops(model) * (consolidated + predicted),
        blocks=tuple(
            predicted * awake[block] + consolidated * sum(flops[block] for flops in asleep)
            for block in range(model.num_layers)
        ),
        head=head_flops(model) * predicted,
    )


def consolidation_flops(model: ModelConfig, sleep: SleepConfig, passes: int) -> list[list[int]]:
    """Forward FLOPs per token of every block in each of the N passes over a consolidation window: [N][blocks]."""
    awake = prediction_flops(model, sleep)
    flops = []
    for number, blocks in enumerate(sleep.pass_blocks(model, passes), start=1):
        flops.append([awake[block] if block in blocks else 0 for block in range(model.num_layers)])
        if blocks and sleep.only_writes(number, passes):  # its last block only writes
            flops[-1][blocks[-1]] = model.mixer(blocks[-1]).flops(model, sleep, state_only=True)
    return flops


def prediction_flops(model: ModelConfig, sleep: SleepConfig) -> list[int]:
    """Forward FLOPs per token of every block, mixer and MLP, in the one pass over a prediction window."""
    mlp = model.mlp.flops(model, sleep)
    return [mixer.flops(model, sleep) + mlp * model.has_mlp(block) for block, mixer in enumerate(model.mixers)]


def head_flops(model: ModelConfig) -> int:
    """The final norm and the projection onto the vocabulary, per token."""
    return 4 * model.hidden_size + 2 * model.hidden_size * model.vocab_size


def embedding_flops(model: ModelConfig) -> int:
    """A look-up computes nothing; copying a row counts as one FLOP per number."""
    return model.hidden_size


@lru_cache(maxsize=256)
def _balance(costs: Costs, stages: int) -> list[range]:
    """Exact dynamic programming, once for the slowest stage and once for the most even split not slower than it."""
    total = [0, *accumulate(costs.blocks)]

    def stage_cost(start: int, stop: int) -> int:
        ends = costs.embedding * (start == 0) + costs.head * (stop == len(costs.blocks))
        return total[stop] - total[start] + ends

    slowest, _ = _best_split(len(costs.blocks), stages, stage_cost, max)

    def squared(start: int, stop: int) -> float:
        cost = stage_cost(start, stop)
        return cost**2 if cost <= slowest else float("inf")

    _, boundaries = _best_split(len(costs.blocks), stages, squared, lambda a, b: a + b)
    return _ranges(boundaries)


def _best_split(
    blocks: int, stages: int, cost: Callable[[int, int], float], join: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The cheapest way to cut `blocks` into `stages` pieces, with costs combined by `join`; in a tie the earliest cuts.

    Returns:
        (cost, [0, ..., blocks])
    """
    # best[stop]: the cheapest way to cut blocks 0 .. stop-1 into as many pieces as rounds have passed
    best = {stop: (cost(0, stop), [0, stop]) for stop in range(1, blocks + 1)}
    for pieces in range(2, stages + 1):
        best = {
            stop: min((join(best[cut][0], cost(cut, stop)), [*best[cut][1], stop]) for cut in range(pieces - 1, stop))
            for stop in range(pieces, blocks + 1)
        }
    return best[blocks]


def _ranges(boundaries: list[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(boundaries)]


def _what_is_wrong(parts: list[str], pattern: str, stages: int) -> str:
    if not all(parts):
        return "a stage is empty"
    if len(parts) != stages:
        return f"its number of stages is {len(parts)}, parallel.pipeline={stages}"
    return f"its stages join to {''.join(parts)}, model.pattern={pattern}"
