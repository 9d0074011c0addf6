"""Memory of a rank, computed before any process starts. Nothing here imports torch.

Parameters, gradients, optimizer states and the saved inputs of live segments are exact: the tests compare them with the
tensors of real ranks. Activations are the tensors that torch saves on a CPU; on CUDA they are an unmeasured estimate.
`RESERVE` covers CUDA, NCCL and the allocator.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from powernap.model.parameters import parameters
from powernap.model.part import FP32, Device, Mixer, Weight
from powernap.model.segments import Segment
from powernap.parallel.planning.groups import stage_groups
from powernap.parallel.planning.teacher import teacher_bytes
from powernap.parallel.planning.timeline import BACKWARD, FORWARD, Step, schedule
from powernap.parallel.planning.work import Recipe, head_chunks, micro_batches, recomputes_head, round_up

BF16 = 2  # bytes
RESERVE = 0.1  # of a device's memory: CUDA's context, NCCL's buffers, fragments
REDUCE_BUCKET = 500_000_000  # elements per reduction of gradients: DeepSpeed's default
PLACEHOLDER = 1  # elements, in an optimizer's group without weights on a stage
GATHERED = 1_000_000_000  # elements that ZeRO 3 keeps gathered (deepspeed 0.19.8: stage3_max_reuse_distance)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank."""

    weights: int  # a teacher's, too
    gradients: int  # as they are accumulated
    optimizer: int  # float32 master weights, if weights are not, and moments; 0 if offloaded
    buffers: int  # DeepSpeed's others during the backward passes
    segments: int  # hidden states, fast weights and cached keys and values of the live segments; carried states
    activations: int  # estimate: of what is computed again at once, and what live segments keep besides their inputs
    step: int  # DeepSpeed's, besides the first three, while gradients are reduced and the optimizer steps
    total: int  # peak: of the backward passes or of the optimizer step
    host: int  # offloaded optimizer states
    host_inputs: int  # offloaded inputs of the live segments; then `segments` are those of two


def stage_memory(recipe: Recipe, segments: list[Segment], stage: int, device: Device = "cuda") -> MemoryEstimate:
    """Bytes of a rank of one pipeline stage."""
    weights, gradients, optimizer, buffers, step = state_bytes(recipe, stage_parameters(recipe, stage))
    saved, most, inputs = replay(recipe, segments, stage, device)
    teacher, taught = teacher_bytes(recipe, segments, stage, bytes_per_number(recipe))
    weights, saved, most = weights + teacher, saved + taught, most + taught
    host = optimizer if recipe.zero.offload else 0
    total = weights + gradients + optimizer - host + max(buffers + most, step)
    return MemoryEstimate(weights, gradients, optimizer - host, buffers, saved, most - saved, step, total, host, inputs)


def fits(memory: MemoryEstimate, limit: int) -> bool:
    """Whether a rank's bytes leave the reserve free."""
    return memory.total <= (1 - RESERVE) * limit


def stage_parameters(recipe: Recipe, stage: int) -> tuple[Weight, ...]:
    """By name in the whole model."""
    return parameters(recipe.model, recipe.sleep, recipe.stage_blocks[stage])


class States(NamedTuple):
    """Bytes of one rank that do not depend on the batch; fields as in `MemoryEstimate`."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    step: int


def state_bytes(recipe: Recipe, weights: Sequence[Weight]) -> States:
    """What ZeRO allocates for a stage with these parameters (deepspeed 0.19.8). Of frozen ones only the weights.

    ZeRO 1 and 2 flatten each parameter group and pad it to a multiple of twice the data ranks (stage_1_and_2.py,
    bf16_optimizer.py: nccl_start_alignment_factor = 2); ZeRO 3 pads each parameter to a multiple of the data ranks
    (partition_parameters.py: _padding_size). The optimizer steps a float32 copy of its partition; weights that are float32
    at ZeRO 1 are their own masters (zero.py). In bf16 every rank holds the values of gates in float32, too (zero.py:
    _Unrounded).

    Gradients are float32 and whole at every ZeRO stage: each segment adds to all of them, so none can be reduced before
    the last backward pass of a step. Besides them ZeRO 1 has a float32 bucket while it reduces (allreduce_bucket), in
    fp32 then its partition; neither where one data rank steps alone, but for Muon; offloaded in fp32 it has the bucket all
    the time (setup_buckets). ZeRO 2 has a bucket and its partition while it reduces; ZeRO 3 has both all the time
    (stage3.py: _setup_for_real_optimizer), and every gathered parameter that it expects to reuse soon.
    """
    ranks, stage, size = recipe.parallel.data, recipe.zero.stage, bytes_per_number(recipe)
    frozen = sum(
        math.ceil(w.size(recipe.parallel.tensor) / (ranks if stage == 3 else 1))
        for w in weights
        if not recipe.train.trains(w.name)
    )
    whole = padded = held = moments = 0  # elements: all, with padding, this rank's, this rank's moments
    for group in stage_groups(recipe, weights):
        sizes = [w.size(recipe.parallel.tensor) for w in group.weights] or [PLACEHOLDER]
        part = sum(math.ceil(n / ranks) for n in sizes) if stage == 3 else padded_size(sizes, ranks) // ranks
        whole += sum(sizes)
        padded, held, moments = padded + part * ranks, held + part, moments + part * group.moments
        if group.is_muon:
            moments += _most_momentum(sizes, part) - part
    bucket = FP32 * min(REDUCE_BUCKET, whole)
    unrounded = FP32 * sum(w.size(recipe.parallel.tensor) for w in weights if w.float32) if size == BF16 else 0
    gradients, optimizer = FP32 * whole, FP32 * (held + moments)
    if stage == 3:
        gathered = size * min(GATHERED, sum(w.size(recipe.parallel.tensor) for w in weights))
        buffers = FP32 * held + bucket
        return States(size * (held + frozen) + unrounded, gradients, optimizer, buffers + gathered, buffers)
    weight_bytes = size * (padded + frozen) + unrounded
    if stage == 2:
        return States(weight_bytes, gradients, optimizer, 0, FP32 * held + bucket)
    if size == BF16:
        return States(weight_bytes, FP32 * padded, optimizer, 0, bucket)
    if recipe.zero.offload:
        return States(weight_bytes, FP32 * padded, optimizer, bucket, bucket)
    alone = ranks == 1 and recipe.optimizer.name != "muon"
    return States(weight_bytes, FP32 * padded, FP32 * moments, 0, 0 if alone else max(bucket, FP32 * held))


def _most_momentum(sizes: list[int], part: int) -> int:
    """Numbers on the fullest data rank: Muon keeps the whole momentum of each matrix of which a rank steps a part."""
    places = list(zip(sizes, accumulate(sizes), strict=True))
    starts = range(0, sum(sizes), part)
    return max(sum(n for n, end in places if start < end and end - n < start + part) for start in starts)


def padded_size(sizes: list[int], ranks: int) -> int:
    """Elements of a parameter group under ZeRO 1 and 2, the same on each of `ranks` data ranks."""
    return round_up(sum(sizes), 2 * ranks)


def bytes_per_number(recipe: Recipe) -> int:
    return BF16 if recipe.train.precision == "bf16" else FP32


def replay(recipe: Recipe, segments: list[Segment], stage: int, device: Device) -> tuple[int, int, int]:
    """Run a stage's schedule with bytes in place of tensors.

    Returns:
        (peak of what live segments keep, peak with activations, peak of offloaded inputs in host memory)
    """
    blocks = recipe.stage_blocks[stage]
    alike = [_shape(segment) for segment in segments]  # there are many segments, of few shapes
    of_shape = {s: (activations(recipe, blocks, s, device), head_bytes(recipe, blocks, s, device)) for s in set(alike)}
    computed, heads = zip(*(of_shape[shape] for shape in alike), strict=True)
    longest = hidden_bytes(recipe, max(len(s.tokens) for s in segments))
    # In a pipeline: hidden states received for the next segment, a gradient received, a gradient sent; and a segment's
    # input stays until the next backward pass is done.
    in_pipeline = recipe.parallel.pipeline > 1
    passing, late = 3 * longest * in_pipeline, 0
    steps = stage_steps(recipe, len(segments), stage)
    if recipe.train.offload_inputs:
        held, host = _offloaded(_offloaded_inputs(recipe, blocks, segments, device), steps)
    else:
        handed = [handed_on(recipe, blocks, segments, index, longest) for index in range(len(segments))]
        held, host = _kept(handed, steps), 0
    # Under sleep.carry: the initial states of all sequences, and the final states of those that are done.
    state = fast_weight_bytes(recipe, blocks) if recipe.sleep.carry else 0
    saved = state * (2 * micro_batches(recipe) - len(steps) // (2 * len(segments)))
    kept = most_saved = most = 0
    for (kind, _, index), inputs in zip(steps, held, strict=True):
        now = saved + inputs + late
        if kind == FORWARD or recipe.train.offload_inputs:
            most_saved = max(most_saved, now)
        if kind == FORWARD:
            kept += heads[index].kept + computed[index].kept
            most = max(most, now + kept + passing + heads[index].chunk)
            continue
        most = max(most, now + kept + passing + heads[index].chunk)  # the head first, then the segment
        kept -= heads[index].kept
        segment = heads[index].tied + computed[index].again
        # The embedding's gradient comes last, when activations are gone; a tied head's is added to it, into a third tensor.
        embedded = embedding_bytes(recipe, blocks, segments[index]) * (3 if heads[index].tied else 1)
        most = max(most, now + kept + passing + max(segment, embedded - computed[index].kept))
        saved += state if index + 1 == len(segments) else 0
        kept -= computed[index].kept
        late = longest * (in_pipeline and not recipe.train.offload_inputs and (blocks.start > 0 or index > 0))
    return most_saved, most, host


def _shape(segment: Segment) -> Segment:
    """The segment without what its activations do not depend on."""
    tokens = range(len(segment.tokens))
    return replace(segment, window=0, pass_number=0, position=0, cached=(), tokens=tokens, final_blocks=range(0))


def _kept(handed: list[int], steps: Sequence[Step]) -> list[int]:
    """Bytes that live segments keep during each step, given what each of a sequence's keeps."""
    now, held = 0, []
    for kind, _, index in steps:
        now += handed[index] if kind == FORWARD else 0
        held.append(now)
        now -= handed[index] if kind == BACKWARD else 0
    return held


class OffloadedInputs(NamedTuple):
    """Bytes of one segment under train.offload_inputs."""

    read: int  # its inputs
    new: int  # of these, what no earlier segment has in host memory already
    left: int  # states and hidden states for the next segment, until that runs


def _offloaded(inputs: list[OffloadedInputs], steps: Sequence[Step]) -> tuple[list[int], int]:
    """(bytes of inputs on the device during each step, most in host memory)."""
    backward = [step for step in steps if step.kind == BACKWARD]
    following = dict(pairwise(backward))
    waiting: dict[int, int] = {}  # micro-batch -> bytes for its next segment
    done: set[Step] = set()
    held, host, most, fetched = [], 0, 0, 0
    for step in steps:
        own = inputs[step.chunk]
        if step.kind == FORWARD:
            waiting.pop(step.micro_batch, None)
            done.add(step)
            host += own.new
            most = max(most, host)
            held.append(sum(waiting.values()) + own.read + own.left + fetched)
            waiting[step.micro_batch] = own.left
            continue
        after = following.get(step)
        fetched = inputs[after.chunk].read if after and after._replace(kind=FORWARD) in done else 0
        held.append(sum(waiting.values()) + own.read + fetched)
        host -= own.new
    return held, most


def _offloaded_inputs(recipe: Recipe, blocks: range, segments: list[Segment], device: Device) -> list[OffloadedInputs]:
    """Of each segment of a micro-batch. A state that a segment leaves as it was is copied once."""
    mixers = recipe.model.mixers
    states = {b: _state_bytes(recipe, mixers[b], 0) for b in blocks if mixers[b].has_state(recipe.sleep)}
    fresh, found = dict(states), []
    for index, segment in enumerate(segments):
        by_block = recipe.train.recompute == "blocks"
        taken = [block for block in states if not by_block or block in segment.blocks] if segment.with_grad else []
        received = index > 0 if recipe.parallel.pipeline == 1 else index > 0 or blocks.start > 0
        received = received and not (blocks.start == 0 and segment.from_embeddings)
        number = received + (_more_inputs(recipe, blocks, segment) if by_block else 0)
        hidden = [hidden_bytes(recipe, len(segment.tokens))] * (number if segment.with_grad else 0)
        read = sum(states[block] for block in taken) + sum(hidden)
        new = [fresh.pop(block) for block in taken if block in fresh] + hidden
        written = written_states(recipe, blocks, segment)
        fresh |= written
        states |= written
        last = index + 1 == len(segments)
        next_pass = not last and recipe.parallel.pipeline == 1 and not segments[index + 1].from_embeddings
        left = sum(states.values()) + next_pass * hidden_bytes(recipe, len(segment.tokens))
        found.append(OffloadedInputs(read, sum(_pinned(size, device) for size in new), 0 if last else left))
    return found


def _pinned(size: int, device: Device) -> int:
    """Bytes of host memory for `size`: torch rounds pinned memory up to a power of two (CachingHostAllocator)."""
    return 1 << (size - 1).bit_length() if size and device == "cuda" else size


def stage_steps(recipe: Recipe, segments: int, stage: int):
    """A stage's steps while its memory grows: three groups of micro-batches; without a pipeline one micro-batch."""
    stages = recipe.parallel.pipeline
    return schedule(stages, 1 if stages == 1 else min(micro_batches(recipe), 3 * stages), segments)[stage]


def handed_on(recipe: Recipe, blocks: range, segments: list[Segment], index: int, longest: int) -> int:
    """Bytes that segment `index` of one micro-batch keeps from its forward to the end of its backward pass.

    Its new fast weights and caches; on a single stage the hidden states for the next pass; in a pipeline its input, of
    the `longest` window's length: its output is dropped.
    """
    segment, last = segments[index], index + 1 == len(segments)
    states = written_bytes(recipe, blocks, segment)
    if index == 0 and not recipe.sleep.carry:
        kept = segment.with_grad and _begins_a_graph(recipe, blocks)
        unread = [] if kept else writing_blocks(recipe, blocks, segment)  # their zeros are not kept
        states += fast_weight_bytes(recipe, [block for block in blocks if block not in unread])
    if recipe.parallel.pipeline == 1:
        feeds_next_pass = not last and not segments[index + 1].from_embeddings
        return states + feeds_next_pass * hidden_bytes(recipe, len(segment.tokens))
    received = blocks.start > 0 or index > 0
    return states + received * longest


def _begins_a_graph(recipe: Recipe, blocks: range) -> bool:
    """Whether something that a sequence's first segment uses on a stage has a gradient: a weight, or hidden states received."""
    weights = parameters(recipe.model, recipe.sleep, blocks)
    return blocks.start > 0 or any(recipe.train.trains(weight.name) for weight in weights)


def hidden_bytes(recipe: Recipe, tokens: int) -> int:
    """Hidden states of a window, [L/shards, b, D]."""
    numbers = tokens // recipe.sequence_shards * recipe.micro_batch_size * recipe.model.hidden_size
    return numbers * bytes_per_number(recipe)


def fast_weight_bytes(recipe: Recipe, blocks: Iterable[int]) -> int:
    """Fast weights of a micro-batch, float32, [b, heads/TP, rows, columns] for each block that has any."""
    mixers = recipe.model.mixers
    return sum(_state_bytes(recipe, mixers[block], 0) for block in blocks if mixers[block].has_fast_weights)


def _state_bytes(recipe: Recipe, mixer: Mixer, cached: int) -> int:
    """Bytes of what a block hands from window to window."""
    one = mixer.state_bytes(recipe.model, bytes_per_number(recipe), cached)
    return recipe.micro_batch_size * one // recipe.parallel.tensor


def writing_blocks(recipe: Recipe, blocks: range, segment: Segment) -> list[int]:
    """The `blocks` whose fast weights, if any, the segment changes."""
    if segment.probe:
        return []
    run = segment.blocks if recipe.sleep.write == "every" else segment.final_blocks
    return [block for block in blocks if block in run]


def written_bytes(recipe: Recipe, blocks: range, segment: Segment) -> int:
    """Bytes of a segment's new fast weights and caches: an unchanged state stays the same tensor.

    Under sliding eviction an attention block's last pass over a window caches keys and values.
    """
    return sum(written_states(recipe, blocks, segment).values())


def written_states(recipe: Recipe, blocks: range, segment: Segment) -> dict[int, int]:
    """Block -> bytes of its new state."""
    cached = min(recipe.model.window - 1, segment.position + len(segment.tokens))
    mixers, writing = recipe.model.mixers, writing_blocks(recipe, blocks, segment)
    cached_anew = [] if segment.probe else segment.final_blocks
    return {
        block: _state_bytes(recipe, mixers[block], cached)
        for block in blocks
        if mixers[block].has_state(recipe.sleep)
        and block in (writing if mixers[block].has_fast_weights else cached_anew)
    }


class Activations(NamedTuple):
    """Bytes of one segment on a stage, besides its inputs."""

    kept: int  # from its forward to its backward pass
    again: int  # in its backward pass alone


def activations(recipe: Recipe, blocks: range, segment: Segment, device: Device = "cuda") -> Activations:
    """What train.recompute keeps of the segment, and the most that is computed again at once."""
    recompute = recipe.train.recompute
    if not segment.with_grad:
        return Activations(0, 0)
    whole = segment_activations(recipe, blocks, segment, device)
    if recompute in ("none", "segment"):
        return Activations(whole, 0) if recompute == "none" else Activations(0, whole)
    tokens = len(segment.tokens) * recipe.micro_batch_size
    ran = [block for block in blocks if block in segment.blocks]
    write = segment.blocks.stop - 1 if segment.state_only else -1
    kept = {
        block: _products(recipe, block, block == write) if recompute == "selective" else Products(0, 0) for block in ran
    }
    own = hidden_bytes(recipe, 1) / recipe.micro_batch_size  # a block's input, if its norm keeps no copy
    own = 0 if device == "cpu" and bytes_per_number(recipe) == BF16 else own
    largest = max(
        (_block_activations(recipe, block, device, block == write) - kept[block].saved - own for block in ran),
        default=0,
    )
    inputs = _more_inputs(recipe, blocks, segment) * hidden_bytes(recipe, len(segment.tokens))
    held = inputs + int(tokens * sum(sum(products) for products in kept.values()))
    again = max(0, int(tokens * largest))
    if recompute == "nested":
        return Activations(0, held + again)
    return Activations(0 if recipe.train.offload_inputs else held, again)


def _more_inputs(recipe: Recipe, blocks: range, segment: Segment) -> int:
    """Number of hidden states that are inputs of blocks, besides the one that the stage receives."""
    ran = sum(block in segment.blocks for block in blocks)
    changed = segment.from_embeddings or recipe.sleep.pass_norm or recipe.sleep.reinject_embeddings
    return ran if blocks.start == 0 and changed else max(0, ran - 1)


class Products(NamedTuple):
    """Bytes per token of what train.recompute=selective keeps of one block, besides its input."""

    saved: float  # by autograd, too
    others: float  # of projections back to the hidden width, whole on every tensor rank


def _products(recipe: Recipe, block: int, state_only: bool) -> Products:
    model, number, tensor = recipe.model, bytes_per_number(recipe), recipe.parallel.tensor
    mixer = model.mixer(block)
    parts = [mixer, model.mlp] if model.has_mlp(block) and not state_only else [mixer]
    matrices = [w for part in parts for w in part.weights(model) if w.is_matrix]
    inner = sum(number * w.shape[0] for w in matrices if w.split == 0)
    if state_only:
        return Products(inner / tensor, 0)
    outer = sum(number * w.shape[0] for w in matrices if w.split == 1)
    return Products((inner + mixer.kept_bytes(model, number)) / tensor, outer)


def segment_activations(recipe: Recipe, blocks: range, segment: Segment, device: Device = "cuda") -> int:
    """Bytes that autograd saves in one segment's forward pass over `blocks`: an estimate, see `_block_activations`."""
    ran = [block for block in blocks if block in segment.blocks]
    last_write = segment.blocks.stop - 1 if segment.state_only else -1
    per_token = sum(_block_activations(recipe, block, device, block == last_write) for block in ran)
    return int(per_token * len(segment.tokens) * recipe.micro_batch_size)


class HeadBytes(NamedTuple):
    """Of norm, head and loss after a segment."""

    kept: int  # until its backward pass
    chunk: int  # while a chunk is computed, forward or back
    tied: int  # a tied embedding's gradient, from the head until the segment begins from the same weight


def head_bytes(recipe: Recipe, blocks: range, segment: Segment, device: Device = "cuda") -> HeadBytes:
    """As if every token of a window that is read bore loss: a recipe does not tell how many do."""
    model, size = recipe.model, bytes_per_number(recipe)
    if not segment.predicts or blocks.stop != model.num_layers:
        return HeadBytes(0, 0, 0)
    tokens = len(segment.tokens) * recipe.micro_batch_size
    vocabulary = model.vocabulary_rows(recipe.parallel.tensor)
    norm, rows = _norm(recipe, device), model.hidden_size * size
    weight = vocabulary * rows
    tied = embedding_bytes(recipe, blocks, segment) * model.tie_embeddings
    softmax = vocabulary * FP32
    gradients = 2 * softmax  # of the losses by log-probabilities, and by logits
    chunks = head_chunks(recipe, segment)
    if not recomputes_head(recipe, segment):
        return HeadBytes(int(tokens * (norm + softmax)), int(tokens * gradients), tied)
    sums = (chunks > 1) * weight  # of its gradients from the chunks that are done
    if recipe.parallel.sequence:  # normed before they are gathered
        return HeadBytes(int(tokens * (norm + rows)), int(tokens / chunks * (softmax + gradients)) + sums, tied)
    return HeadBytes(tokens * rows, int(tokens / chunks * (norm + softmax + gradients)) + sums, tied)


def embedding_bytes(recipe: Recipe, blocks: range, segment: Segment) -> int:
    """The gradient of the embedding by a segment that reads it: as large as the embedding."""
    reads = blocks.start == 0 and segment.from_embeddings and segment.with_grad
    if not reads or not recipe.train.trains("embedding.weight"):
        return 0
    model = recipe.model
    return model.vocabulary_rows(recipe.parallel.tensor) * model.hidden_size * bytes_per_number(recipe)


def _block_activations(recipe: Recipe, block: int, device: Device, state_only: bool = False) -> float:
    """Bytes per token that autograd saves in one block.

    On a CPU the tensors that torch saves, as the tests measure. On CUDA taken from sources, not measured.
    """
    model, norm = recipe.model, _norm(recipe, device)
    arguments = (model, recipe.sleep, bytes_per_number(recipe), device, state_only)
    inside = model.mixer(block).activation_bytes(*arguments)
    if model.has_mlp(block):
        inside += model.mlp.activation_bytes(*arguments)
    masks = 0.0
    if recipe.train.dropout and not state_only:  # its masks
        masks = (1 + model.has_mlp(block)) * model.hidden_size * bytes_per_number(recipe) / recipe.sequence_shards
    norms = [name for name in model.block_norms(block) if not state_only or name == "input_layernorm"]
    # What a norm after a mixer or MLP returns is added to the residual stream, which is kept only where no norm follows it.
    added = 0.0
    if model.mixer(block).norms == "sandwich" and not state_only:
        added = len(norms) / 2 * model.hidden_size * bytes_per_number(recipe) / recipe.sequence_shards
    return (
        norm * len(norms) - added + masks + inside / recipe.parallel.tensor - _frozen_inputs(recipe, block, state_only)
    )


def _frozen_inputs(recipe: Recipe, block: int, state_only: bool) -> float:
    """Per token, of the inputs of frozen matrices: no gradient needs them."""
    weights = parameters(recipe.model, recipe.sleep, range(block, block + 1))
    inside = [w for w in weights if w.is_matrix and w.name.startswith("decoder.layers.")]
    frozen = [w for w in inside if not recipe.train.trains(w.name)]
    numbers = 0.0
    for weight in frozen:
        if not (state_only and (weight.split == 1 or ".mlp." in weight.name)):
            numbers += weight.shape[1] / (recipe.parallel.tensor if weight.split == 1 else recipe.sequence_shards)
    return numbers * bytes_per_number(recipe)


def _norm(recipe: Recipe, device: Device) -> float:
    """Per token, of an RMSNorm: input, normalised, output; on CUDA without the second; on CPUs float32 inside."""
    inside = {"cuda": bytes_per_number(recipe), "cpu": 2 * FP32}[device]
    return recipe.model.hidden_size * (inside + bytes_per_number(recipe)) / recipe.sequence_shards
