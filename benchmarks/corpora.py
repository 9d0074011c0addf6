"""From what is on disk to batches, beside tokenizers alone, Megatron-core's indexed data set, WebDataset and MosaicML streaming.

Building. The same prose in four forms, each in 16 slices: one .txt with a document a paragraph, .jsonl.zst, one .parquet with
nulls, and Megatron-core's .bin/.idx. Forms take turns by slices with `tokenizers`' batch encoding of the same texts, held in
memory, and with Megatron-core's builder, which gets the ids. A build reads, hashes, tokenizes, checks and writes. Their shards
must be the same bytes, and 50 steps of a tiny model on each must have the same losses.

One long document. A tenth of the prose and all of it as one document that is not divided, each in a process of its own: CPU time a byte,
and peak memory.

Loading. Tokens a second in batches of 8 samples of 4,096 tokens: ours cuts documents and checks every token; WebDataset and
MosaicML streaming, if it is installed, have the samples stored; Megatron-core's indexed data set reads documents in random order.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import tokenizers
import torch
import webdataset
from pyarrow.parquet import ParquetWriter
from torch.utils.data import DataLoader

from benchmarks.common import ROOT, Times, interleave, paired_ratio, table, verdicts, write
from powernap.train.config import DataConfig
from powernap.train.data.build import make_shards
from powernap.train.data.loader import training_batches
from powernap.train.data.sample_sources import CorpusSource, Job
from powernap.train.data.sequences import Cutting, Sequences
from powernap.train.data.shard import Shard
from powernap.train.data.tar_index import index_tar
from powernap.train.data.text import Text
from powernap.train.data.tokenizer import use_threads
from powernap.train.recipe_file import check
from powernap.train.tracking.metrics import read_metrics

PROSE = Path("/usr/share/doc")  # of a Debian machine
READ = (".gz", ".txt", ".md", ".rst", ".html")
SLICES, RECORD, VOCABULARY = 16, 4096, 16_000
NULL_EVERY = 500  # rows of the .parquet
LENGTH, BATCH, BATCHES = 4096, 8, 40
STEP = 0.05  # seconds, at LENGTH x BATCH
STEPS = 50
TINY = ["model.pattern=AG", "model.hidden_size=32", "model.mlp.ffn_hidden_size=64", "model.attention.heads=2", "model.gdn.heads=2",
        "model.gdn.key_dim=16", "model.gdn.value_dim=16", "model.window=64", "sleep.passes=1", "data.test=null", "evaluation.every=null",
        "data.sequence_length=129", f"train.steps={STEPS}", "train.global_batch_size=2", "train.micro_batch_size=null",
        "optimizer.warmup_steps=5", "checkpoint.every=1000", "run.trackers=[]"]  # fmt: skip


def main(options: argparse.Namespace, command: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    use_threads(1)
    size = 2_000_000 if options.quick else 100_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = prose(ROOT / "docs" if options.quick else PROSE, size)
        tokenizer = train_tokenizer(records, folder / "tokenizer.json")
        building, building_report, building_targets = build(folder, records, tokenizer)
        long, long_report, long_targets = one_document(folder, records, tokenizer)
        loading, loading_report, loading_targets = load(folder, rounds=2 if options.quick else 7)
    judged, verdict = verdicts(building_targets + long_targets + loading_targets)
    numbers = {"building": building, "one_document": long, "loading": loading, "targets": judged}
    write("corpora", command, numbers, [*building_report, *long_report, *loading_report, *verdict])


def prose(folder: Path, size: int) -> list[str]:
    """Records of about RECORD bytes without blank lines, in the order of the files below `folder`, repeated if need be."""
    records, total = [], 0
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in READ and path.is_file()]
    if not files:
        sys.exit(f"no {', '.join(READ)} below {folder}")
    while total < size:
        for path in files:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            with suppress(UnicodeDecodeError):
                for record in _records(data.decode()):
                    records.append(record)
                    total += len(record.encode())
            if total >= size:
                return records
    return records


def _records(text: str) -> Iterator[str]:
    lines: list[str] = []
    count = 0
    for line in text.removeprefix("\ufeff").split("\n"):
        if line.encode().strip():
            lines.append(line)
            count += len(line)
        if count >= RECORD:
            yield "\n".join(lines).rstrip("\r\n")
            lines, count = [], 0
    if lines:
        yield "\n".join(lines).rstrip("\r\n")


def train_tokenizer(records: list[str], path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    step = max(1, len(records) // 1000)
    tokenizer.train_from_iterator(records[::step], trainer)
    tokenizer.save(str(path))
    return path


# ------------------------------------------------------------------------------------------------------------ building


def build(folder: Path, records: list[str], tokenizer: Path):
    print("corpora: building", flush=True)
    slices = [records[len(records) * n // SLICES : len(records) * (n + 1) // SLICES] for n in range(SLICES)]
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    loaded.encode_special_tokens = True
    builder = indexed_builder(folder / "all.bin")
    ids: list[list[int]] = []

    def alone(number: int) -> None:
        ids[:] = []
        for start in range(0, len(slices[number]), 256):
            batch = slices[number][start : start + 256]
            ids.extend(encoding.ids for encoding in loaded.encode_batch_fast(batch, add_special_tokens=False))

    def megatron(number: int) -> None:
        for tokens in ids:
            builder.add_document(torch.tensor([*tokens, 0], dtype=torch.int32), [len(tokens) + 1])

    forms: dict[str, Callable[[int], object]] = {"tokenizers alone": alone, "Megatron-core's builder": megatron}
    parts = {
        ".txt": write_txt(folder, slices),
        ".jsonl.zst": write_jsonl(folder, slices),
        ".parquet with nulls": write_parquet(folder, slices),
    }
    forms |= {name: building(folder, name, tokenizer, found) for name, found in parts.items()}
    times: Times = {name: [] for name in forms}
    for number in range(SLICES):
        ours = list(parts)
        # Megatron-core's builder takes the ids of the encoding before it.
        for name in [*forms] if number % 2 else [*reversed(ours), "tokenizers alone", "Megatron-core's builder"]:
            start = time.process_time()
            forms[name](number)
            times[name].append(time.process_time() - start)
    builder.finalize(str(folder / "all.idx"))
    borders = [len(records) * n // SLICES for n in range(SLICES + 1)]
    bin_parts = [(str(folder / "all.bin"), first, stop) for first, stop in zip(borders, borders[1:], strict=False)]
    read_bin = building(folder, ".bin", tokenizer, bin_parts)
    times[".bin"] = []
    for number in range(SLICES):
        start = time.process_time()
        read_bin(number)
        times[".bin"].append(time.process_time() - start)
    names = [*parts, ".bin"]
    shards = {name: sorted(shards_of(folder, name).glob("*.tar")) for name in names}
    assert len({b"".join(path.read_bytes() for path in found) for found in shards.values()}) == 1, "other tokens"
    losses = {name: train(folder, name, tokenizer) for name in names}
    assert len({json.dumps(found) for found in losses.values()}) == 1 and len(losses[".txt"]) == STEPS, "other losses"
    tokens = sum(int(index_tar(path, path.name)[:, -1, 1].sum()) for path in shards[".txt"])
    size = sum(len(record.encode()) for record in records)
    ours_bytes = sum(path.stat().st_size for path in shards_of(folder, ".txt").iterdir() if path.suffix != ".done")
    bytes_a_token = {
        "ours": ours_bytes / tokens,
        "Megatron-core": sum((folder / f"all.{kind}").stat().st_size for kind in ("bin", "idx")) / tokens,
    }
    without = times["tokenizers alone"]
    ratios = {name: paired_ratio(without, times[name]) for name in parts}
    seconds = {name: sum(found) for name, found in times.items()}
    on_disk = {
        ".txt": bytes_a_token["ours"],
        ".jsonl.zst": bytes_a_token["ours"],
        ".parquet with nulls": bytes_a_token["ours"],
        ".bin": bytes_a_token["ours"],
        "Megatron-core's builder": bytes_a_token["Megatron-core"],
    }
    rows = [[name, seconds[name], ratios.get(name), on_disk.get(name)] for name in times]
    report = [
        "## Building",
        "",
        f"{size / 1e6:.0f} MB in {len(records):,} documents, {tokens:,} tokens of a vocabulary of {VOCABULARY:,}; shards of the four "
        f"forms are the same bytes, and the losses of {STEPS} steps on them the same numbers.",
        "",
        *table(["form", "CPU seconds", "speed over tokenizers alone", "bytes a token"], rows, left=1),
        "",
        "Megatron-core's builder is timed without tokenizing. A speed is the median over slices.",
        "",
    ]
    targets = [(f"speed over tokenizers alone, {name}", ratio, ">=", 0.95) for name, ratio in ratios.items()]
    targets.append(("bytes a token", bytes_a_token["ours"], "<=", 2.2))
    numbers = {"seconds": times, "over_tokenizers": ratios, "bytes_a_token": bytes_a_token, "tokens": tokens}
    return numbers, report, targets


def indexed_builder(path: Path):
    import powernap.model.megatron  # noqa: F401  # without it, the import builds what nothing here uses

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # isort: skip

    return IndexedDatasetBuilder(str(path), dtype=np.uint16)


def shards_of(folder: Path, form: str) -> Path:
    return folder / f"shards of {form}"


def building(
    folder: Path, form: str, tokenizer: Path, parts: list[tuple[str, int, int]]
) -> Callable[[int], dict[str, object]]:
    """A function from a slice's number to its shard."""
    fields = {"inputs": parts[0][0], "tokenizer": str(tokenizer), "txt_document": "paragraph", "test_share": 0}
    source = CorpusSource(check(Text, {**fields, "on_error": "skip", "skip_budget": 10**6}), 10**12)
    shards_of(folder, form).mkdir()
    _ = source.task.vocabulary
    return lambda number: make_shards(source, number, Job(number, 1, [parts[number]]), shards_of(folder, form))


def write_txt(folder: Path, slices: list[list[str]]) -> list[tuple[str, int, int]]:
    path, borders = folder / "all.txt", [0]
    with open(path, "wb") as file:
        for records in slices:
            file.write("".join(f"{record}\n\n" for record in records).encode())
            borders.append(file.tell() - 1)  # where the blank line begins
    return [(str(path), first, stop) for first, stop in zip(borders, borders[1:], strict=False)]


def write_jsonl(folder: Path, slices: list[list[str]]) -> list[tuple[str, int, int]]:
    zstd, parts = pyarrow.Codec("zstd"), []
    for number, records in enumerate(slices):
        path = folder / f"{number:02d}.jsonl.zst"
        lines = "".join(json.dumps({"text": record}) + "\n" for record in records)
        path.write_bytes(zstd.compress(lines.encode(), asbytes=True))
        parts.append((str(path), 0, path.stat().st_size))
    return parts


def write_parquet(folder: Path, slices: list[list[str]]) -> list[tuple[str, int, int]]:
    path = folder / "all.parquet"
    schema = pyarrow.schema([("text", pyarrow.string())])
    with ParquetWriter(path, schema) as file:
        for records in slices:
            rows = [row for n, text in enumerate(records) for row in ([None, text] if n % NULL_EVERY == 0 else [text])]
            file.write_table(pyarrow.table({"text": rows}, schema), row_group_size=len(rows))
    return [(str(path), number, number + 1) for number in range(len(slices))]


def train(folder: Path, form: str, tokenizer: Path) -> list[float]:
    """The losses of a tiny model on the shards of a form."""
    vocabulary = check(Text, {"inputs": "-", "tokenizer": str(tokenizer)}).vocabulary
    overrides = [f"data.train={shards_of(folder, form)}/train-*.tar", f"model.vocab_size={vocabulary.vocab_size}",
                 f"model.pad_token_id={vocabulary.pad}", f"run.root={folder}", f"run.name=run{form}".replace(" ", "-")]  # fmt: skip
    command = [sys.executable, "-m", "powernap.launch.cli", "train", "text", *overrides, *TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    run = overrides[-1].partition("=")[2]
    return [line["loss"] for line in read_metrics(folder / run / "metrics.jsonl") if "loss" in line]


# -------------------------------------------------------------------------------------------------- one long document

_ALONE = """
import json, resource, sys, time
from pathlib import Path
from powernap.train.data.build import make_shards
from powernap.train.data.sample_sources import CorpusSource, Job
from powernap.train.data.text import Text
from powernap.train.recipe_file import check
import webdataset.writer
path, tokenizer, folder = map(Path, sys.argv[1:])
text = check(Text, {"inputs": str(path), "tokenizer": str(tokenizer), "documents": "whole", "test_share": 0})
text.vocabulary.encode("warm")
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
folder.mkdir()
made = make_shards(CorpusSource(text, 10**12), 0, Job(0, 1, [(str(path), 0, path.stat().st_size)]), folder)
seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert made["documents"] == 1
print(json.dumps({"seconds": seconds, "peak_mb": (after - before) / 1024}))
"""


def one_document(folder: Path, records: list[str], tokenizer: Path):
    print("corpora: one document", flush=True)
    rows, found = [], {}
    for name, share in (("a tenth", 10), ("all", 1)):
        path = folder / f"{share}.txt"
        path.write_text("\n".join(records[: len(records) // share]))
        command = [sys.executable, "-c", _ALONE, str(path), str(tokenizer), str(folder / f"one-{share}")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found[name] = json.loads(done.stdout.splitlines()[-1]) | {"mb": path.stat().st_size / 1e6}
        rows.append([f"{found[name]['mb']:.0f} MB", found[name]["seconds"], found[name]["peak_mb"]])
    a_byte = [one["seconds"] / one["mb"] for one in found.values()]
    report = ["## One document", "", "Carried whole, so in one shard and by one core; memory beyond that of the process before.", "",
              *table(["size", "CPU seconds", "peak MB"], rows, left=1), ""]  # fmt: skip
    targets = [
        ("CPU time a byte, all over a tenth of it", a_byte[1] / a_byte[0], "<=", 1.1),
        ("peak MB, all less a tenth of it", found["all"]["peak_mb"] - found["a tenth"]["peak_mb"], "<=", 32.0),
    ]
    return found, report, targets


# ------------------------------------------------------------------------------------------------------------- loading


def load(folder: Path, rounds: int):
    print("corpora: loading", flush=True)
    shards = sorted(map(str, shards_of(folder, ".txt").glob("*.tar")))
    samples = np.concatenate([stored(Path(shard)) for shard in shards])
    count = min(BATCHES, len(samples) // BATCH)
    forms = {
        "ours, documents": lambda: take(ours(shards, folder / "cache"), count),
        "WebDataset": lambda: take(plain(write_webdataset(folder / "webdataset.tar", samples)), count),
        "Megatron-core's indexed data set": lambda: take(indexed(folder / "all"), count),
    }
    with suppress(ImportError):
        import streaming  # noqa: F401

        forms["MosaicML streaming"] = lambda: take(mosaic(folder / "mosaic", samples), count)
    write_webdataset(folder / "webdataset.tar", samples)
    times = interleave(forms, rounds)
    tokens = count * BATCH * LENGTH
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    ratios = {name: paired_ratio(times[name], times["ours, documents"]) for name in times}
    share = statistics.median(times["ours, documents"]) / count / STEP
    report = [
        "## Loading",
        "",
        f"Batches of {BATCH} samples of {LENGTH:,} tokens, {count} of them a round, on one core without reader processes.",
        "",
        *table(["form", "million tokens a CPU second", "ours over it"],
               [[name, rates[name] / 1e6, ratios[name]] for name in forms], left=1),
        "",
        f"A batch of ours takes {share:.3f} of a step of {STEP * 1e3:.0f} ms.",
        "",
    ]  # fmt: skip
    targets = [("a batch over a step of 50 ms", share, "<=", 1.0)]
    return {"tokens_per_second": rates, "ours_over": ratios, "share_of_a_step": share}, report, targets


def take(batches: Iterator[torch.Tensor], count: int) -> None:
    shapes = [tuple(batch.shape) for batch in islice(batches, count)]
    assert shapes == [(BATCH, LENGTH + 1)] * count, shapes


def ours(shards: list[str], cache: Path) -> Iterator[torch.Tensor]:
    fields = {"train": shards, "sequence_length": LENGTH + 1, "workers": 0, "cache": str(cache)}
    place = dict(batch_size=BATCH, vocab_size=VOCABULARY + 2, pad_token_id=VOCABULARY, rank=0, world_size=1, seed=0)
    for batch, _ in training_batches(DataConfig.model_validate(fields), **place):
        yield batch.tokens


def stored(path: Path) -> np.ndarray:
    """The full sequences of a shard: uint16 [n, T]."""
    sequences = Sequences(Shard(path.name, path, index_tar(path, path.name)), Cutting(LENGTH + 1))
    return np.stack([sample.tokens for sample in sequences][:-1]).astype(np.uint16)


def write_webdataset(path: Path, samples: np.ndarray) -> str:
    if not path.exists():
        with open(path, "wb") as file, webdataset.TarWriter(file) as tar:
            for number, tokens in enumerate(samples):
                tar.write({"__key__": f"{number:08d}", "tokens.npy": tokens})
    return str(path)


def plain(shard: str) -> Iterator[torch.Tensor]:
    dataset = webdataset.WebDataset([shard], shardshuffle=False, empty_check=False).shuffle(100).decode()
    dataset = dataset.to_tuple("tokens.npy").batched(BATCH, collation_fn=_stack)
    yield from DataLoader(dataset, batch_size=None)


def _stack(samples: list[tuple[np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens for (tokens,) in samples]).astype(np.int64))


def indexed(path: Path) -> Iterator[torch.Tensor]:
    import powernap.model.megatron  # noqa: F401

    from megatron.core.datasets.indexed_dataset import IndexedDataset  # isort: skip

    dataset = IndexedDataset(str(path))
    rest, size = np.zeros(0, np.uint16), BATCH * (LENGTH + 1)
    for number in np.random.default_rng(0).permutation(len(dataset)):
        rest = np.concatenate([rest, dataset[int(number)]])
        if len(rest) >= size:
            yield torch.from_numpy(rest[:size].astype(np.int64).reshape(BATCH, LENGTH + 1))
            rest = rest[size:]


def mosaic(folder: Path, samples: np.ndarray) -> Iterator[torch.Tensor]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}) as file:
            for tokens in samples:
                file.write({"tokens": tokens})
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    yield from DataLoader(
        dataset, batch_size=BATCH, collate_fn=lambda batch: _stack([(one["tokens"],) for one in batch])
    )
