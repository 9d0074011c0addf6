"""Better layouts for the same job: `powernap plan --suggest`. Nothing here imports torch."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from powernap.model.recompute import Recompute
from powernap.model.segments import Probe, Segment
from powernap.parallel.planning.choices import alternatives, in_words, stage_memories
from powernap.parallel.planning.memory import FP32, bytes_per_number, fits, stage_parameters
from powernap.parallel.planning.plan import in_bytes
from powernap.parallel.planning.timeline import bubble, peak_live
from powernap.parallel.planning.work import (
    PlanError,
    Recipe,
    micro_batches,
    segments_of,
    stage_work,
    step_flops,
)

# Only the ratio of communication to computation affects the order.
NODE = 8  # ranks with fast links between them: the largest tensor parallelism
FLOPS_PER_BYTE_IN_NODE = 1_000  # such as 400 TFLOP/s and 400 GB/s
FLOPS_PER_BYTE_BETWEEN_NODES = 10_000  # such as 400 TFLOP/s and 40 GB/s
FLOPS_PER_BYTE_TO_HOST = 16_000  # such as 400 TFLOP/s and 25 GB/s
SATURATION = 512  # tokens of a micro-batch's window at which a device reaches half its speed
MOST_MICRO_BATCHES = 512


@dataclass(frozen=True)
class Suggestion:
    """One layout for a number of devices."""

    data: int
    tensor: int
    pipeline: int
    sequence_parallel: bool
    zero_stage: int
    micro_batch_size: int
    micro_batches: int
    bubble: float
    efficiency: float  # estimate: useful part of the devices' time
    bytes: int  # of the fullest rank
    fits: bool | None
    recompute: Recompute
    offload_inputs: bool
    host: int  # bytes of host memory for a rank
    flops: float | None  # of a step, over those with the recipe's own choice; None: this is the recipe's

    def overrides(self) -> str:
        """As `key=value` for the command line."""
        return (
            f"parallel.data={self.data} parallel.tensor={self.tensor} parallel.pipeline={self.pipeline} "
            f"parallel.sequence={str(self.sequence_parallel).lower()} zero.stage={self.zero_stage} "
            f"train.micro_batch_size={self.micro_batch_size} train.recompute={self.recompute} "
            f"train.offload_inputs={str(self.offload_inputs).lower()}"
        )


def suggest(
    recipe: Recipe,
    devices: int,
    predicts: Sequence[bool] | None = None,
    memory_limit: int | None = None,
    probes: Sequence[Probe] = (),
) -> list[Suggestion]:
    """Layouts for `devices` ranks, best first: those that fit before those that do not, then by estimated efficiency.

    For each grid of processes and ZeRO stage the best micro-batch size is kept. Where one does not fit with the recipe's
    train.recompute, the choice with the fewest FLOPs that does takes its place.

    Raises:
        PlanError: if no layout can run.
    """
    best: dict[tuple[int, int, int, int], Suggestion] = {}
    for candidate in _candidates(recipe, devices):
        suggestion = _fitting(candidate, segments_of(candidate, predicts, probes), memory_limit)
        layout = (suggestion.data, suggestion.tensor, suggestion.pipeline, suggestion.zero_stage)
        if layout not in best or _rank(suggestion) > _rank(best[layout]):
            best[layout] = suggestion
    if not best:
        raise PlanError(
            f"no layout of {devices} devices fits train.global_batch_size={recipe.train.global_batch_size}, the heads and "
            f"the {recipe.model.num_layers} blocks of the model: write another --devices or a batch that more devices divide"
        )
    return sorted(best.values(), key=_rank, reverse=True)


def _rank(suggestion: Suggestion) -> tuple:
    """Fits, then efficient, then small, then simple."""
    fits = suggestion.fits is not False
    simple = (-suggestion.pipeline, -suggestion.tensor, -suggestion.zero_stage)
    if not fits:  # the nearest to fitting
        return (fits, -suggestion.bytes, suggestion.efficiency, *simple)
    return (fits, round(suggestion.efficiency, 3), -suggestion.bytes, *simple)


def _candidates(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe in every valid layout of `devices`."""
    for tensor, pipeline in itertools.product(
        _divisors(devices, most=NODE), _divisors(devices, recipe.model.num_layers)
    ):
        if devices % (tensor * pipeline) == 0:
            yield from _candidates_on_grid(recipe, devices // (tensor * pipeline), tensor, pipeline)


def _candidates_on_grid(recipe: Recipe, data: int, tensor: int, pipeline: int) -> Iterator[Recipe]:
    share = recipe.train.global_batch_size // data
    sizes = [size for size in _divisors(share) if share // size <= MOST_MICRO_BATCHES]
    zero_stages = (1,) if pipeline > 1 or data == 1 else (1, 3)
    sequence_parallel = (False,) if tensor == 1 else (True, False)
    for size, zero_stage, sequence in itertools.product(sizes, zero_stages, sequence_parallel):
        grid = {"data": data, "tensor": tensor, "pipeline": pipeline, "sequence": sequence}
        changed = _changed(recipe, grid, size, zero_stage)
        if changed is not None:
            yield changed


def _changed(recipe: Recipe, grid: dict, micro_batch_size: int, zero_stage: int) -> Recipe | None:
    """The recipe in another layout, or None if that is not valid."""
    sections = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    sections["parallel"] = recipe.parallel.model_copy(update={**grid, "pipeline_layout": None})
    sections["train"] = recipe.train.model_copy(update={"micro_batch_size": micro_batch_size})
    sections["zero"] = recipe.zero.model_copy(update={"stage": zero_stage})
    try:
        return type(recipe).model_validate(sections)
    except ValueError:
        return None


def _fitting(recipe: Recipe, segments: list[Segment], memory_limit: int | None) -> Suggestion:
    """With the recipe's train.recompute, or where that does not fit the one with the fewest FLOPs that does."""
    own, own_flops = _suggestion(recipe, segments, memory_limit), step_flops(recipe, segments)
    if own.fits is not False:
        return own
    others = [(step_flops(other, segments), other.train.offload_inputs, other) for other in alternatives(recipe)]
    for flops, _, other in sorted(others, key=lambda entry: entry[:2]):
        if flops >= own_flops:
            suggestion = _suggestion(other, segments, memory_limit, flops / own_flops)
            if suggestion.fits:
                return suggestion
    return own


def _suggestion(
    recipe: Recipe, segments: list[Segment], memory_limit: int | None, flops: float | None = None
) -> Suggestion:
    parallel, work = recipe.parallel, stage_work(recipe, segments)
    memories = stage_memories(recipe, segments)
    # Inputs go to the host and back: peak_live segments of them are there at once.
    live = peak_live(parallel.pipeline, 0, micro_batches(recipe), len(segments))
    copied = 2 * max(m.host_inputs for m in memories) / live * len(segments) * micro_batches(recipe)
    copies = copied * FLOPS_PER_BYTE_TO_HOST * parallel.world_size / step_flops(recipe, segments)
    waiting = bubble(parallel.pipeline, micro_batches(recipe), len(segments))
    tokens = sum(len(s.tokens) for s in segments) / len(segments) * recipe.micro_batch_size
    efficiency = (1 - waiting) * (sum(work) / len(work) / max(work)) * (tokens / (tokens + SATURATION))
    return Suggestion(
        data=parallel.data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        zero_stage=recipe.zero.stage,
        micro_batch_size=recipe.micro_batch_size,
        micro_batches=micro_batches(recipe),
        bubble=waiting,
        efficiency=efficiency / (1 + communication(recipe, segments) + copies) / (flops or 1),
        bytes=max(memory.total for memory in memories),
        fits=None if memory_limit is None else all(fits(memory, memory_limit) for memory in memories),
        recompute=recipe.train.recompute,
        offload_inputs=recipe.train.offload_inputs,
        host=max(memory.host + memory.host_inputs for memory in memories),
        flops=flops,
    )


def suggestions_json(suggestions: Sequence[Suggestion]) -> str:
    """All suggestions, best first, with the overrides that choose each."""
    return json.dumps([{**dataclasses.asdict(s), "overrides": s.overrides()} for s in suggestions], indent=2)


def suggestions_text(suggestions: Sequence[Suggestion], devices: int, most: int = 10) -> str:
    """The best of `suggest` as a table of 80 columns."""
    head = f"{'data':>5} {'tensor':>6} {'pipe':>4} {'seq.p.':>6} {'ZeRO':>4} {'micro-batches':>14} {'bubble':>7} "
    lines = [f"{devices} devices, best first; efficiency is an estimate to compare layouts by", ""]
    lines.append(head + f"{'efficiency':>10} {'memory':>8}  fits")
    for s in suggestions[:most]:
        micro = f"{s.micro_batches} of {s.micro_batch_size}"
        fit = {None: "", True: "yes", False: "NO"}[s.fits]
        lines.append(
            f"{s.data:>5} {s.tensor:>6} {s.pipeline:>4} {'yes' if s.sequence_parallel else '-':>6} {s.zero_stage:>4} "
            f"{micro:>14} {s.bubble:>7.1%} {s.efficiency:>10.1%} {in_bytes(s.bytes):>8}  {fit}".rstrip()
        )
        if s.flops is not None:
            host = f", {in_bytes(s.host)} on a rank's host" if s.host else ""
            choice = in_words(s.recompute, s.offload_inputs)
            lines.append(f"      recompute {choice}: {s.flops:.2f} x FLOPs{host}")
    words = suggestions[0].overrides().split()
    parts = [" ".join(words[first : first + 3]) for first in range(0, len(words), 3)]
    lines += ["", "the first: " + ("\n" + " " * 11).join(parts)]
    if suggestions[0].fits and suggestions[0].recompute != "none":
        lines.append("           with these, `powernap plan` names a cheaper train.recompute that fits")
    return "\n".join(lines)


def communication(recipe: Recipe, segments: list[Segment]) -> float:
    """Estimated time a rank spends sending in a step, as a fraction of the time it computes; nothing overlaps.

    Tensor ranks are inside a node, the others between nodes.
    """
    in_node, between = bytes_sent(recipe, segments)
    per_device = step_flops(recipe, segments) / recipe.parallel.world_size
    rate = FLOPS_PER_BYTE_IN_NODE if recipe.parallel.world_size <= NODE else FLOPS_PER_BYTE_BETWEEN_NODES
    return (in_node * FLOPS_PER_BYTE_IN_NODE + between * rate) / per_device


def bytes_sent(recipe: Recipe, segments: list[Segment]) -> tuple[float, float]:
    """Estimated bytes that a rank sends in a step, to tensor ranks and to others; messages.py has them one by one.

    Tensor parallelism: two all-reduces (or gather and scatter pairs) per block forward, two backward, two
    each time that it is recomputed;
    sequence parallelism gathers the inputs of both products once more for their weights' gradients. Pipeline: per
    segment hidden states forward and their gradient back. Data: gradients all-reduced, under ZeRO 3 reduced to a part
    each, and weights gathered, once per step; ZeRO 3 gathers the weights for the forward, recomputed and backward pass
    of every segment.
    """
    parallel, size, width = recipe.parallel, bytes_per_number(recipe), recipe.model.hidden_size
    # Tokens that a rank computes in a step, counted in every pass.
    tokens = sum(len(segment.tokens) for segment in segments) * recipe.sequences_per_rank
    again = {"none": 0, "selective": 0, "blocks": 1, "segment": 1, "nested": 2}[recipe.train.recompute]
    if recipe.train.recompute == "selective" and parallel.sequence:  # an all-reduce's result is kept, no other's
        again = 1
    rounds = 4 + parallel.sequence + 2 * again
    ring = 2 * (parallel.tensor - 1) / parallel.tensor
    in_node = ring * rounds * max(map(len, recipe.stage_blocks)) * tokens * width * size
    between = 2 * tokens * width * size / recipe.sequence_shards if parallel.pipeline > 1 else 0
    stages = [stage_parameters(recipe, stage) for stage in range(parallel.pipeline)]
    weights = max(sum(w.size(parallel.tensor) for w in stage) for stage in stages)
    others = (parallel.data - 1) / parallel.data
    reductions = 1 if recipe.zero.stage == 3 else 2  # an all-reduce sends the gradients, then their sums
    between += others * weights * (reductions * FP32 + size)
    if recipe.zero.stage == 3:
        gathers = (2 + again) * len(segments) * micro_batches(recipe)
        between += others * weights * size * gathers
    return in_node, between


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, most or number) + 1) if number % d == 0]
