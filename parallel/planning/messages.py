"""What one rank sends and receives in an optimizer step, message by message, under ZeRO 1. Nothing here imports torch.

The tests compare it with what real ranks ask of their process groups, in layouts of up to 512 ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from powernap.model.part import FP32, Weight
from powernap.model.segments import Segment
from powernap.parallel.planning.groups import stage_groups, trained
from powernap.parallel.planning.memory import (
    BF16,
    REDUCE_BUCKET,
    bytes_per_number,
    padded_size,
    stage_parameters,
)
from powernap.parallel.planning.timeline import FORWARD, Step, needs, schedule
from powernap.parallel.planning.work import Recipe, head_chunks, micro_batches, recomputes_head

INT64 = 8  # bytes
COUNTS = 3  # numbers that data ranks sum before a step: loss tokens, samples left out, a checksum
LOSS_SUMS = 3  # over vocabulary ranks, of each token: the largest logit, the target's, the sum of exponentials


class Message(NamedTuple):
    """A part in a collective, or one side of a send."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "send", "receive"]
    ranks: tuple[int, ...]  # who take part; of a send or receive, the other side
    numbers: int  # of the whole: what an all-gather yields and a reduce-scatter starts from
    size: int  # bytes of a number

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, in a ring."""
        ring = (len(self.ranks) - 1) / len(self.ranks)
        share = {"all-reduce": 2 * ring, "all-gather": ring, "reduce-scatter": ring, "send": 1, "receive": 0}
        return share[self.kind] * self.numbers * self.size


class Groups(NamedTuple):
    """A rank's process groups, members in order. Megatron-core counts tensor ranks first, then data, then stages."""

    tensor: tuple[int, ...]
    data: tuple[int, ...]
    pipeline: tuple[int, ...]
    model: tuple[int, ...]  # tensor and pipeline ranks of one data rank
    embedding: tuple[int, ...]  # the first and the last stage


def groups_of(recipe: Recipe, rank: int) -> Groups:
    """The groups that `rank` is in."""
    tensor, data, pipeline = recipe.parallel.tensor, recipe.parallel.data, recipe.parallel.pipeline
    stage_size = tensor * data
    first, in_stage = rank - rank % tensor, rank % stage_size
    stages = tuple(range(in_stage, stage_size * pipeline, stage_size))
    of_data = first % stage_size
    return Groups(
        tensor=tuple(range(first, first + tensor)),
        data=tuple(range(rank - in_stage + rank % tensor, rank - in_stage + stage_size, tensor)),
        pipeline=stages,
        model=tuple(
            start + of_data + t for start in range(0, stage_size * pipeline, stage_size) for t in range(tensor)
        ),
        embedding=(stages[0], stages[-1]) if pipeline > 1 else stages,
    )


def messages(recipe: Recipe, segments: list[Segment], rank: int) -> list[Message]:
    """All messages between ranks in one optimizer step of `rank`, in order; those of one rank with itself left out.

    Sends and receives are in the order of the schedule's steps; Megatron-core posts receives earlier. As if every token
    of a window that is read bore loss. The step is one that records no metrics of fast weights; its optimizer is not Muon,
    which gathers matrices, nothing is frozen, and
    segments are recomputed as wholes or not at all.
    """
    assert recipe.zero.stage == 1 and recipe.optimizer.name != "muon" and recipe.train.recompute in ("none", "segment")
    place = _Place(recipe, segments, rank)
    assert len(trained(recipe, place.weights)) == len(place.weights)
    return [message for message in place.step() if len(message.ranks) > 1 or message.kind in ("send", "receive")]


class _Layer(NamedTuple):
    """A product, norm or embedding that several tensor ranks compute together."""

    forward: tuple[Message, ...] = ()
    backward: tuple[Message, ...] = ()
    kept: bool = True  # whether a tensor is saved for the backward pass after its forward messages


class _Place:
    """A rank, and all that its messages depend on."""

    def __init__(self, recipe: Recipe, segments: list[Segment], rank: int):
        self.recipe, self.segments, self.groups = recipe, segments, groups_of(recipe, rank)
        self.stages, self.stage = recipe.parallel.pipeline, self.groups.pipeline.index(rank)
        self.blocks, self.size = recipe.stage_blocks[self.stage], bytes_per_number(recipe)
        self.is_first, self.is_last = self.stage == 0, self.stage == self.stages - 1
        self.weights = stage_parameters(recipe, self.stage)

    def step(self) -> Iterator[Message]:
        yield Message("all-reduce", self.groups.data, COUNTS, INT64)
        for step in schedule(self.stages, micro_batches(self.recipe), len(self.segments))[self.stage]:
            yield from self._received(step)
            yield from self._forward(step.chunk) if step.kind == FORWARD else self._backward(step.chunk)
            yield from self._sent(step)
        yield Message("all-reduce", self.groups.pipeline, 1, FP32)  # the loss, known on the last stage
        yield from self._shared_gradients()
        yield from self._optimizer()
        yield Message("all-reduce", self.groups.data, 1, FP32)  # the loss of all data ranks

    # -------------------------------------------------------------------------------- along the pipeline

    def _received(self, step: Step) -> Iterator[Message]:
        for stage, _ in needs(self.stage, step, self.stages, len(self.segments)):
            if stage != self.stage:
                yield Message("receive", (self.groups.pipeline[stage],), self._hidden(self._longest), self.size)

    def _sent(self, step: Step) -> Iterator[Message]:
        """To whom needs it: the stage whose step, of the same segment or its neighbour, waits for this one."""
        chunks = len(self.segments)
        for stage in {(self.stage + 1) % self.stages, (self.stage - 1) % self.stages} - {self.stage}:
            following = (step._replace(chunk=chunk) for chunk in range(step.chunk - 1, step.chunk + 2))
            theirs = (other for other in following if 0 <= other.chunk < chunks)
            if any((self.stage, step) in needs(stage, other, self.stages, chunks) for other in theirs):
                yield Message("send", (self.groups.pipeline[stage],), self._hidden(self._longest), self.size)

    @property
    def _longest(self) -> int:
        return max(len(segment.tokens) for segment in self.segments)

    def _hidden(self, tokens: int, shards: int | None = None) -> int:
        """Numbers of a micro-batch's hidden states between blocks."""
        shards = self.recipe.sequence_shards if shards is None else shards
        return tokens // shards * self.recipe.micro_batch_size * self.recipe.model.hidden_size

    # -------------------------------------------------------------------------------- inside a segment

    def _forward(self, index: int) -> Iterator[Message]:
        segment = self.segments[index]
        for layer in [*self._layers(segment), *self._head_gather(segment), *self._head_chunks(segment)]:
            yield from layer.forward

    def _backward(self, index: int) -> Iterator[Message]:
        """The head's chunks from the last to the first, each computed again; then the segment."""
        segment, recompute = self.segments[index], self.recipe.train.recompute == "segment"
        chunks = self._head_chunks(segment)
        for chunk in reversed(chunks):
            yield from chunk.forward if recomputes_head(self.recipe, segment) else ()
            yield from chunk.backward
        if not segment.with_grad:
            return
        layers = self._layers(segment)
        # A last sum over ranks saves nothing: it comes back before the rest is computed again, without it.
        last = [layers.pop()] if layers and not layers[-1].kept else []
        for layer in last:
            yield from layer.backward
        for layer in layers if recompute else []:
            yield from layer.forward
        for layer in reversed(layers):
            yield from layer.backward

    def _layers(self, segment: Segment) -> list[_Layer]:
        """Of this stage's blocks that the segment runs."""
        layers = []
        if self.is_first and (segment.from_embeddings or self.recipe.sleep.reinject_embeddings):
            layers.append(self._row(segment))  # each rank looks up the words that it has
        for block in self.blocks:
            if block in segment.blocks:
                only_writes = segment.state_only and block == segment.blocks.stop - 1
                layers += self._block(segment, block, only_writes)
        return layers

    def _block(self, segment: Segment, block: int, only_writes: bool) -> Iterator[_Layer]:
        model = self.recipe.model
        mixer, norms = model.mixer(block), model.block_norms(block)
        inside = mixer.weights(model)
        yield from (self._column(segment, w, mixer.gathered) for w in inside if w.is_matrix and w.split == 0)
        if only_writes:
            return
        yield from (self._norm(segment, w) for w in inside if len(w.shape) == 1 and w.name.endswith("norm.weight"))
        yield self._row(segment, kept="post_mixer_layernorm" in norms)
        if model.has_mlp(block):
            yield from (self._column(segment, w) for w in model.mlp.weights(model) if w.split == 0)
            yield self._row(segment, kept="post_mlp_layernorm" in norms)

    def _column(self, segment: Segment, weight: Weight, gathered: tuple[str, ...] = ()) -> _Layer:
        """A product whose result is split, unless every rank then gathers it: whole hidden states go in."""
        hidden = self._all_hidden(segment)
        forward: tuple[Message, ...] = ()
        backward: tuple[Message, ...] = (self._tensor("all-reduce", hidden),)
        if self.recipe.parallel.sequence:  # gathered again for the weight's gradient
            forward = (self._tensor("all-gather", hidden),)
            backward = (*forward, self._tensor("reduce-scatter", hidden))
        if weight.name in gathered:
            numbers = len(segment.tokens) * self.recipe.micro_batch_size * weight.shape[0]
            forward = (*forward, self._tensor("all-gather", numbers))
            backward = (self._tensor("all-reduce", numbers), *backward)
        return _Layer(forward, backward)

    def _row(self, segment: Segment, kept: bool = False) -> _Layer:
        """A product whose input is split: a partial sum comes out."""
        whole = self._all_hidden(segment)
        if self.recipe.parallel.sequence:
            return _Layer((self._tensor("reduce-scatter", whole),), (self._tensor("all-gather", whole),), kept)
        return _Layer((self._tensor("all-reduce", whole),), kept=kept)

    def _norm(self, segment: Segment, weight: Weight) -> _Layer:
        """Inside a mixer: over each head, with a weight that all ranks share; or over the width of all heads."""
        if weight.split is None:
            return _Layer(backward=(self._tensor("all-reduce", weight.size(), FP32),))
        squares = self._tensor("all-reduce", len(segment.tokens) * self.recipe.micro_batch_size, FP32)
        return _Layer((squares,), (squares,))

    def _all_hidden(self, segment: Segment) -> int:
        return self._hidden(len(segment.tokens), shards=1)

    def _tensor(self, kind, numbers: int, size: int | None = None) -> Message:
        return Message(kind, self.groups.tensor, numbers, size or self.size)

    # -------------------------------------------------------------------------------- the head

    def _head_gather(self, segment: Segment) -> list[_Layer]:
        if not (segment.predicts and self.is_last and self.recipe.parallel.sequence):
            return []
        return [_Layer((self._tensor("all-gather", self._all_hidden(segment)),))]

    def _head_chunks(self, segment: Segment) -> list[_Layer]:
        if not (segment.predicts and self.is_last):
            return []
        tokens, chunks = len(segment.tokens) * self.recipe.micro_batch_size, head_chunks(self.recipe, segment)
        layers = []
        for number in range(chunks):
            rows = tokens // chunks + (number < tokens % chunks)
            sums = (self._tensor("all-reduce", rows, FP32),) * LOSS_SUMS
            layers.append(_Layer(sums, (self._tensor("all-reduce", rows * self.recipe.model.hidden_size),)))
        return layers

    # -------------------------------------------------------------------------------- after the last backward pass

    def _shared_gradients(self) -> Iterator[Message]:
        """Of weights that several ranks of a model hold: see `sum_shared_gradients`."""
        if self.recipe.parallel.sequence:
            norms = [w for w in self.weights if len(w.shape) == 1 and ".self_attention." not in w.name]
            yield from (self._tensor("all-reduce", norm.size(), FP32) for norm in norms)
        if self.recipe.model.tie_embeddings and self.stages > 1 and (self.is_first or self.is_last):
            (embedding,) = (w for w in self.weights if w.name == "embedding.weight")
            yield Message("all-reduce", self.groups.embedding, embedding.size(self.recipe.parallel.tensor), FP32)

    def _optimizer(self) -> Iterator[Message]:
        """Gradients averaged, their norm, weights gathered (deepspeed 0.19.8: bf16_optimizer.py, stage_1_and_2.py)."""
        tensor, data = self.recipe.parallel.tensor, self.groups.data
        groups = [[w.size(tensor) for w in group.weights] for group in stage_groups(self.recipe, self.weights)]
        padded = [padded_size(sizes, len(data)) for sizes in groups]
        if self.size == BF16:
            yield from (Message("all-reduce", data, numbers, FP32) for numbers in _filled(padded))
            yield Message("all-reduce", self.groups.model, 1, FP32)
        elif len(data) == 1:
            yield Message("all-reduce", self.groups.model, len(groups), FP32)
        else:
            sizes = [size for group in groups for size in group]
            bucket = min(REDUCE_BUCKET, sum(sizes))
            yield from (Message("all-reduce", data, numbers, FP32) for numbers in _within(sizes, bucket))
            for _ in groups:
                yield Message("all-reduce", data, 1, FP32)
                yield Message("all-reduce", self.groups.model, 1, FP32)
        yield from (Message("all-gather", data, numbers, self.size) for numbers in padded)
        unrounded = sum(weight.size(tensor) for weight in self.weights if weight.float32)
        if self.size == BF16 and unrounded:
            yield Message("all-reduce", data, unrounded, FP32)


def _filled(sizes: Sequence[int]) -> Iterator[int]:
    """Sums of consecutive sizes, each closed by the one with which it is more than a bucket."""
    total = 0
    for size in sizes:
        total += size
        if total > REDUCE_BUCKET:
            yield total
            total = 0
    if total:
        yield total


def _within(sizes: Sequence[int], bucket: int) -> Iterator[int]:
    """Sums of consecutive sizes, each at most a bucket."""
    total = 0
    for size in sizes:
        if total + size > bucket:
            yield total
            total = 0
        total += size
    if total:
        yield total
