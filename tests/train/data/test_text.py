"""Text: every document once, packed into sequences; the same from files of every kind, on any number of cores."""

import itertools
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tokenizers

from powernap.train.data.cache import ShardCache
from powernap.train.data.inspect_shards import inspect_shards
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard import Shard
from powernap.train.data.shards import TextSource, build
from powernap.train.data.text import Text
from powernap.train.data.tokenizer import load_tokenizer
from powernap.train.recipe_file import RecipeError, check

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
    build(TextSource(text, shard_bytes), folder, workers)
    return folder


def documents(folder, split, tokenizer=BYTES):
    """All documents of a split, put together again from the sequences of its shards."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        tokens = []
        for members in Shard.open(str(path), ShardCache(folder / "cache")):
            sample = decode(members, 33, tokenizer.vocab_size)
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
    one, two = built(tmp_path / "one", corpus), built(tmp_path / "two", corpus, workers=2)
    assert {p.name: p.read_bytes() for p in one.glob("*.tar")} == {p.name: p.read_bytes() for p in two.glob("*.tar")}
    built(tmp_path / "one", corpus)
    assert "is built already" in capsys.readouterr().out
    (corpus / "more.txt").write_text("more")
    with pytest.raises(DataError, match="exists and is not empty"):
        built(tmp_path / "one", corpus)


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
    assert "*word*" in report.replace("_", "") and "window 0, answers:" in report
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
        ({"inputs": "nowhere"}, "inputs=nowhere: no .txt, .jsonl or .parquet file there"),
        ({"tokenizer": "words"}, "tokenizer=words: write bytes, tiktoken:NAME or the path of a tokenizer.json"),
        ({"tokenizer": "tiktoken:gpt9"}, "tokenizer=tiktoken:gpt9: no such encoding: choose one of "),
        ({"tokenizer": "{corpus}/a.txt"}, "cannot be read"),
        (
            {"inputs": "{corpus}/bad.jsonl"},
            "bad.jsonl: the line at byte 18 is no JSON object with 'text': write text_field",
        ),
        ({"inputs": "{corpus}/number.jsonl"}, "number.jsonl: the line at byte 0 has no text in 'text'"),
        ({"inputs": "{corpus}/latin.txt"}, "latin.txt: not UTF-8 text (invalid continuation byte at byte 2)"),
        ({"inputs": "{corpus}/bad.parquet"}, "bad.parquet: no Parquet file"),
        ({"inputs": "{corpus}/good.parquet"}, "good.parquet: no column 'text': write text_field=... with one of body"),
    ],
)
def test_input_that_is_no_text_is_named(tmp_path, fields, message):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("a text\n")
    (corpus / "bad.jsonl").write_text('{"text": "good."}\n{"body": "x"}\n')
    (corpus / "number.jsonl").write_text('{"text": 3}\n')
    (corpus / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (corpus / "bad.parquet").write_text("no")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), corpus / "good.parquet")
    fields = {"inputs": str(corpus / "a.txt")} | {key: value.format(corpus=corpus) for key, value in fields.items()}
    with pytest.raises(DataError, match=re.escape(message)) as error:
        built(tmp_path / "data", **fields)
    assert "\n" not in str(error.value)


def test_fields_without_sense():
    with pytest.raises(RecipeError, match="inputs is empty"):
        check(Text, {"inputs": []})


def test_whole_documents_begin_sequences_of_their_own(tmp_path):
    folder = built(tmp_path / "data", write(tmp_path / "corpus", "jsonl"), documents="whole", test_share=0)
    found = []
    for path in sorted(folder.glob("train-*.tar")):
        shard = Shard.open(str(path), ShardCache(folder / "cache"))
        assert 0 < len(shard.documents) < len(shard)
        for number, members in enumerate(shard):
            sample = decode(members, 33, 258)
            here = sample.tokens[sample.tokens != BYTES.pad].tolist()
            assert np.array_equal(sample.loss_mask, (np.arange(33) > 0) & (sample.tokens != BYTES.pad))
            if shard.begins_document(number):
                found.append(here)
            else:
                assert found[-1].pop() == here[0]
                found[-1] += here
    assert all(document.pop() == BYTES.end for document in found)
    assert [bytes(document).decode() for document in found] == DOCUMENTS
