"""Forward and backward over the micro-batches of one optimizer step.

A segment hands two things on: hidden states to the next stage (from the last stage to the first: the next pass), and
fast weights to the next segment on the same stage. In a pipeline every segment is a virtual chunk of Megatron-core's
interleaved 1F1B (arXiv 2104.04473), all chunks sharing the weights of their stage; on one stage the same segments run in
a loop. The result is that of model/sleep.py, which every layout is tested against.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from powernap.model.batch import find_loss_tokens
from powernap.model.fast_weights import LayerStates, detach
from powernap.model.health import FastWeightHealth
from powernap.model.megatron import MegatronModule, ModelType, interleaved_1f1b, one_f_one_b
from powernap.model.recompute import Recompute, keeps_logits, run_segment
from powernap.model.segments import Segment, SegmentError
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel import cpu
from powernap.parallel.host_inputs import HostInputs, release
from powernap.parallel.planning.timeline import BACKWARD, FORWARD, Step, needs, schedule
from powernap.parallel.topology import Topology


@dataclass
class MicroBatch:
    segments: list[Segment]
    tokens: torch.Tensor  # [b, T]
    loss_mask: torch.Tensor  # [b, T]
    layer_states: LayerStates | None = None  # this stage's, from which the sequences start; None: zero fast weights
    document_starts: torch.Tensor | None = None  # bool [b, T]; see HybridStage.forward
    # Of each segment that predicts; found if not given.
    loss_tokens: list[torch.Tensor | None] = field(default_factory=list)
    left: LayerStates | None = None  # set by `forward_backward` under sleep.carry: the final states, detached

    def __post_init__(self) -> None:
        self.loss_tokens = self.loss_tokens or _loss_tokens(self.segments, self.loss_mask)

    @classmethod
    def on(
        cls,
        device: torch.device,
        segments: list[Segment],
        tokens: torch.Tensor,
        loss_mask: torch.Tensor,
        layer_states: LayerStates | None,
        document_starts: torch.Tensor | None = None,
    ) -> "MicroBatch":
        """From tokens and loss mask on the CPU, where finding the loss tokens waits for no GPU."""
        loss_tokens = [None if where is None else _moved(where, device) for where in _loss_tokens(segments, loss_mask)]
        if document_starts is not None:
            document_starts = _moved(document_starts, device)
        return cls(
            segments, _moved(tokens, device), _moved(loss_mask, device), layer_states, document_starts, loss_tokens
        )


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`; to a GPU from pinned memory, since another copy waits for what the GPU does."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _loss_tokens(segments: list[Segment], loss_mask: torch.Tensor) -> list[torch.Tensor | None]:
    return [find_loss_tokens(loss_mask[:, 1:][:, s.where]) if s.predicts else None for s in segments]


def forward_backward(
    stage: HybridStage,
    micro_batches: list[MicroBatch],
    loss_scale: float,
    topology: Topology,
    *,
    recompute: Recompute,
    offload_inputs: bool = False,
    health: FastWeightHealth | None = None,
) -> torch.Tensor:
    """Add every micro-batch's gradient of `loss_scale` x (sum of token losses); return the unscaled sum, on all stages.

    Gradients of weights that several ranks hold are partial sums: see `sum_shared_gradients`.

    Args:
        recompute: what is kept of each segment (model/recompute.py).
        offload_inputs: the inputs that are kept wait in host memory for their backward pass.
        health: watches the first micro-batch.
    """
    step = StageStep(stage, micro_batches, loss_scale, recompute, offload_inputs, health, topology)
    if topology.pp_size == 1:
        for number in range(len(micro_batches)):
            step.teach([number])
            _loop(step, number)
    else:
        step.teach(range(len(micro_batches)))
        _pipeline(step, topology)
    return topology.all_reduce_over_stages(step.loss)


def sum_shared_gradients(stage: HybridStage, topology: Topology, gradient_of=lambda parameter: parameter.grad) -> None:
    """All-reduce the partial gradients of weights that several ranks of a model hold.

    These are norm weights under sequence parallelism (each tensor rank saw its tokens) and a tied embedding on the
    first and last stage. Without this nothing fails, the copies silently drift apart.
    """
    if stage.config.sequence_parallel and topology.tp_size > 1:
        for parameter in stage.parameters():
            if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(gradient_of(parameter), group=topology.groups.tp)
    if stage.model.tie_embeddings and topology.pp_size > 1 and stage.embedding is not None:
        if stage.embedding.weight.requires_grad:
            dist.all_reduce(gradient_of(stage.embedding.weight), group=topology.groups.embd)


def predict(
    stage: HybridStage, batch: MicroBatch, topology: Topology
) -> tuple[torch.Tensor, torch.Tensor, LayerStates]:
    """The most likely tokens [B, T] in prediction windows, -1 elsewhere; each token's loss [B, T]; the final layer states.

    The first two are the same on every stage, the layer states are each stage's own. One stage works at a time.
    """
    segments, tokens, loss_mask = batch.segments, batch.tokens, batch.loss_mask
    if topology.pp_size == 1:
        with torch.no_grad():
            output = sleep_and_predict(
                stage,
                segments,
                tokens,
                loss_mask,
                layer_states=batch.layer_states,
                document_starts=batch.document_starts,
                recompute="none",
                predict=True,
            )
        assert output.predictions is not None and output.token_losses is not None
        return output.predictions, output.token_losses, output.layer_states
    inputs, predictions = tokens[:, :-1], torch.full_like(tokens, -1)
    losses = torch.zeros(tokens.shape, dtype=torch.promote_types(stage.dtype, torch.float32), device=stage.device)
    ring = Ring(stage, topology, longest(segments), len(tokens))
    layer_states = stage.empty_layer_states(len(tokens)) if batch.layer_states is None else batch.layer_states
    with torch.no_grad():
        for index, segment in enumerate(segments):
            needs_input = not (stage.is_first and segment.from_embeddings)
            hidden_states = ring.receive(segment) if needs_input else None
            hidden_states, layer_states = stage(segment, inputs, hidden_states, layer_states, batch.document_starts)
            if segment.predicts and stage.is_last:
                where = segment.where
                predictions[:, 1:][:, where] = stage.predictions(hidden_states)
                losses[:, 1:][:, where] = stage.token_losses(
                    hidden_states, tokens[:, 1:][:, where], loss_mask[:, 1:][:, where], batch.loss_tokens[index]
                )
            feeds_next_pass = index + 1 < len(segments) and not segments[index + 1].from_embeddings
            if not stage.is_last or feeds_next_pass:
                ring.send(hidden_states)
        for result in (predictions, losses):
            dist.broadcast(result, group=topology.groups.pp, group_src=topology.pp_size - 1)
    return predictions, losses, layer_states


class StageStep:
    """The segments of one optimizer step on this stage: runs one at a time, keeps its layer states for the next."""

    def __init__(
        self,
        stage: HybridStage,
        micro_batches: list[MicroBatch],
        loss_scale: float,
        recompute: Recompute,
        offload_inputs: bool,
        health: FastWeightHealth | None,
        topology: Topology,
    ):
        self.stage = stage
        self.topology = topology
        self.micro_batches = micro_batches
        self.loss_scale = loss_scale
        self.recompute = recompute
        self.health = health
        dtype = torch.promote_types(stage.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=dtype, device=stage.device)
        # Gives every segment a backward pass, even one without gradients: the schedule runs one.
        self._anchor = torch.zeros((), device=stage.device, requires_grad=True)
        self.host_inputs = HostInputs(stage.device, self._backward_order()) if offload_inputs else None
        self._carried: dict[int, list[torch.Tensor]] = {}  # micro-batch -> layer states for its next segment
        self._steps_done = 0
        self._sent: list[torch.Tensor] = []
        self._taught: dict[int, list[torch.Tensor | None]] = {}  # micro-batch -> a teacher's states, by segment

    def teach(self, numbers: Iterable[int]) -> None:
        """Let the teacher, if there is one, read these micro-batches, and forget what it read before."""
        teacher = self.stage.loss_terms.teacher if self.stage.loss_terms else None
        if teacher is None:
            return
        self._taught.clear()
        for number in numbers:
            self.topology.progress.note(f"the teacher reads micro-batch {number}")
            self._taught[number] = teacher.teach(self.micro_batches[number])

    def forward(
        self, number: int, index: int, received: torch.Tensor | None, link_length: int | None = None
    ) -> torch.Tensor:
        """Run segment `index` of micro-batch `number`.

        Args:
            received: hidden states [>= L, b, D] of the previous stage or pass; present but ignored on a pipeline's
                first stage when the segment starts from embeddings.
            link_length: length of a pipeline's messages, the same for every segment; None on a single stage.

        Returns:
            hidden states for the next stage or pass, [link_length or L, b, D]; a scalar if they are unused. It is the
            root of the segment's backward pass, which also consumes the fast-weight gradient of the next segment and
            seeds the loss: run segments in reverse.
        """
        self._note(FORWARD, number, index)
        batch = self.micro_batches[number]
        segment, last = batch.segments[index], index + 1 == len(batch.segments)
        needs_input = not (self.stage.is_first and segment.from_embeddings)
        hidden_states = None
        if needs_input:
            assert received is not None
            hidden_states = received[: self._length(segment)]
        layer_states: Sequence[torch.Tensor] | None
        layer_states = batch.layer_states if index == 0 else self._carried.pop(number)
        if layer_states is None:
            layer_states = self.stage.empty_layer_states(len(batch.tokens))
        read = layer_states
        hidden_states, loss, *layer_states = self._run(number, index, hidden_states, layer_states)

        if loss is not None:
            self.loss += loss.detach()
        carried = [state.detach().requires_grad_() for state in layer_states]
        if not last:
            self._carried[number] = carried
        elif self.stage.sleep.carry:
            batch.left = detach(tuple(carried))
        output_used = not (last and self.stage.is_last)
        if link_length is None:
            output_used = not last and not batch.segments[index + 1].from_embeddings
        shape = self._link_shape(link_length, batch, segment) if output_used else ()
        link = Link(shape, self.loss_scale, carried, lambda: self._begin_backward(number, index))
        hidden_states = hidden_states if output_used else None
        output = _SegmentBoundary.apply(
            link, self._anchor, self.stage.like, hidden_states, received, loss, *layer_states
        )
        if link_length is not None:
            self._keep(output)
        if self.host_inputs:  # by now they are there, and the leaves have no other use
            release(received, *(read if index else ()), *(carried if last else ()))
        return output

    def _keep(self, output: torch.Tensor) -> None:
        """Keep an output's memory alive until the schedule has waited for its isend.

        Megatron-core 0.16.1 frees an output (`output.data = ...`) as soon as its isend has begun, and waits for that isend
        only after it has begun the next one, before it runs another segment. No backend's isend keeps the memory of a
        tensor whose `.data` changes (Megatron-LM PR 4047); a second tensor on that memory does.
        """
        self._sent.append(output.detach())

    def _run(self, number, index, hidden_states, layer_states):
        stage, batch = self.stage, self.micro_batches[number]
        segment = batch.segments[index]
        inputs = batch.tokens[:, :-1]

        keeping = partial(self.host_inputs.keeping, (number, index)) if self.host_inputs else nullcontext
        health = self.health if number == 0 else None
        with (
            nullcontext() if segment.with_grad else torch.no_grad(),
            health.watch(segment) if health else nullcontext(),
        ):
            hidden_states, layer_states = run_segment(
                stage,
                segment,
                inputs,
                hidden_states,
                layer_states,
                self.recompute,
                batch.document_starts,
                inside=cpu.as_it_is,
                keeping=keeping,
            )
        if health:
            health.record(segment, layer_states)
        loss = None
        if segment.predicts and stage.is_last:
            targets, loss_mask = batch.tokens[:, 1:][:, segment.where], batch.loss_mask[:, 1:][:, segment.where]
            taught = self._taught[number][index] if self._taught else None
            again = not keeps_logits(self.recompute, segment, pipeline=self.topology.pp_size > 1)
            with cpu.as_it_is():
                loss = stage.token_losses(
                    hidden_states, targets, loss_mask, batch.loss_tokens[index], again, taught
                ).sum()
        return hidden_states, loss, *layer_states

    def _backward_order(self) -> list[tuple[int, int]]:
        """Micro-batch and segment of this stage's backward passes."""
        if self.topology.pp_size == 1:
            batches = enumerate(self.micro_batches)
            return [(number, index) for number, batch in batches for index in reversed(range(len(batch.segments)))]
        order = schedule(self.topology.pp_size, len(self.micro_batches), len(self.micro_batches[0].segments))
        return [(step.micro_batch, step.chunk) for step in order[self.topology.pp_rank] if step.kind == BACKWARD]

    def _begin_backward(self, number: int, index: int) -> None:
        self._note(BACKWARD, number, index)
        if self.host_inputs:
            self.host_inputs.begin_backward((number, index))

    def _note(self, *step) -> None:
        del self._sent[:-1]
        self._steps_done += 1
        step = Step(*step)
        self.topology.progress.note(self._name(step), self._describe, self._steps_done, step)

    def _describe(self, done: int, step: Step) -> str:
        """What this stage is doing, and what it waits for once that is done."""
        if self.topology.pp_size == 1:
            return self._name(step)
        segments, topology = len(self.micro_batches[0].segments), self.topology
        order = schedule(topology.pp_size, len(self.micro_batches), segments)
        if done == len(order[topology.pp_rank]):
            return f"{self._name(step)}, the last of this stage"
        following = order[topology.pp_rank][done]
        sources = {stage for stage, _ in needs(topology.pp_rank, following, topology.pp_size, segments)} - {
            topology.pp_rank
        }
        what = "hidden states" if following.kind == FORWARD else "their gradient"
        source = "".join(
            f", which needs {what} from {topology.describe_rank(topology.rank_of_stage(s))}" for s in sources
        )
        return f"{self._name(step)} begun; next is {self._name(following)}{source}"

    def _name(self, step: Step) -> str:
        segment = self.micro_batches[step.micro_batch].segments[step.chunk]
        kind = "forward" if step.kind == FORWARD else "backward"
        return f"{kind} of window {segment.window} pass {segment.pass_number}, micro-batch {step.micro_batch}"

    def _length(self, segment: Segment) -> int:
        """Tokens of the segment that this rank holds between blocks."""
        return len(segment.tokens) // self.stage.sequence_shards

    def _link_shape(self, link_length, batch, segment) -> tuple[int, int, int]:
        return link_length or self._length(segment), len(batch.tokens), self.stage.model.hidden_size


@dataclass
class Link:
    """A segment's handover to the next stage or pass, and to the next segment on its stage."""

    shape: tuple[int, ...]  # of the message; () if it is unused
    loss_scale: float
    carried: list[torch.Tensor]  # the next segment's layer states: leaves, whose .grad its backward pass fills
    begin_backward: Callable[[], None]


class _SegmentBoundary(torch.autograd.Function):
    """Output: the message to send. Backward: gradients for everything that the segment handed on.

    Hidden states get the gradient that came back for the message; the loss its scale; fast weights the gradient from
    the next segment's backward. The received message gets zeros on top of the gradient of its uses: it may have none,
    and its sender waits for a gradient all the same.
    """

    @staticmethod
    def forward(ctx, link, anchor, like, hidden_states, received, loss, *layer_states):
        ctx.link = link
        ctx.loss_gradient = None if loss is None else torch.full_like(loss, link.loss_scale)
        ctx.length = None if hidden_states is None else len(hidden_states)
        ctx.received = None if received is None else received.shape
        if hidden_states is None:
            return like.new_zeros(link.shape)
        missing = link.shape[0] - ctx.length
        return F.pad(hidden_states, (0, 0, 0, 0, 0, missing)) if missing else hidden_states.detach()

    @staticmethod
    def backward(ctx, gradient):
        link = ctx.link
        link.begin_backward()
        hidden_states = None if ctx.length is None else gradient[: ctx.length]
        received = None if ctx.received is None else gradient.new_zeros(ctx.received)
        # Zeros where nothing came back: the previous stage still waits for the gradient of its message.
        layer_states = [torch.zeros_like(x) if x.grad is None else x.grad for x in link.carried]
        link.carried.clear()
        return None, None, None, hidden_states, received, ctx.loss_gradient, *layer_states


def _loop(step: StageStep, number: int) -> None:
    """Run all segments of a micro-batch on one stage: forward in order, backward in reverse.

    Each segment has its own graph: its weight gradients are added to .grad before the next one's begin, so that only
    one set is alive, without a second one that autograd would gather over all segments.
    """
    done: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    output: torch.Tensor | None = None
    for index, segment in enumerate(step.micro_batches[number].segments):
        received = None
        if not segment.from_embeddings:
            assert output is not None
            received = output.detach().requires_grad_()
        before, output = output, step.forward(number, index, received)
        if step.host_inputs:
            release(before)
        done.append((received, output))
    gradient = None
    while done:
        received, output = done.pop()
        torch.autograd.backward(output, torch.zeros_like(output) if gradient is None else gradient)
        gradient = None if received is None else received.grad


class SegmentChunk(MegatronModule):
    """One segment as a model chunk of Megatron-core's schedule: no weights of its own."""

    def __init__(self, config, step: StageStep, index: int, link_length: int):
        super().__init__(config)
        self.step = step
        self.index = index
        self.link_length = link_length
        self.received: torch.Tensor | None = None
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self.received = tensors[0]

    def forward(self, number: int) -> torch.Tensor:
        received, self.received = self.received, None  # or it would live until this chunk runs again
        return self.step.forward(number, self.index, received, self.link_length)


def _pipeline(step: StageStep, topology: Topology) -> None:
    stage, micro_batches = step.stage, step.micro_batches
    segments = micro_batches[0].segments
    order = [(segment.window, segment.pass_number) for segment in segments]
    for number, batch in enumerate(micro_batches):
        if [(segment.window, segment.pass_number) for segment in batch.segments] != order:
            raise SegmentError(
                f"{topology.describe()}: micro-batches 0 and {number} of a step hold loss tokens in different windows: a "
                "pipeline runs the same segments in all; batch such sequences apart, or use parallel.pipeline=1"
            )
    length = longest(segments)
    config = _schedule_config(stage, topology, len(segments))
    chunks = [SegmentChunk(config, step, i, length // stage.sequence_shards) for i in range(len(segments))]

    def forward_step(numbers, chunk):
        return chunk(next(numbers)), lambda output: (output, {})

    arguments = dict(
        forward_step_func=forward_step,
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=len(micro_batches[0].tokens),
    )
    numbers = [iter(range(len(micro_batches))) for _ in chunks]
    with cpu.in_place_of_cuda():
        if len(chunks) == 1:  # nothing to interleave
            one_f_one_b(model=chunks[0], data_iterator=numbers[0], **arguments)
        else:
            interleaved_1f1b(model=chunks, data_iterator=numbers, **arguments)


def longest(segments: list[Segment]) -> int:
    """Tokens of the longest window: a pipeline's messages have one shape for all segments."""
    return max(len(segment.tokens) for segment in segments)


def _schedule_config(stage: HybridStage, topology: Topology, chunks: int):
    """A copy of the stage's config for the schedule.

    Changed after construction: the stage itself must not number its layers as a virtual pipeline would.
    """
    config = copy.copy(stage.config)
    config.pipeline_model_parallel_size = topology.pp_size
    config.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
    config.microbatch_group_size_per_vp_stage = topology.pp_size
    config.pipeline_dtype = stage.dtype
    config.deallocate_pipeline_outputs = True  # a stage keeps what it receives, not what it sends
    # Batched, the messages to the previous and the next stage get swapped when both are the same peer: with two stages
    # gradients are silently wrong.
    config.batch_p2p_comm = False
    config.overlap_p2p_comm = chunks > 1  # Megatron-core requires False for a single chunk
    config.batch_p2p_sync = False
    return config


class Ring:
    """Hidden states from each stage to the next and from the last to the first, one message at a time."""

    def __init__(self, stage: HybridStage, topology: Topology, length: int, batch: int):
        self.group, self.stage = topology.groups.pp, stage
        self.next, self.previous = ((topology.pp_rank + step) % topology.pp_size for step in (1, -1))
        self.buffer = stage.like.new_zeros(length // stage.sequence_shards, batch, stage.model.hidden_size)

    def receive(self, segment: Segment) -> torch.Tensor:
        dist.recv(self.buffer, group=self.group, group_src=self.previous)
        return self.buffer[: len(segment.tokens) // self.stage.sequence_shards].clone()

    def send(self, hidden_states: torch.Tensor | None) -> None:
        message = torch.zeros_like(self.buffer)
        if hidden_states is not None:
            message[: len(hidden_states)] = hidden_states
        dist.send(message, group=self.group, group_dst=self.next)
