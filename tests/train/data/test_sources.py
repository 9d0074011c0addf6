"""What people have on disk, in every form: the same documents give the same tokens; what is damaged is refused in one line."""

import functools
import gzip
import http.server
import io
import json
import threading

import fsspec
import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet
from webdataset.writer import TarWriter

from powernap.train.data import cache
from powernap.train.data.build import build
from powernap.train.data.cache import ShardCache
from powernap.train.data.documents import Tally, Tokens
from powernap.train.data.sample import DataError
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.sequences import document_lengths
from powernap.train.data.shard import Shard
from powernap.train.data.text import Text
from powernap.train.recipe_file import check
from tests.helpers.fuzzing import fuzz, no_longer_than
from tests.helpers.streams import one_line

DOCUMENTS = [f"Document {n} — naïve\n" + "word " * (n % 17) for n in range(60)]
TOKENS = [[*document.encode(), 256] for document in DOCUMENTS]  # with the end of a document


def arrow(table, path, form=ipc.new_stream, codec=None):
    sink = io.BytesIO()
    with form(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    data = sink.getvalue()
    path.write_bytes(pyarrow.Codec(codec).compress(data, asbytes=True) if codec else data)


def megatron(folder, ends=True):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    import powernap.model.megatron  # noqa: F401

    builder = IndexedDatasetBuilder(str(folder / "a.bin"), dtype=np.uint16)
    for tokens in TOKENS:
        tokens = np.array(tokens if ends else tokens[:-1], np.uint16)
        builder.add_document(tokens, [len(tokens) - 5, 5])  # of two sequences
    builder.finalize(str(folder / "a.idx"))


def datatrove(folder):
    np.concatenate(TOKENS).astype("<u2").tofile(folder / "a.ds")
    np.cumsum(list(map(len, TOKENS))).astype("<u8").tofile(folder / "a.ds.index")
    (folder / "a.ds.metadata").write_text("bytes\n1\n1 T")


def hugging_face(folder):
    datasets = pytest.importorskip("datasets")  # what evaluation in lm-evaluation-harness brings
    datasets.Dataset(TABLE).save_to_disk(folder / "set", num_shards=3)


def tar(folder, member):
    with TarWriter(str(folder / "a.tar")) as writer:
        for n, (document, tokens) in enumerate(zip(DOCUMENTS, TOKENS, strict=True)):
            content = {"txt": document, "json": {"of": {"text": document}}, "ids.npy": np.array(tokens, np.uint16)}
            writer.write({"__key__": f"{n:03d}", member: content[member], "cls": n})


TABLE = pyarrow.table(
    {"id": range(60), "text": DOCUMENTS, "of": [{"text": d, "n": 1} for d in DOCUMENTS], "ids": TOKENS}
)
LINES = "\n".join(json.dumps({"of": {"text": d}, "a.b": d, "ids": t}) for d, t in zip(DOCUMENTS, TOKENS, strict=True))
# form -> what writes it into a folder, and the fields of the build
FORMS = {
    "jsonl, nested": (lambda f: (f / "a.jsonl").write_text(LINES), {"text_field": "of.text"}),
    "jsonl, a dot in the name": (lambda f: (f / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())), {"text_field": "a.b"}),
    "jsonl of tokens": (lambda f: (f / "a.jsonl.zst").write_bytes(pyarrow.Codec("zstd").compress(LINES.encode(), asbytes=True)), {"text_field": "ids"}),
    "parquet": (lambda f: parquet.write_table(TABLE, f / "a.parquet", row_group_size=20), {}),
    "parquet, nested": (lambda f: parquet.write_table(TABLE, f / "a.parquet"), {"text_field": "of.text"}),
    "parquet of tokens": (lambda f: parquet.write_table(TABLE, f / "a.parquet"), {"text_field": "ids"}),
    "arrow, streamed": (lambda f: arrow(TABLE, f / "a.arrow"), {}),
    "arrow, a file": (lambda f: arrow(TABLE, f / "a.arrow", ipc.new_file), {"text_field": "of.text"}),
    "arrow, compressed": (lambda f: arrow(TABLE, f / "a.arrow.zst", codec="zstd"), {"text_field": "ids"}),
    "a data set of Hugging Face": (hugging_face, {}),
    "Megatron": (megatron, {}),
    "Megatron, no ends": (lambda f: megatron(f, ends=False), {}),
    "datatrove": (datatrove, {}),
    "a tar of text": (lambda f: tar(f, "txt"), {"inputs": "{}/a.tar"}),
    "a tar of json": (lambda f: tar(f, "json"), {"inputs": "{}/*.tar", "text_field": "json.of.text"}),
    "a tar of tokens": (lambda f: tar(f, "ids.npy"), {"inputs": "{}/a.tar", "text_field": "ids.npy"}),
}  # fmt: skip


def built(folder, corpus, shard_bytes=10**6, **fields):
    fields = {"test_share": 0, "inputs": "{}", **fields}
    fields["inputs"] = fields["inputs"].format(corpus)
    build(CorpusSource(check(Text, fields), shard_bytes), folder, workers=1)
    return folder


def tokens_of(folder, shard="train-*.tar"):
    """Every document of the shards."""
    found = []
    for path in sorted(folder.glob(shard)):
        opened = Shard.open(str(path), ShardCache(folder / "cache"))
        tokens = np.concatenate([opened.read_tokens(n, 0, int(opened.tokens[n])) for n in range(len(opened))])
        found += [part.tolist() for part in np.split(tokens, document_lengths(opened).cumsum()[:-1])]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, form):
    write, fields = FORMS[form]
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    assert tokens_of(built(tmp_path / "data", tmp_path / "corpus", **fields)) == TOKENS
    divided = built(tmp_path / "divided", tmp_path / "corpus", shard_bytes=900, **fields)
    assert tokens_of(divided) == TOKENS  # wherever it can be divided among cores
    assert len(list(divided.glob("*.tar"))) > 2 or "row_group" not in form


@pytest.fixture
def site(tmp_path):
    """A web server of tmp_path/site."""
    (tmp_path / "site").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("form", ["jsonl of tokens", "parquet", "arrow, streamed", "a tar of text"])
def test_files_of_a_web_server(tmp_path, site, form):
    write, fields = FORMS[form]
    write(tmp_path / "site")
    (path,) = (tmp_path / "site").iterdir()
    inputs = f"{site}/{path.name}?token=1"
    assert tokens_of(built(tmp_path / "data", "", **{**fields, "inputs": inputs})) == TOKENS


def test_folders_and_patterns_of_an_object_store(tmp_path):
    memory = fsspec.filesystem("memory")
    for number, document in enumerate(DOCUMENTS):
        memory.pipe(f"/corpus/{number // 30}/{number:03d}.txt", document.encode())
    memory.pipe("/corpus/notes.pdf", b"")
    for inputs in ("memory://corpus", "memory://corpus/*/*.txt"):
        folder = built(tmp_path / f"data{'*' in inputs}", "", inputs=inputs)
        assert tokens_of(folder) == TOKENS
    memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("memory://nothing/*.txt", "inputs=memory://nothing/*.txt: no file there"),
        ("memory://a.csv", "memory://a.csv is no .txt, .jsonl, .parquet, .arrow or .tar"),
        ("nowhere://a.txt", "inputs=nowhere://a.txt: cannot be listed (Protocol not known: nowhere)"),
        ("{site}/gone.txt", "gone.txt: no such file"),
    ],
)
def test_remote_inputs_that_are_not_there(tmp_path, site, monkeypatch, inputs, message):
    monkeypatch.setattr(cache, "FIRST_DELAY", 0.01)
    with pytest.raises(DataError) as error:
        built(tmp_path / "data", "", inputs=inputs.replace("{site}", site))
    assert message in one_line(error)


def write_idx(folder, change):
    megatron(folder)
    data = bytearray((folder / "a.idx").read_bytes())
    for place, new in change.items():
        data[place : place + len(new)] = new
    (folder / "a.idx").write_bytes(data)


BROKEN = {
    "no Megatron": (lambda f: write_idx(f, {0: b"X"}), {}, "the .idx beside it is none of Megatron's"),
    "a type of number": (lambda f: write_idx(f, {17: b"\x63"}), {}, "the .idx beside it is none of Megatron's"),
    "too many documents": (lambda f: write_idx(f, {26: b"\xff" * 8}), {}, "the .idx beside it is none of Megatron's"),
    "a negative length": (lambda f: write_idx(f, {34: b"\xff" * 4}), {}, "the .idx beside it is damaged"),
    "a cut .bin": (lambda f: (megatron(f), (f / "a.bin").write_bytes(b"12")), {}, "document 0 cannot be read"),
    "a .ds of one byte": (lambda f: (datatrove(f), (f / "a.ds").write_bytes(b"1")), {}, "tokens of two or four bytes"),
    "a falling index": (lambda f: (datatrove(f), np.array([5, 3], "<u8").tofile(f / "a.ds.index")), {}, "none of datatrove's"),
    "losses": (lambda f: (datatrove(f), (f / "a.ds.loss").touch()), {}, "has a .loss beside it"),
    "an arrow of text": (lambda f: (f / "a.arrow").write_text("text"), {}, "no Arrow file"),
    "a cut tar": (lambda f: (tar(f, "txt"), (f / "a.tar").write_bytes((f / "a.tar").read_bytes()[:1700])), {"inputs": "{}/a.tar"}, "not a whole tar file"),
    "a tar cut between samples": (lambda f: (tar(f, "txt"), (f / "a.tar").write_bytes((f / "a.tar").read_bytes()[:4096])), {"inputs": "{}/a.tar"}, "cut off after 4096 bytes"),
    "no member": (lambda f: tar(f, "json"), {"inputs": "{}/a.tar"}, "sample 000 has no member 'text': write text_field=... with one of cls, json"),
    "no text in it": (lambda f: tar(f, "json"), {"inputs": "{}/a.tar", "text_field": "json.of"}, "has no text in 'text_field'"),
    "other tokens": (lambda f: (f / "a.jsonl").write_text('{"text": [1, 400]}'), {}, "has token 400, tokenizer=bytes counts 258: write the tokenizer that made them, or tokenizer=ids:401"),
    "negative tokens": (lambda f: (f / "a.jsonl").write_text('{"text": [1, -4]}'), {}, "holds numbers in 'text' that are no tokens"),
    "text for numbers": (lambda f: (f / "a.txt").write_text("text"), {"tokenizer": "ids:300"}, "is text, and tokenizer=ids:... knows numbers alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(tmp_path, name):
    write, fields, message = BROKEN[name]
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    with pytest.raises(DataError) as error:
        built(tmp_path / "data", tmp_path / "corpus", **fields)
    assert message in one_line(error) and str(tmp_path / "corpus") in str(error.value)


def test_files_of_tokens_want_their_index(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"12")
    (tmp_path / "b.ds").write_bytes(b"12")
    (tmp_path / "c.tar").write_bytes(b"12")
    with pytest.raises(DataError, match=r"1 .bin without .idx .*, 1 .ds without .ds.index .*, 1 .tar"):
        built(tmp_path / "data", tmp_path)


FUZZED = {"arrow, streamed": "a.arrow", "arrow, a file": "a.arrow", "parquet": "a.parquet", "a tar of text": "a.tar",
          "a tar of tokens": "a.tar", "Megatron": "a.idx", "datatrove": "a.ds.index"}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folders = {}
    for form in FUZZED:
        folders[form] = tmp_path_factory.mktemp("original")
        FORMS[form][0](folders[form])
    return folders


@fuzz
@given(
    st.sampled_from(sorted(FUZZED)),
    st.lists(st.tuples(st.integers(0, 600) | st.integers(0, 9000), st.binary(min_size=1, max_size=9)), max_size=3),
    st.none() | st.integers(0, 6000),
)
def test_any_damage(originals, tmp_path, form, changes, length):
    """Read or refused in one line, in bounded time; a document that cannot be used is skipped."""
    for path in originals[form].iterdir():
        data = bytearray(path.read_bytes())
        if path.name == FUZZED[form]:
            for place, new in changes:
                data[place : place + len(new)] = new
            data = data[:length]
        (tmp_path / path.name).unlink(missing_ok=True)  # an open map of the old one stays whole
        (tmp_path / path.name).write_bytes(data)
    fields = {"inputs": f"{tmp_path}/a.*", "tokenizer": "ids:65536", **FORMS[form][1], "on_error": "skip"}
    text = check(Text, fields | {"inputs": str(tmp_path / FUZZED[form].replace(".idx", ".bin").replace(".index", ""))})
    with no_longer_than():
        try:
            for parts, _ in text.jobs(10**6):
                for document in (d for part in parts for d in text.reader.documents(part, Tally())):
                    for piece in [document] if isinstance(document, DataError) else document.pieces:
                        assert isinstance(piece, Tokens) or "\n" not in str(piece)
        except DataError as error:
            assert "\n" not in str(error)
