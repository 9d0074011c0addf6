"""From shards to micro-batches: one rank of each model reads and broadcasts, every rank cuts what it got into segments."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from powernap.model.batch import pad_end, plan_segments
from powernap.model.dropout import row_seeds
from powernap.model.fast_weights import LayerStates, reset_rows, split_batch
from powernap.model.segments import SegmentError
from powernap.parallel.schedule import MicroBatch
from powernap.parallel.topology import Topology
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch, Dataset, State, find_datasets, training_batches
from powernap.train.data.sample import DataError


def read_batches(recipe: Recipe, topology: Topology, state: State | None) -> Iterator[tuple[Batch, State | None]]:
    """Yield this rank's share of each global batch and the stream's state after it, from the batch after `state` on.

    One rank of each model reads, and broadcasts the batch to the others, which have no state.
    """
    if not topology.is_data_source:
        while True:
            yield receive_batch(None, recipe, topology), None
    batches = training_batches(
        recipe.data,
        batch_size=recipe.sequences_per_rank,
        vocab_size=recipe.model.vocab_size,
        pad_token_id=recipe.model.pad_token_id,
        window=recipe.model.window,
        rank=topology.dp_rank,
        world_size=topology.dp_size,
        seed=recipe.run.seed,
        whole_documents=recipe.sleep.carry,
        state=state,
        datasets=share_datasets(recipe, topology),
    )
    for batch, now in batches:
        if topology.groups.mp.size() > 1:
            receive_batch(batch, recipe, topology)
        yield batch, now


def share_datasets(recipe: Recipe, topology: Topology) -> dict[str, Dataset]:
    """Find the shards on one of the ranks that read; all open every shard otherwise. Raises DataError on all of them."""
    found: dict[str, Dataset] | DataError | None = None
    if topology.dp_rank == 0:
        try:
            found = find_datasets(recipe.data)
        except DataError as error:
            found = DataError(str(error))
    topology.progress.note("waiting for the rank that looks at the shards")
    found = topology.all_gather_over_data(found)[0]
    if isinstance(found, DataError):
        raise found
    assert found is not None
    return found


def receive_batch(batch: Batch | None, recipe: Recipe, topology: Topology) -> Batch:
    """Broadcast `batch` from this model's first rank to all its ranks."""
    rows = recipe.sequences_per_rank
    shape = (2 * rows + 2, recipe.data.sequence_length)
    if batch is None:
        packed = torch.empty(shape, dtype=torch.int64)
    else:
        # The first token is never a target, so its slot in the loss mask carries is_document_start.
        loss_mask = torch.cat([batch.is_document_start[:, None], batch.loss_mask[:, 1:]], dim=1)
        ends = torch.zeros(2, shape[1], dtype=torch.int64)  # set at the first and at the last token of each probe
        for start, stop in batch.probes:
            ends[0, start] = ends[1, stop - 1] = 1
        flags = loss_mask.long()
        if batch.document_starts is not None:
            flags += 2 * batch.document_starts
        packed = torch.cat([batch.tokens, flags, ends])
    packed = topology.broadcast_in_model(packed.to(topology.device)).cpu()
    tokens, flags, ends = packed.split((rows, rows, 2))
    loss_mask, is_document_start = (flags % 2).bool(), (flags[:, 0] % 2).bool()
    document_starts = flags > 1 if recipe.data.documents == "separate" else None
    loss_mask[:, 0] = False
    firsts, lasts = (row.nonzero().flatten().tolist() for row in ends)
    probes = [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
    return Batch(tokens, loss_mask, is_document_start, [], probes, document_starts=document_starts)


def cut_batch(
    recipe: Recipe, batch: Batch, passes: int, topology: Topology, layer_states: LayerStates | None
) -> list[MicroBatch]:
    """Split this rank's sequences into micro-batches, each with its segments and its part of `layer_states`."""
    size = recipe.micro_batch_size
    tokens, loss_mask = pad_end(batch.tokens, batch.loss_mask, recipe.sequence_shards, recipe.model.pad_token_id)
    tokens, loss_mask = tokens.split(size), loss_mask.split(size)
    starts: Sequence[torch.Tensor | None] = [None] * len(tokens)
    if batch.document_starts is not None:
        starts = batch.document_starts.split(size)
    parts: Sequence[LayerStates | None] = [None] * len(tokens)
    if layer_states is not None:
        parts = split_batch(
            reset_rows(layer_states, batch.is_document_start.to(topology.device)), len(batch.tokens), size
        )
    return [
        MicroBatch.on(
            topology.device,
            plan_segments(
                tokens,
                loss_mask,
                recipe.model,
                recipe.sleep,
                passes,
                batch.probes,
                recipe.sequence_shards,
                separate=starts is not None,
            ),
            tokens,
            loss_mask,
            part,
            starts,
        )
        for tokens, loss_mask, part, starts in zip(tokens, loss_mask, parts, starts, strict=True)
    ]


def seed_dropout(micro_batches: list[MicroBatch], batch: Batch, seed: int, step: int) -> None:
    """Give the segments their sequences' seeds, of the tokens as they were read: a layout's pads must not change a mask."""
    rows = batch.tokens.split([len(micro_batch.tokens) for micro_batch in micro_batches])
    for micro_batch, tokens in zip(micro_batches, rows, strict=True):
        seeds = row_seeds(tokens, seed, step)
        micro_batch.segments = [replace(segment, dropout_seeds=seeds) for segment in micro_batch.segments]


def check_same_segments(micro_batches: list[MicroBatch], topology: Topology) -> None:
    """Raise SegmentError unless all data ranks run the same segments: under ZeRO-3 each gathers weights from all."""
    segments = [[(segment.window, segment.pass_number) for segment in batch.segments] for batch in micro_batches]
    topology.progress.note("comparing the segments of all data ranks")
    if any(other != segments for other in topology.all_gather_over_data(segments)):
        raise SegmentError(
            f"{topology.describe()}: the data ranks' sequences hold loss tokens in different windows: zero.stage=3 runs the "
            "same segments on all; batch such sequences apart, or use zero.stage=1"
        )


def fingerprint(tokens: torch.Tensor) -> int:
    """A checksum of the sequences in any order: the sum of their CRC-32. tokens [B, T]."""
    return sum(zlib.crc32(row.numpy().tobytes()) for row in tokens)
