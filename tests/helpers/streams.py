"""Small shards for the tests of train/data/, and streams of batches from them."""

import itertools
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from powernap.train.config import DataConfig
from powernap.train.data.bundle import Bundle
from powernap.train.data.cache import ShardCache
from powernap.train.data.loader import evaluation_batches, merge_states, training_batches
from powernap.train.data.sample import encode, token_type
from powernap.train.data.sequences import Sequences
from powernap.train.data.shard import Shard

LENGTH, VOCABULARY, SHARDS = 8, 100, 8


def write_shard(path, numbers, mtime=0, key="sample-{:03d}".format, **changes):
    """Samples whose tokens are their number."""
    with open(path, "wb") as file, TarWriter(file, mtime=mtime) as tar:
        for number in numbers:
            tokens = np.full(LENGTH, number, dtype=np.int32)
            loss_mask = np.arange(LENGTH) >= 6
            sample = {"tokens.npy": tokens, "loss_mask.npy": loss_mask, "answers.npy": np.array([(6, 8, 3)], np.int32)}
            sample.update(changes)
            tar.write({"__key__": key(number), **{k: v for k, v in sample.items() if v is not None}})


def write_tokens(path, documents, vocab_size=VOCABULARY):
    """A shard of documents, each a list of tokens, to be cut when it is read."""
    bundle = Bundle(token_type(vocab_size))
    with open(path, "wb") as file, TarWriter(file, mtime=0) as tar:
        samples = itertools.chain.from_iterable(bundle.add(np.array(document), ends=True) for document in documents)
        for key, sample in itertools.chain(samples, bundle.rest()):
            tar.write(encode(key, sample))


def write_documents(path, lengths, first):
    """A shard of documents of `lengths` parts, whose samples are numbered from `first`. Returns the next number."""
    keys = [f"text-{document}-part{part:06d}" for document, length in enumerate(lengths) for part in range(length)]
    write_shard(path, range(first, first + len(keys)), key=lambda number: keys[number - first])
    return first + len(keys)


def config(train, **fields):
    train = train if isinstance(train, list | dict) else str(train)
    return DataConfig.model_validate(
        {"train": train, "test": None, "sequence_length": LENGTH, "shuffle_buffer": 1, **fields}
    )


def stream(
    shards, *, batch_size=4, rank=0, world_size=1, seed=0, state=None, whole_documents=False, datasets=None, **fields
):
    """(batch, state) of one rank."""
    options = dict(batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, state=state)
    options |= dict(whole_documents=whole_documents, window=4, datasets=datasets)
    return training_batches(config(shards, **fields), vocab_size=VOCABULARY, **options)


def read(shards, **changes):
    return (batch for batch, _ in stream(shards, **changes))


def evaluate(shards, *, batch_size=4, rank=0, world_size=1, limit=1000):
    place = dict(batch_size=batch_size, rank=rank, world_size=world_size, limit=limit)
    return list(evaluation_batches(config("unused", test=str(shards)), vocab_size=VOCABULARY, **place))


def samples_of(shard):
    return list(Shard.open(str(shard), ShardCache(Path.home())))


def sequences_of(path, cutting, cache=None):
    """Those of a shard."""
    return Sequences.open(str(path), ShardCache(cache or Path(path).parent / "cache"), cutting)


def numbers(batches, count=None):
    """The samples' numbers, batch by batch."""
    return [batch.tokens[:, 1].tolist() for batch in itertools.islice(batches, count)]


def global_order(shards, world_size, workers, steps, global_batch=8, state=None, **changes):
    """Global batches as lists, with sample k of the run at position k, and the state after the last."""
    share = dict(world_size=world_size, workers=workers, batch_size=global_batch // world_size, state=state)
    ranks = [list(itertools.islice(stream(shards, rank=rank, **share, **changes), steps)) for rank in range(world_size)]
    batches = [[batch.tokens[:, 1].tolist() for batch, _ in read] for read in ranks]
    order = [[n for place in zip(*shares, strict=True) for n in place] for shares in zip(*batches, strict=True)]
    return order, merge_states([read[-1][1] for read in ranks])


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text
