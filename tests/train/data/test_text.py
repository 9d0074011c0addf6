"""Text: every document once, packed into sequences; the same from files of every kind, on any number of cores."""

import bz2
import gzip
import itertools
import json
import multiprocessing
import os
import re
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tokenizers

from powernap.train.data import bundle
from powernap.train.data import documents as reading
from powernap.train.data.build import build, make_shards
from powernap.train.data.cache import ShardCache
from powernap.train.data.documents import Document, Reader, Tally
from powernap.train.data.inspect import inspect_shards
from powernap.train.data.sample import DataError
from powernap.train.data.sample_sources import CorpusSource, Job
from powernap.train.data.sequences import Cutting
from powernap.train.data.text import Text
from powernap.train.data.tokenizer import load_tokenizer, use_threads
from powernap.train.recipe_file import RecipeError, check
from tests.helpers.streams import sequences_of

DOCUMENTS = [f"Document {n} — naïve " + "word " * (n % 17) + "\n" for n in range(300)]
BYTES = load_tokenizer("bytes")


def write(folder, kind):
    folder.mkdir(parents=True)
    if kind == "txt":
        for number, document in enumerate(DOCUMENTS):
            (folder / f"{number:03d}.txt").write_text(document)
    elif kind == "jsonl":
        lines = [
            json.dumps({"text": document, "id": n}, ensure_ascii=n % 2 == 0) for n, document in enumerate(DOCUMENTS)
        ]
        (folder / "all.jsonl").write_text("\n".join(lines) + "\n\n")
    else:
        table = pyarrow.table({"id": range(300), "text": DOCUMENTS})
        pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=40)
    return folder


def built(folder, inputs, shard_bytes=3000, workers=1, **fields):
    text = check(Text, {"inputs": str(inputs), "window": 16, "windows": 2, "test_share": 0.1, **fields})
    build(CorpusSource(text, shard_bytes), folder, workers)
    return folder


def documents(folder, split, tokenizer=BYTES):
    """All documents of a split, put together again from the sequences of its shards."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        tokens = []
        for sample in sequences_of(path, Cutting(33, "packed", tokenizer.pad, tokenizer.vocab_size)):
            here = sample.tokens[sample.tokens != tokenizer.pad].tolist()
            assert np.array_equal(sample.loss_mask, np.arange(33) % 33 * (sample.tokens != tokenizer.pad) > 0)
            assert not tokens or tokens[-1] == here[0]  # the last target begins the next sequence
            tokens += here[1:] if tokens else here
        parts = [list(part) for end, part in itertools.groupby(tokens, lambda token: token == tokenizer.end) if not end]
        assert tokens[-1] == tokenizer.end
        found += parts
    return found


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_document_is_there_once(tmp_path, kind):
    folder = built(tmp_path / "data", write(tmp_path / "corpus", kind))
    train, test = ([bytes(d).decode() for d in documents(folder, split)] for split in ("train", "test"))
    assert sorted(train + test) == sorted(DOCUMENTS)
    assert 10 <= len(test) <= 60 and not set(train) & set(test)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(list(folder.glob("train-*.tar"))) == manifest["splits"]["train"]["shards"] > 2
    assert (manifest["vocab_size"], manifest["pad_token_id"], manifest["sequence_length"]) == (258, 257, 33)


def test_the_split_does_not_depend_on_the_files(tmp_path):
    folders = [built(tmp_path / kind, write(tmp_path / "corpus" / kind, kind)) for kind in ("txt", "parquet")]
    one, other = ({bytes(d) for d in documents(folder, "test")} for folder in folders)
    assert one == other


def test_on_two_cores_and_again(tmp_path, capsys):
    corpus = write(tmp_path / "corpus", "jsonl")
    (corpus / "special.txt").write_text("a text with <|endoftext|> in it")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = {"initial_alphabet": alphabet, "special_tokens": ["<|endoftext|>"]}
    tokenizer.train_from_iterator(DOCUMENTS, tokenizers.trainers.BpeTrainer(vocab_size=300, **special))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fields = {"inputs": corpus, "tokenizer": str(tmp_path / "tokenizer.json")}
    one, two = built(tmp_path / "one", **fields), built(tmp_path / "two", workers=2, **fields)
    manifest = json.loads((one / "manifest.json").read_text())
    assert (manifest["end_token_id"], manifest["pad_token_id"], manifest["documents"]) == (0, 300, 301)
    assert not manifest["changed"] and "0 (<|endoftext|>, a special token of its own)" in manifest["tokenizer_notes"][0]
    assert {p.name: p.read_bytes() for p in one.glob("*.tar")} == {p.name: p.read_bytes() for p in two.glob("*.tar")}
    built(tmp_path / "one", **fields)
    assert "is built already" in capsys.readouterr().out
    (corpus / "more.txt").write_text("more")
    with pytest.raises(DataError, match=r"one is a finished build, which differs \(the input has changed\)"):
        built(tmp_path / "one", **fields)


def test_a_hugging_face_vocabulary(tmp_path):
    corpus = write(tmp_path / "corpus", "jsonl")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(DOCUMENTS, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    trained.save(str(tmp_path / "tokenizer.json"))
    folder = built(tmp_path / "data", corpus, tokenizer=str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.vocab_size == trained.get_vocab_size() + 2
    found = [trained.decode(d) for split in ("train", "test") for d in documents(folder, split, loaded)]
    assert sorted(found) == sorted(DOCUMENTS)
    report = inspect_shards(str(folder), ShardCache(tmp_path / "cache"), show=1)
    assert "loss on all tokens" in report and "  window 0:\n    Document " in report and "*" not in report
    assert max(len(line) for line in report.splitlines()) <= 80


def test_a_tiktoken_vocabulary(monkeypatch):
    """Its names stand for files to fetch; here one of bytes and 'wo'."""
    ranks = {bytes([n]): n for n in range(256)} | {b"wo": 256}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|end|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer("tiktoken:tiny")
    assert tokenizer.encode("wow<|end|>")[:2] == [256, ord("w")] and 257 not in tokenizer.encode("<|end|>")
    assert (tokenizer.end, tokenizer.pad, tokenizer.vocab_size) == (258, 259, 260)
    assert [tokenizer.token_name(token) for token in (256, 10, 258, 259)] == ["wo", "\\n", "[end]", "[pad]"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": "nowhere"}, "inputs=nowhere: no .txt, .jsonl, .parquet, .arrow, .bin or .ds file there"),
        (
            {"inputs": "{corpus}/a.csv"},
            "a.csv: no .txt, .jsonl, .parquet, .arrow, .bin or .ds file there (left out: 1 .csv (",
        ),
        ({"tokenizer": "words"}, "tokenizer=words: write bytes, ids:N, tiktoken:NAME or the path of a tokenizer.json"),
        ({"tokenizer": "tiktoken:gpt9"}, "tokenizer=tiktoken:gpt9: no such encoding: choose one of "),
        ({"tokenizer": "{corpus}/a.txt"}, "cannot be read"),
    ],
)
def test_fields_that_name_nothing(tmp_path, fields, message):
    (tmp_path / "a.txt").write_text("a text\n")
    (tmp_path / "a.csv").write_text("a text\n")
    fields = {"inputs": str(tmp_path / "a.txt")} | {key: value.format(corpus=tmp_path) for key, value in fields.items()}
    with pytest.raises(DataError, match=re.escape(message)) as error:
        built(tmp_path / "data", **fields)
    assert "\n" not in str(error.value)


def parquet(values, name="text", type=None):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, type)}), sink)
    return sink.getvalue().to_pybytes()


GOOD = '{"text": "good."}\n'
ODD = {  # what lies in a file, and what is said of it
    "key.jsonl": (f'{GOOD}{{"body": "x"}}\n', "the line at byte 18 is no JSON object with 'text': write text_field=... with one of body"),
    "number.jsonl": ('{"text": 3}\n', "the line at byte 0 has no text in 'text', but 3"),
    "null.jsonl": (f'{GOOD}{{"text": null}}\n', "the line at byte 18 has no text in 'text', but null"),
    "array.jsonl": ('[{"text": "x"}]', "the line at byte 0 is a JSON array: write one object per line"),
    "broken.jsonl": ('{"text": "x"', "the line at byte 0 is no JSON ("),
    "deep.jsonl": ("[" * 9 + '{"a":' * 100_000, "the line at byte 0 is a JSON array"),
    "deeper.jsonl": ('{"a":' * 100_000, "the line at byte 0 is no JSON ("),
    "surrogate.jsonl": (f'{GOOD}{{"text": "a \\ud800 b"}}\n', "the line at byte 18 holds \\ud800, half of a surrogate pair"),
    "latin.jsonl": ('{"text": "naïve"}'.encode("latin-1"), "the line at byte 0: not UTF-8 text (invalid continuation byte at byte 12)"),
    "latin.txt": ("naïve".encode("latin-1"), "not UTF-8 text (invalid continuation byte at byte 2)"),
    "utf16.txt": ("naïve".encode("utf-16"), "UTF-16, not UTF-8 text: convert it with iconv"),
    "packed.txt": (gzip.compress(b"x", mtime=0), "gzip-compressed, not text: name it .gz"),
    "packed.jsonl": (gzip.compress(b"x", mtime=0), "gzip-compressed, not text: name it .gz"),
    "cut.txt.gz": (gzip.compress(os.urandom(100))[:-9], "cannot be read (Truncated compressed stream)"),
    "no.jsonl.zst": ("no", "cannot be read (ZSTD decompress failed: Unknown frame descriptor)"),
    "bad.parquet": ("no", "no Parquet file"),
    "body.parquet": (parquet(["x"], "body"), "no column 'text': write text_field=... with one of body"),
    "int.parquet": (parquet([3]), "column 'text' holds int64, not text: no column holds text"),
    "list.parquet": (parquet([["x"]]), "column 'text' holds list<element: string>, not text"),
    "null.parquet": (parquet(["x", None]), "row 1 has no text in 'text', but null"),
    "binary.parquet": (parquet([b"x", b"\xff"]), "row 1: not UTF-8 text (invalid start byte at byte 0)"),
}  # fmt: skip


def write_odd(folder, name):
    folder.mkdir(exist_ok=True)
    content = ODD[name][0]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize("name", ODD)
def test_a_document_that_cannot_be_used_is_named(tmp_path, name):
    """With its file, row or byte, and the right cause."""
    path = write_odd(tmp_path / "corpus", name)
    with pytest.raises(DataError, match=re.escape(ODD[name][1])) as error:
        built(tmp_path / "data", path, window=2)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_documents_that_cannot_be_used_are_skipped_and_counted_up_to_a_budget(tmp_path, capsys):
    for name in ODD:
        write_odd(tmp_path / "corpus", name)
    (tmp_path / "corpus" / "last.txt").write_text("the last")
    fields = {"inputs": tmp_path / "corpus", "on_error": "skip", "test_share": 0}
    with pytest.raises(
        DataError, match=f"more than skip_budget={len(ODD) - 1} documents skipped; last: .*utf16.txt: UTF-16"
    ):
        built(tmp_path / "data", skip_budget=len(ODD) - 1, **fields)
    folder = built(tmp_path / "data", skip_budget=len(ODD), **fields)  # another budget is no other build
    assert sorted(bytes(found).decode() for found in documents(folder, "train")) == sorted(
        ["good."] * 3 + ["the last", "x", "x"]
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["documents"] == 6
    assert sorted(line.split(": ")[0].rsplit("/")[-1].split(" ")[0] for line in manifest["skipped"]) == sorted(ODD)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(ODD)} documents skipped:" in said and "array.jsonl: the line at byte 0 is a JSON array" in said


def test_mended_input_continues_the_work(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in "abc":
        lines = [json.dumps({"text": f"document {name}{n} of some length"}) for n in range(300)]
        (corpus / f"{name}.jsonl").write_text("\n".join([*lines, *(['{"text": null}'] if name == "c" else [])]))
    with pytest.raises(DataError, match="c.jsonl: the line at byte 12190 has no text in 'text', but null"):
        built(tmp_path / "data", corpus, shard_bytes=4000)
    assert len(list(tmp_path.glob(".data.unfinished/*.done"))) == 9
    (corpus / "c.jsonl").write_text(
        (corpus / "c.jsonl").read_text().replace('{"text": null}', "").replace("c200", "mended")
    )
    (corpus / "a.jsonl").touch()  # written again, but the same
    made = []

    def make(source, number, *more):
        made.append(number)
        return make_shards(source, number, *more)

    monkeypatch.setattr("powernap.train.data.build.make_shards", make)
    folder = built(tmp_path / "data", corpus, shard_bytes=4000)
    assert made == [8, 9]  # one line is mended in a shard that was made
    whole = built(tmp_path / "whole", corpus, shard_bytes=4000)
    assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == {
        p.name: p.read_bytes() for p in whole.glob("*.tar")
    }


def test_parts_of_a_build_on_several_machines(tmp_path, capsys):
    """In any order, at once, and again after one was stopped: the same bytes, one manifest, by the part that ends last."""
    corpus = write(tmp_path / "corpus", "jsonl")
    whole = built(tmp_path / "whole", corpus, shard_bytes=1500)
    fields = {"inputs": str(corpus), "window": 16, "windows": 2, "test_share": 0.1}
    source, folder = CorpusSource(check(Text, fields), 1500), tmp_path / "data"
    build(source, folder, 1, part=(2, 3))
    said = " ".join(capsys.readouterr().out.split())  # it is wrapped
    assert not folder.exists() and re.search(r"\d+ of \d+ shards are missing, which other parts build", said)
    done = sorted((tmp_path / ".data.unfinished").glob("*.done"))
    done[0].unlink()  # as if the part had been stopped there
    context = multiprocessing.get_context("fork")
    parts = [context.Process(target=build, args=(source, folder, 1, (number, 3))) for number in (1, 2, 3)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == {
        p.name: p.read_bytes() for p in whole.glob("*.tar")
    }
    one, other = (json.loads((path / "manifest.json").read_text()) for path in (folder, whole))
    assert {**one, "command": ""} == {**other, "command": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data", "whole"]
    build(source, folder, 1, part=(1, 3))
    assert "is built already" in capsys.readouterr().out


def test_shards_of_input_that_is_no_more_are_not_left_behind(tmp_path):
    corpus = write(tmp_path / "corpus", "jsonl")
    (corpus / "bad.jsonl").write_text('{"text": null}')
    (corpus / "all.jsonl").rename(corpus / "a.jsonl")
    with pytest.raises(DataError):
        built(tmp_path / "data", corpus)
    (corpus / "bad.jsonl").unlink()
    (corpus / "a.jsonl").write_text((corpus / "a.jsonl").read_text()[:2000].rpartition("\n")[0])
    folder = built(tmp_path / "data", corpus)
    assert json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"] == 1
    assert len(list(folder.glob("train-*.tar"))) == 1 and not list(folder.glob("*.done"))


def test_another_tokenizer_is_another_build(tmp_path):
    """If a shard is finished that another one made."""
    write_odd(tmp_path / "corpus", "null.jsonl")
    (tmp_path / "corpus" / "a.txt").write_text("fine")
    vocabulary = {character: n for n, character in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    for _ in "to":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(DataError) as error:
            built(tmp_path / "data", tmp_path / "corpus", shard_bytes=1, tokenizer=str(tmp_path / "tokenizer.json"))
        vocabulary = {character: 255 - n for character, n in vocabulary.items()}
    assert "holds part of another build (tokenizer_sha256=" in str(error.value)


def test_a_corrected_field_is_no_other_build(tmp_path):
    """Where the wrong one finished no shard."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"id": 1, "doc": {"body": "a text", "tags": {"en": "x"}}}\n')
    with pytest.raises(
        DataError, match=r"no JSON object with 'text': write text_field=... with one of doc.body, doc.tags.en$"
    ):
        built(tmp_path / "data", tmp_path / "corpus")
    folder = built(tmp_path / "data", tmp_path / "corpus", text_field="doc.body", test_share=0)
    assert json.loads((folder / "manifest.json").read_text())["documents"] == 1


def test_compressed_files_and_upper_case_endings_are_read(tmp_path):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    rows = [(json.dumps({"text": document}) + "\n").encode() for document in DOCUMENTS[2:]]
    zstd = pyarrow.Codec("zstd")
    for name, data in {
        "a.txt.bz2": bz2.compress(DOCUMENTS[0].encode()),
        "b.TXT": DOCUMENTS[1].encode(),
        "c.jsonl.gz": gzip.compress(b"".join(rows[:80])) + gzip.compress(b"".join(rows[80:100])),
        "deep/d.JSONL.ZST": bytes(zstd.compress(b"".join(rows[100:200]))) + bytes(zstd.compress(b"".join(rows[200:]))),
    }.items():
        (tmp_path / "corpus" / name).write_bytes(data)
    folder = built(tmp_path / "data", tmp_path / "corpus", test_share=0)
    assert [bytes(document).decode() for document in documents(folder, "train")] == DOCUMENTS


def test_files_that_are_left_out_are_listed_with_reason_and_count(tmp_path, capsys):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for name in (
        "._a.txt",
        ".git/b.txt",
        "__MACOSX/c.txt",
        "d.csv",
        "e.CSV",
        "f.json",
        "README",
        "g.tar.gz",
        "h.parquet.gz",
    ):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text("not to be read")
    (corpus / "empty.txt").touch()
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "a.txt").write_text("read")
    other.mkdir()
    (other / "linked.txt").write_text("read too")
    (corpus / "link").symlink_to(other)
    (other / "back").symlink_to(corpus)  # a circle
    for inputs in (str(corpus), f"{tmp_path}/c*"):
        files, left_out = check(Text, {"inputs": inputs}).files()
        assert [os.path.basename(file) for file in files] == ["a.txt", "linked.txt"]
        assert {reason: len(paths) for reason, paths in left_out.items()} == {
            "hidden": 3, ".csv": 1, ".CSV": 1, ".json": 1, "without an ending": 1, ".tar.gz": 1, ".parquet.gz": 1,
            "empty": 1, "broken link": 1,
        }  # fmt: skip
    built(tmp_path / "data", corpus, test_share=0)
    said = " ".join(capsys.readouterr().out.split())
    assert f"3 hidden ({corpus}/._a.txt, ...)" in said and f"1 .csv ({corpus}/d.csv)" in said


@pytest.mark.parametrize("shard_bytes", [10**6, 60])
def test_documents_of_other_lengths_than_wanted_are_left_out_and_counted(tmp_path, capsys, shard_bytes):
    texts = ["x" * n for n in (1, 8, 9, 10, 20, 21, 50)]  # with the end, one token more
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    fields = dict(inputs=tmp_path / "a.jsonl", test_share=0, shard_bytes=shard_bytes)
    for limits, kept in (
        (dict(min_tokens=10), texts[2:]),
        (dict(max_tokens=21), texts[:5]),
        (dict(min_tokens=10, max_tokens=21), texts[2:5]),
    ):
        folder = built(tmp_path / "-".join(limits), **fields, **limits)
        assert [bytes(found).decode() for found in documents(folder, "train")] == kept
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["documents"] == len(kept) == manifest["splits"]["train"]["documents"]
        assert sum(manifest["left_out"].values()) == len(texts) - len(kept)
        assert "text_bytes" not in manifest["splits"]["train"]
    assert "2 documents left out: fewer than min_tokens" in capsys.readouterr().out


def test_a_long_document_passes_the_filters_a_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 2**10)
    path = long_text(tmp_path)
    text = check(Text, {"inputs": str(path), "min_tokens": 5000})
    pieces = text._of_fitting_length(text._bearing_loss([(str(path), 0, path.stat().st_size)], Tally()), Tally())
    tokens = np.concatenate([tokens for _, tokens, _, _ in pieces])
    assert bytes(tokens[:-1].astype(np.uint8)) == path.read_bytes() and tokens[-1] == 256


def test_an_empty_result_is_refused(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="the input holds no text: no samples, so no shards"):
        built(tmp_path / "data", tmp_path / "blank.jsonl")
    (tmp_path / "held.txt").write_text("held out")
    with pytest.raises(DataError, match="all 1 documents are held out: write a smaller test_share"):
        built(tmp_path / "data", tmp_path / "held.txt", test_share=0.9999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.jsonl", "held.txt"]


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "three"}\r\n{"text": "\ufefffour"}'.encode())
    (tmp_path / "c.parquet").write_bytes(parquet(["\ufefffive"]))
    (tmp_path / "d.parquet").write_bytes(parquet(["six"], type=pyarrow.dictionary(pyarrow.int8(), pyarrow.string())))
    (tmp_path / "e.parquet").write_bytes(parquet([b"seven"]))
    folder = built(tmp_path / "data", tmp_path, test_share=0)
    texts = ["one\r\ntwo\r\n", "three", "four", "five", "six", "seven"]
    assert [bytes(document).decode() for document in documents(folder, "train")] == texts


# -------------------------------------------------------------------------------------------------------- long documents


def long_text(tmp_path, name="long.txt"):
    words = [f"word{n}{' ' if n % 9 else chr(10)}" for n in range(20_000)]
    (tmp_path / name).write_text("".join(words).replace("word7", "wörd7"))
    return tmp_path / name


def test_memory_is_bounded_in_a_long_document(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 2**12)
    monkeypatch.setattr(reading, "HEAD", 2**12)
    monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 2**10)
    path = long_text(tmp_path)
    text = check(Text, {"inputs": str(path), "test_share": 0})
    text.vocabulary  # noqa: B018
    advanced = []
    tally = Tally(advance=advanced.append)
    tracemalloc.start()
    samples = sum(1 for _ in text.samples([(str(path), 0, path.stat().st_size)], tally))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples > 100 and peak < path.stat().st_size
    assert len(advanced) > 20 and sum(advanced) >= path.stat().st_size


def test_a_document_that_is_carried_whole_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    """Unless its tokens depend on where a text begins: then it is one piece."""
    path = long_text(tmp_path)
    text, size = check(Text, {"inputs": str(path), "documents": "whole"}), path.stat().st_size
    monkeypatch.setattr(reading, "PIECE", 2**12)
    pieces = list(text.reader.raw((str(path), 0, size), Tally()))
    assert len(pieces) > 20 and b"".join(piece.data for piece in pieces) == path.read_bytes()
    in_one = Reader("text", "file", whole=True, one_piece=True)
    assert [piece.data for piece in in_one.raw((str(path), 0, size), Tally())] == [path.read_bytes()]


def test_texts_are_tokenized_together_as_one_by_one(tmp_path):
    """In the order of the files, each error beside its document, the same tokens on several threads."""
    corpus = write(tmp_path / "corpus", "jsonl")
    (corpus / "b.jsonl").write_text(
        '{"text": "good one"}\n{"text": "no </s> good"}\n{"text": null}\n{"text": "last one"}\n'
    )
    vocabulary = {character: n for n, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**vocabulary, "</s>": 256}, unk_token="!"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fields = {"inputs": str(corpus), "tokenizer": str(tmp_path / "tokenizer.json"), "on_error": "skip"}
    found = []
    for threads in (1, 3):
        use_threads(threads)
        text, tally = check(Text, fields), Tally(9)
        parts = [(str(corpus / name), 0, 10**9) for name in ("all.jsonl", "b.jsonl")]
        found.append([tokens.tolist() for _, tokens, _ in text._tokenized(parts, tally)])
        assert len(tally.skipped) == 1 and "has no text in 'text', but null" in tally.skipped[0]
    use_threads(1)
    assert found[0] == found[1] and len(found[0]) == len(DOCUMENTS) + 3
    assert all(tokens == [*text.vocabulary.encode(d), 256] for tokens, d in zip(found[0], DOCUMENTS, strict=False))


def test_the_progress_bar_moves_within_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 2**12)
    path = long_text(tmp_path)
    text = check(Text, {"inputs": str(path)})
    size, advanced = path.stat().st_size, []
    make_shards(CorpusSource(text, size), 0, Job(0, size, [(str(path), 0, size)]), tmp_path, advanced.append)
    assert len(advanced) > 20 and sum(advanced) == size


@pytest.mark.parametrize("line_ends", [True, False])
def test_one_long_text_is_divided_among_shards(tmp_path, monkeypatch, line_ends):
    """All cores have work, no word is cut, and the document is ended once."""
    monkeypatch.setattr(reading, "PIECE", 2**10)
    path = long_text(tmp_path)
    if not line_ends:
        path.write_text(path.read_text().replace("\n", " "))
    text = check(Text, {"inputs": str(path), "test_share": 0.5})
    jobs = text.jobs(10_000)
    assert len(jobs) == -(-path.stat().st_size // 10_000)
    found = [list(text._tokenized(parts, Tally())) for parts, _ in jobs]
    assert len({split for job in found for split, _, _ in job}) == 1
    assert [ends for job in found for _, _, ends in job].count(True) == 1 and found[-1][-1][1][-1] == 256
    pieces = [bytes(tokens[tokens < 256].astype(np.uint8)) for job in found for _, tokens, _ in job]
    assert b"".join(pieces) == path.read_bytes() and len(pieces) > 2 * len(jobs)
    assert all(piece[:1] == b" " or before[-1:] == b"\n" for before, piece in itertools.pairwise(pieces))
    whole = check(Text, {"inputs": str(path), "documents": "whole"})
    assert [parts for parts, _ in whole.jobs(10_000)] == [[(str(path), 0, path.stat().st_size)]]


@pytest.mark.parametrize(
    "data", ["", "a", "é" * 40, "a b" * 30, "\n" * 50, "x" * 33 + "\n y\n\nz", "日本語" * 20 + "\n "]
)
def test_no_byte_is_lost_wherever_a_text_is_divided(tmp_path, monkeypatch, data):
    path = tmp_path / "a.txt"
    path.write_text(data)
    total = path.stat().st_size
    for piece, size in itertools.product((4, 7, 64), range(1, 60, 3)):
        monkeypatch.setattr(reading, "PIECE", piece)
        parts = list(Reader("text", "file", whole=False).parts(str(path), size, check=True))
        pieces = [piece for part, _ in parts for piece in Reader("text", "file", whole=False).raw(part, Tally())]
        assert "".join(piece.text() for piece in pieces) == data  # each is UTF-8 by itself
        assert sum(weight for _, weight in parts) == total


@pytest.mark.parametrize("kind", ["paragraph", "line"])
def test_a_document_of_a_txt_may_be_a_paragraph_or_a_line(tmp_path, kind):
    text = "\n \none\nmore of one\n\n\ntwo\r\n\r\nthree\nlines\nhere\n\nfour"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    lines = ["one", "more of one", "two", "three", "lines", "here", "four"]
    expected = lines if kind == "line" else ["one\nmore of one", "two", "three\nlines\nhere", "four"]
    reader = Reader("text", kind, whole=False)
    for size in range(1, len(text) + 2):
        found = []
        for path in (tmp_path / "a.txt", tmp_path / "b.txt.gz"):
            for part, _ in reader.parts(str(path), size, check=True):
                for document in reader.documents(part, Tally()):
                    assert isinstance(document, Document) and document.ends
                    found += [piece.text() for piece in document.pieces]
        assert found == expected * 2


def test_fields_without_sense():
    with pytest.raises(RecipeError, match="inputs is empty"):
        check(Text, {"inputs": []})


def test_whole_documents_begin_sequences_of_their_own(tmp_path):
    folder = built(tmp_path / "data", write(tmp_path / "corpus", "jsonl"), documents="whole", test_share=0)
    found = []
    for path in sorted(folder.glob("train-*.tar")):
        shard = sequences_of(path, Cutting(33, "whole", BYTES.pad, 258))
        assert 0 < len(shard.documents) < len(shard)
        for number, sample in enumerate(shard):
            here = sample.tokens[sample.tokens != BYTES.pad].tolist()
            assert np.array_equal(sample.loss_mask, (np.arange(33) > 0) & (sample.tokens != BYTES.pad))
            if shard.begins_document(number):
                found.append(here)
            else:
                assert found[-1].pop() == here[0]
                found[-1] += here
    assert all(document.pop() == BYTES.end for document in found)
    assert [bytes(document).decode() for document in found] == DOCUMENTS
