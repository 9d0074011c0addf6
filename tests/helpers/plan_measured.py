"""Run by test_plan_measured.py in its processes: training steps in a layout, every live tensor of a rank counted."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.comm
import torch
from torch.utils._pytree import tree_leaves

from powernap.model.megatron import parallel_state
from powernap.parallel import host_inputs, schedule
from powernap.parallel.topology import init_distributed
from powernap.parallel.zero import optimizer as zero_module
from powernap.train import trainer
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch
from tests.helpers.live_bytes import LiveBytes


def measure(recipe: Recipe, **process_group) -> dict[str, int]:
    """Bytes of this rank in the second step of `recipe`: the first creates the optimizer's states and rotary tables."""
    topology = init_distributed(recipe.parallel.tensor, recipe.parallel.pipeline, timeout_seconds=60, **process_group)
    with Tensors() as live:
        stage, zero = trainer.build(recipe, topology)
        _, layer_states = trainer.train_step(recipe, stage, zero, batch(recipe), 2, topology)
        gc.collect()
        live.peak = live.now
        with (
            what_segments_keep() as kept,
            what_is_on_the_host() as host,
            gradients_before_they_are_reduced() as gradients,
        ):
            trainer.train_step(recipe, stage, zero, batch(recipe), 3, topology, layer_states)
    unrounded = [value for mixer in stage.fast_weight_mixers.values() for value in mixer.unrounded.values()]
    weights = [getattr(p, "ds_tensor", p) for p in [*stage.parameters(), *zero._placeholders, *unrounded]]
    optimizer = tensors_of([[p, zero._state(p)] for p in zero._partitions()])
    result = {
        "stage": topology.pp_rank,
        "weights": unique(weights),
        "gradients": gradients[0],
        "optimizer": unique([*weights, *optimizer]) - unique(weights),
        "segments": kept.peak,
        "host_inputs": host.peak,
        "total": live.peak,
    }
    zero.engine.destroy()
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()  # torch's, and what DeepSpeed keeps of this case's groups
    return result


class Tensors(LiveBytes):
    """Without meta tensors, which take no memory."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


@contextmanager
def what_segments_keep() -> Iterator[Tensors]:
    """Counts, inside, the live inputs and outputs of segments: hidden states, fast weights, caches."""
    kept = Tensors()  # not entered: it counts the tensors passed to it
    run, handover = schedule.StageStep._run, schedule._SegmentBoundary.forward

    def show(*tensors):
        for tensor in tensors:
            if tensor is not None and tensor.ndim:
                kept._count(tensor.untyped_storage())

    def run_and_show(step, number, index, hidden_states, fast_weights):
        if step.micro_batches[number].segments[index].with_grad:  # else the zeros that it starts from are not kept
            show(*fast_weights)
        return run(step, number, index, hidden_states, fast_weights)

    def hand_over_and_show(ctx, link, anchor, like, hidden_states, received, loss, *fast_weights):
        sent = handover(ctx, link, anchor, like, hidden_states, received, loss, *fast_weights)
        show(received, *fast_weights)
        return sent

    schedule.StageStep._run = run_and_show
    schedule._SegmentBoundary.forward = staticmethod(hand_over_and_show)
    try:
        yield kept
    finally:
        schedule.StageStep._run = run
        schedule._SegmentBoundary.forward = staticmethod(handover)


@contextmanager
def what_is_on_the_host() -> Iterator[Tensors]:
    """Counts, inside, the offloaded inputs of segments."""
    host, copied = Tensors(), host_inputs.HostInputs._copied

    def copy_and_show(inputs, tensor):
        copy = copied(inputs, tensor)
        host._count(copy.untyped_storage())
        return copy

    host_inputs.HostInputs._copied = copy_and_show
    try:
        yield host
    finally:
        host_inputs.HostInputs._copied = copied


@contextmanager
def gradients_before_they_are_reduced() -> Iterator[list[int]]:
    """Inside, the bytes of a stage's gradients after the last backward pass of each step."""
    found, original = [], zero_module.sum_shared_gradients

    def count(stage, topology, gradient_of):
        found.append(unique([gradient_of(parameter) for parameter in gradient_of.__self__._updated]))
        original(stage, topology, gradient_of)

    zero_module.sum_shared_gradients = count
    try:
        yield found
    finally:
        zero_module.sum_shared_gradients = original


def tensors_of(tree) -> list[torch.Tensor]:
    """All tensors but step counters."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.ndim]


def unique(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages under `tensors`, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def batch(recipe: Recipe) -> Batch:
    """Random tokens; all tokens of the last window bear loss, or of all windows, and every second row continues a document."""
    generator = torch.Generator().manual_seed(1)
    shape = (recipe.sequences_per_rank, recipe.data.sequence_length)
    tokens = torch.randint(1, recipe.model.vocab_size, shape, generator=generator)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    if probes := probes_of(recipe):
        loss_mask[:, [stop - 1 for _, stop in probes]] = True
    else:
        loss_mask[:, 1 if recipe.sleep.every_window else -recipe.model.window :] = True
    return Batch(tokens, loss_mask, torch.arange(len(tokens)) % 2 == 0, [], probes)


def probes_of(recipe: Recipe) -> list[tuple[int, int]]:
    """A probe of four tokens after each window, in sequences of that length."""
    stride = recipe.model.window + 4
    if recipe.data.sequence_length % stride:
        return []
    return [(stop - 4, stop) for stop in range(stride, recipe.data.sequence_length + 1, stride)]
