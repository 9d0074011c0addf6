"""Batches of checked samples from WebDataset shards, each with the state to resume from after it.

order.py decides which samples make up a global batch, from the data and the seed alone. Here they are read: rank
k % world_size reads sample k of the run, and its reader processes take whole batches in turn. Samples are read by their
position in a shard, so any number of ranks and readers can share the work, before and after a resume.
"""

import itertools
import multiprocessing.connection
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from powernap.model.errors import PowernapError
from powernap.model.segments import Probe
from powernap.parallel.liveness import exit_codes
from powernap.train.config import DataConfig
from powernap.train.data.cache import ShardCache, cache_of
from powernap.train.data.order import Cursor, Lane, Mixture, Order
from powernap.train.data.sample import DataError
from powernap.train.data.sequences import Cutting, Sequences
from powernap.train.data.shard import fingerprint
from powernap.train.data.shard_list import count_lanes, expand_shards, local_path
from powernap.train.run.signals import outlive_one_sigterm
from powernap.train.tasks.sample import Sample, probes_of

FETCH_AHEAD = 8  # remote shards that each reader fetches at once

State = dict[str, Any]  # JSON; see training_batches
DocumentParts = list[tuple[Sequences, int]]  # the samples of one document: each one's shard, and its number there


class ReaderError(PowernapError):
    """A reader process died: one line with its pid and signal. The recipe is not at fault."""

    exit_code = exit_codes.FAILED


@dataclass(frozen=True)
class Batch:
    """Sequences of one rank, on the CPU."""

    tokens: torch.Tensor  # int64 [B, T]
    loss_mask: torch.Tensor  # bool [B, T]: True at targets; all False in a row whose sample was left out
    is_document_start: torch.Tensor  # bool [B]: rows that begin a document; the others continue the previous batch's
    answers: list[np.ndarray]  # B arrays of rows (start, stop, depth)
    probes: list[Probe] = field(default_factory=list)  # of every row: (start, stop) of tokens to be forgotten
    unusable: list[str] = field(default_factory=list)  # why samples and shards were left out, a line each
    document_starts: torch.Tensor | None = (
        None  # bool [B, T]: tokens that know nothing of those before; None: the first alone
    )
    is_real: bool = True  # False: padding, present only because another rank has a batch
    sample_ids: list[tuple[str, int]] = field(default_factory=list)  # in training: each row's shard, and number there


StreamItem = tuple[Batch, list[dict[int, Cursor]]]  # a batch, and each dataset's cursors of the lanes it read


class Dataset(NamedTuple):
    """The shards of a dataset."""

    shards: tuple[str, ...]
    lanes: int
    fingerprint: str


def training_batches(
    data: DataConfig,
    *,
    batch_size: int,
    vocab_size: int,
    pad_token_id: int | None = None,
    window: int | None = None,
    rank: int,
    world_size: int,
    seed: int,
    whole_documents: bool = False,
    state: State | None = None,
    datasets: dict[str, Dataset] | None = None,
) -> Iterator[tuple[Batch, State]]:
    """Yield this rank's batches endlessly, each with the state after it, from the start or the batch after `state`.

    A state holds what this rank knows: the samples read by all ranks so far; by dataset, the fingerprint of its shards
    and the cursors of its lanes; and the settings that fix the order. Resume from the `merge_states` of all ranks'
    states, on any number of ranks, with any batch size and number of readers.

    Args:
        batch_size: sequences per rank.
        pad_token_id: fills up sequences that are cut from documents.
        window: where separate documents begin.
        whole_documents: row by row, each batch continues the documents of the one before. Needs one dataset, and as
            many lanes as the global batch has rows.
        datasets: what `find_datasets` finds, if another rank did.

    Raises:
        DataError: at the first batch if the shards are missing or not those of `state`, later if a shard or sample
            cannot be used and data.on_error is not skip.
    """
    datasets = find_datasets(data) if datasets is None else datasets
    orders = [
        Order(found.shards, found.lanes, seed, data.shuffle_buffer, whole_documents) for found in datasets.values()
    ]
    fingerprints = {name: found.fingerprint for name, found in datasets.items()}
    assert not whole_documents or [order.lanes for order in orders] == [batch_size * world_size]
    weights = {name: weight for name, (_, weight) in data.datasets.items()}
    settled = {"seed": seed, "shuffle_buffer": data.shuffle_buffer, "lanes": [order.lanes for order in orders],
               "weights": weights, "sequence_length": data.sequence_length, "documents": data.documents}  # fmt: skip
    if data.documents == "separate":
        settled["window"] = window
    if state:
        _check_state(state, fingerprints, settled)
    done = state["samples"] if state else 0
    cursors = _cursors(state) if state else [{} for _ in orders]
    stream = BatchStream(
        orders,
        Mixture(tuple(weights.values()), seed),
        cursors,
        data,
        Cutting(data.sequence_length, data.documents, pad_token_id, vocab_size, window),
        first=done,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    for batch, touched in _read(stream, data.workers):
        done += batch_size * world_size
        for known, new in zip(cursors, touched, strict=True):
            known.update(new)
        saved = {
            name: {str(lane): list(cursor) for lane, cursor in known.items()}
            for name, known in zip(fingerprints, cursors, strict=True)
        }
        yield batch, {"samples": done, "fingerprints": fingerprints, "settled": settled, "cursors": saved}


def find_datasets(data: DataConfig) -> dict[str, Dataset]:
    """The training shards by dataset. Opens every local one for its fingerprint: one rank is enough.

    Raises:
        DataError: if one is missing, or there are too few.
    """
    found = {}
    for (name, (spec, _)), field_name in zip(data.datasets.items(), data.shard_lists, strict=False):
        shards = tuple(expand_shards(spec, field_name))
        found[name] = Dataset(shards, count_lanes(len(shards), data.lanes, field_name), fingerprint(shards))
    return found


def _cursors(state: State) -> list[dict[int, Cursor]]:
    """The cursors to resume from, by dataset and lane."""
    return [{int(lane): Cursor(*cursor) for lane, cursor in saved.items()} for saved in state["cursors"].values()]


def _read(stream: "BatchStream", workers: int) -> Iterator[StreamItem]:
    """The items of `stream`, read by `workers` processes. Raises the DataError that ends it, or a ReaderError."""
    loader = DataLoader(
        stream,
        batch_size=None,  # the readers make whole batches: torch takes them from the workers in turn
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=outlive_one_sigterm,
        generator=torch.Generator(),  # its own: the model's random numbers must not depend on the readers
    )
    items = iter(loader)
    try:
        while True:
            try:
                item = next(items)
            except (OSError, EOFError, RuntimeError) as error:  # from the broken connections of a killed reader
                raise _ended_reader(items) or error from None
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        del items  # ends the reader processes, even while a traceback keeps this frame alive


@contextmanager
def readers_watched() -> Iterator[None]:
    """Inside, a reader process that dies raises a ReaderError, from a signal handler, wherever the trainer is.

    Raises:
        ReaderError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        # Torch's handler would raise again while this error is being reported.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        match = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if not match:
            raise
        name = re.search(r"killed by signal: ([\w ]+\w)", f"{error} {error.__cause__}")
        number = next((n for n in signal.Signals if name and signal.strsignal(n) == name[1]), None)
        raise _reader_error(match[1], number) from None


def _ended_reader(batches: Iterator) -> ReaderError | None:
    """The error for a DataLoader's dead reader process, if any; one with a broken connection may exit a bit later."""
    readers = getattr(batches, "_workers", ())
    ended = multiprocessing.connection.wait([reader.sentinel for reader in readers], timeout=1.0) if readers else ()
    for reader in readers:
        if reader.sentinel in ended:
            reader.join(timeout=1.0)  # the sentinel closes a moment before the exit code is set
        if code := reader.exitcode:
            return _reader_error(reader.pid, signal.Signals(-code) if code < 0 else None)
    return None


def _reader_error(pid: int | str, number: signal.Signals | None) -> ReaderError:
    """`number`: the signal that ended it, if known."""
    by = f"was ended by {number.name}" if number else "ended unexpectedly"
    why = ", as the system does when memory runs out: try fewer data.workers" if number == signal.SIGKILL else ""
    return ReaderError(f"a reader process (pid {pid}) {by}{why}; continue with --resume")


def _check_state(state: State, fingerprints: dict[str, str], settled: dict[str, Any]) -> None:
    for name, current in fingerprints.items():
        if state["fingerprints"].get(name) != current:
            field_name = f"data.train.{name}" if name else "data.train"
            raise DataError(
                f"{field_name}: the shards are not those the run was trained on so far: put them back, or start a new run"
            )
    for key, value in settled.items():
        before = state["settled"].get(key, value)  # older states lack the cut of documents
        if before != value:
            raise DataError(f"the order of samples has changed: {key} was {before}, is {value}")


def merge_states(states: list[State]) -> State:
    """Merge the states that the ranks hold after the same batch into one."""
    merged = {**states[0], "cursors": {name: {} for name in states[0]["cursors"]}}
    for state in states:
        assert state["samples"] == merged["samples"] and state["settled"] == merged["settled"]
        for name, cursors in state["cursors"].items():
            known = merged["cursors"][name]
            known.update({lane: max(cursor, known.get(lane, cursor)) for lane, cursor in cursors.items()})
    return merged


def sample_names(sample_ids: list[tuple[str, int]], cache: ShardCache, cutting: Cutting) -> list[str]:
    """`shard.tar:key` of each of a batch's `sample_ids`, a number if unreadable; for messages: reads whole shards."""
    by_shard: dict[str, list[int]] = {}
    for name, number in sample_ids:
        by_shard.setdefault(name, []).append(number)
    names: dict[tuple[str, int], str] = {}
    for name, numbers in by_shard.items():
        try:
            keys = Sequences.open(name, cache, cutting, keep_readable=True).names(numbers)
        except (DataError, OSError):
            keys = [f"number {number}" for number in numbers]
        shown = name.partition("?")[0]  # a signed URL ends in a secret
        names |= {(name, number): f"{shown}:{key}" for number, key in zip(numbers, keys, strict=True)}
    return [names[sample_id] for sample_id in sample_ids]


def evaluation_batches(
    data: DataConfig,
    *,
    batch_size: int,
    vocab_size: int,
    pad_token_id: int | None = None,
    rank: int,
    world_size: int,
    limit: int,
) -> Iterator[Batch]:
    """The first `limit` samples of data.test in file order, for each rank every world_size-th document.

    Up to `batch_size` documents are read side by side, one part of each per batch; later batches continue them in the
    same rows. All ranks get the same number of batches, because under ZeRO-3 they run each one together: a rank whose
    documents are used up repeats some. Padding rows have no loss tokens and answers; padding batches do not count.

    Raises:
        DataError: if a shard is missing, cannot be read or does not fit.
    """
    assert isinstance(data.test, str | list), "one of named_tests"
    # Alone a document is what it is beside others (sequences.py), and its windows are counted from its start.
    mode = "whole" if data.documents == "separate" else data.documents
    cache, cutting = cache_of(data), Cutting(data.sequence_length, mode, pad_token_id, vocab_size)
    shards = (Sequences.open(name, cache, cutting) for name in expand_shards(data.test, "data.test"))
    samples = itertools.islice(((shard, number) for shard in shards for number in range(len(shard))), limit)
    documents: list[DocumentParts] = []
    for shard, number in samples:
        if shard.begins_document(number):
            documents.append([])
        documents[-1].append((shard, number))
    side_by_side = batch_size * world_size
    for start in range(0, len(documents), side_by_side):
        of_all_ranks = documents[start : start + side_by_side]
        own = of_all_ranks[rank::world_size] or of_all_ranks[:1]
        for part in range(max(map(len, of_all_ranks))):
            is_padding = rank >= len(of_all_ranks) or all(part >= len(document) for document in own)
            yield _evaluation_batch(own, part, is_padding)


def _evaluation_batch(documents: list[DocumentParts], part: int, is_padding: bool) -> Batch:
    """Part number `part` of each document. One with fewer parts repeats its last, without loss tokens and answers.

    is_padding: the whole batch only accompanies other ranks'. Its rows keep their loss tokens, so that it runs the same
    segments as theirs; nothing in it counts.
    """
    rows = []
    for document in documents:
        shard, number = document[min(part, len(document) - 1)]
        sample = shard[number]
        rows.append(sample if is_padding or part < len(document) else _without_loss(sample))
    batch = _collate(rows, [part == 0] * len(rows))
    return replace(batch, answers=[answers[:0] for answers in batch.answers], is_real=False) if is_padding else batch


class BatchStream(IterableDataset):
    """The batches of one rank, or of one of its reader processes, with their cursors; a DataError is the last item.

    It is yielded, not raised, because torch would wrap an exception into pages of text.
    """

    def __init__(
        self,
        orders: list[Order],
        mixture: Mixture,
        cursors: list[dict[int, Cursor]],
        data: DataConfig,
        cutting: Cutting,
        *,
        first: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ):
        """`first`: samples of the run already read, over all ranks."""
        super().__init__()
        self.orders, self.mixture, self.cursors, self.cache = orders, mixture, cursors, cache_of(data)
        self.data, self.cutting = data, cutting
        self.first, self.batch_size, self.rank, self.world_size = first, batch_size, rank, world_size

    def __iter__(self) -> Iterator[StreamItem | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self._lanes: list[dict[int, Lane]] = [{} for _ in self.orders]
        self._reported: set[str] = set()  # damaged shards
        self._fetching: dict[str, Future] = {}
        global_batch = self.batch_size * self.world_size
        with ThreadPoolExecutor(FETCH_AHEAD) as self._fetchers:
            try:
                for step in itertools.count(worker, workers):
                    start = self.first + step * global_batch + self.rank
                    numbers = range(start, start + global_batch, self.world_size)
                    self._fetch_first_shards(numbers)
                    yield self._batch(numbers)
            except DataError as error:
                yield DataError(str(error))  # a plain one: it must survive pickling in torch's queue
            finally:
                self.cache.stop.set()  # else leaving the pool would wait for the fetches

    def _batch(self, numbers: range) -> StreamItem:
        samples, starts, sample_ids = [], [], []
        self._unusable: list[str] = []
        touched: list[dict[int, Cursor]] = [{} for _ in self.orders]
        for number in numbers:
            dataset, lane, place = self._locate(number)
            if lane not in self._lanes[dataset]:
                self._lanes[dataset][lane] = Lane(self.orders[dataset], lane, self._cursor(dataset, lane), self._open)
            reader = self._lanes[dataset][lane]
            shard, i = reader.find(place)
            touched[dataset][lane] = reader.cursor
            try:
                sample = shard[i]
            except DataError as error:
                if self.data.on_error != "skip":
                    raise
                self._unusable.append(str(error))
                sample = _nothing(self.data.sequence_length)
            samples.append(sample)
            starts.append(shard.begins_document(i))
            sample_ids.append((shard.name, i))
        return replace(_collate(samples, starts, self._unusable), sample_ids=sample_ids), touched

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Sample `number` of the run: its dataset, its lane there, and its number in that lane."""
        dataset, place = self.mixture.locate(number)
        lanes = self.orders[dataset].lanes
        return dataset, place % lanes, place // lanes

    def _cursor(self, dataset: int, lane: int) -> Cursor:
        return self.cursors[dataset].get(lane, Cursor())

    def _open(self, name: str, coming: str | None) -> Sequences:
        """Open a shard for a lane, and start fetching the one after it."""
        self._fetch_ahead(coming)
        fetching = self._fetching.pop(name, None)
        shard = fetching.result() if fetching else self._open_shard(name)
        if shard.damage and name not in self._reported:
            self._reported.add(name)
            self._unusable.append(shard.damage)
        return shard

    def _fetch_first_shards(self, numbers: range) -> None:
        """Start fetching the first shards of all lanes of a batch that are not open yet, all at once."""
        lanes = {self._locate(number)[:2] for number in numbers}
        for dataset, lane in lanes:
            if lane not in self._lanes[dataset]:
                cursor, order = self._cursor(dataset, lane), self.orders[dataset]
                self._fetch_ahead(order.shards[order.turns(lane, cursor.epoch)[cursor.turn]])

    def _fetch_ahead(self, name: str | None) -> None:
        if name and local_path(name) is None and name not in self._fetching:
            self._fetching[name] = self._fetchers.submit(self._open_shard, name)

    def _open_shard(self, name: str) -> Sequences:
        return Sequences.open(name, self.cache, self.cutting, keep_readable=self.data.on_error == "skip")


def _nothing(length: int) -> Sample:
    """The stand-in for a sample that cannot be used: without loss tokens, it counts nowhere."""
    return Sample(np.zeros(length, np.int32), np.zeros(length, bool), np.zeros((0, 3), np.int32))


def _probes(samples: list[Sample]) -> list[Probe]:
    """Those that all samples with a loss token share."""
    probes = {tuple(probes_of(sample)) for sample in samples if sample.loss_mask.any()}
    if len(probes) > 1:
        one, other = sorted(probes)[:2]
        raise DataError(
            f"samples of a batch have their probes at different tokens, {list(one)} and {list(other)}: write shards in "
            "which all have them at the same"
        )
    return [probe for same in probes for probe in same]


def _without_loss(sample: Sample) -> Sample:
    """The same tokens, without loss tokens and answers."""
    return replace(sample, loss_mask=np.zeros_like(sample.loss_mask), answers=sample.answers[:0])


def _as_it_is(item: object) -> object:
    return item


def _collate(samples: list[Sample], starts: list[bool], unusable: Sequence[str] = ()) -> Batch:
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64)),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        is_document_start=torch.tensor(starts),
        answers=[sample.answers for sample in samples],
        probes=_probes(samples),
        unusable=list(unusable),
        document_starts=_document_starts(samples),
    )


def _document_starts(samples: list[Sample]) -> torch.Tensor | None:
    """bool [B, T], if the sequences hold separate documents."""
    if all(sample.document_starts is None for sample in samples):
        return None
    first = np.arange(len(samples[0].tokens)) == 0
    starts = [first if sample.document_starts is None else sample.document_starts for sample in samples]
    return torch.from_numpy(np.stack(starts))
