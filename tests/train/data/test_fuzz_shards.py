"""Shards, their kept indexes and manifests of all kinds: read, or refused in one line; nothing is unpickled or unpacked."""

import io
import json
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from powernap.train.config import Recipe
from powernap.train.data import bundle
from powernap.train.data.cache import ShardCache
from powernap.train.data.check import check_data
from powernap.train.data.inspect import inspect_shards
from powernap.train.data.sample import MEMBERS, DataError, decode
from powernap.train.data.sequences import Cutting, Sequences
from powernap.train.data.shard import Shard
from tests.helpers import tiny
from tests.helpers.fuzzing import Touching, fuzz, no_longer_than
from tests.helpers.streams import LENGTH, VOCABULARY, write_shard, write_tokens


@pytest.fixture
def shard(tmp_path):
    """A whole shard of three samples in a folder of its own."""
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "train-0.tar"
    write_shard(path, range(3))
    return path


@pytest.fixture
def documents_shard(tmp_path):
    """A whole shard of documents: several in a sample, and one in two samples."""
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "train-0.tar"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 12)
        write_tokens(path, [[1, 2, 3], [4, 5, 6, 7, 8], [9], list(range(10, 28))])
    return path


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache")


def assert_read_or_refused(shard, cache):
    """Everything that is ever read of a shard; the samples, or None if one is refused. Nothing but the cache is written."""
    before = sorted(shard.parent.parent.glob("[!c]*/**/*"))
    samples = None
    with no_longer_than():
        try:
            found = Shard.open(str(shard), cache)
            found.keys(list(range(len(found))))
            cuttings = [Cutting(LENGTH, mode, 0, VOCABULARY) for mode in ("packed", "whole")]
            if found.holds_documents:
                samples = [sample for cutting in cuttings for sample in Sequences(found, cutting)]
            else:
                samples = [decode(members) for members in found]
        except DataError as error:
            assert "\n" not in str(error)
        for read in (lambda: inspect_shards(str(shard), cache), lambda: check_data(recipe(shard, cache))):
            try:
                read()
            except DataError as error:
                assert "\n" not in str(error)
    assert sorted(shard.parent.parent.glob("[!c]*/**/*")) == before
    return samples


def recipe(shard, cache):
    return Recipe.model_validate(
        {
            "run": {"name": "test"},
            "model": tiny.model_config(window=LENGTH - 2, vocab_size=VOCABULARY).model_dump(),
            "data": {"train": str(shard), "sequence_length": LENGTH, "cache": str(cache.folder), "retries": 0},
            "train": {"steps": 1, "global_batch_size": 1},
            "optimizer": {"warmup_steps": 0},
        }
    )


def refresh(shard, data):
    """Other bytes, in a file of its own: an index of the old one is not taken."""
    shard.unlink()
    shard.write_bytes(data)


@fuzz
@given(st.binary(max_size=2000))
def test_any_bytes(shard, cache, data):
    refresh(shard, data)
    assert not assert_read_or_refused(shard, cache)


changes = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 511), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4
)


@fuzz
@given(changes, st.booleans())
def test_any_changes_of_headers(shard, cache, changes, right_checksum):
    write_shard(shard, range(3), mtime=0.5)  # with extended headers
    data = bytearray(shard.read_bytes())
    for block, place, new in changes:
        data[512 * block + place : 512 * block + place + len(new)] = new
        if right_checksum:
            header = data[512 * block : 512 * block + 512]
            data[512 * block + 148 : 512 * block + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    refresh(shard, data)
    assert_read_or_refused(shard, cache)


names = st.sampled_from(["../../x.tokens.npy", "/x.tokens.npy", "a.tokens.npy", "a.loss_mask.npy", "b.lengths.npy"])
members = st.tuples(
    names | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200),
    st.sampled_from([*(bytes([n]) for n in b"01234567gxLKSX"), b"\0", b"?"]),
    st.sampled_from([0, 1, 511, 513, -1, 2**33, 2**62, -(2**62)]),
    st.dictionaries(
        st.sampled_from(
            ["size", "path", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset", "mtime"]
        ),
        st.sampled_from(["0", "1", "-512", "9" * 30, "1,2", "x", "BINARY", "nan", "../../../x.tokens.npy"]),
        max_size=3,
    ),
)


@fuzz
@given(st.lists(members, min_size=1, max_size=4), st.binary(max_size=600))
def test_any_members(shard, cache, members, data):
    """Names that lead elsewhere, links, devices, holes, sizes of all kinds."""
    archive = io.BytesIO()
    for name, kind, size, extended in members:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname, info.pax_headers = kind, size, "../../x", extended
        archive.write(info.tobuf(tarfile.PAX_FORMAT if extended else tarfile.GNU_FORMAT) + data)
        archive.write(bytes(-archive.tell() % 512))
    refresh(shard, archive.getvalue() + shard.read_bytes())
    assert_read_or_refused(shard, cache)


@fuzz
@given(changes, st.booleans())
def test_any_changes_of_documents(documents_shard, cache, changes, right_checksum):
    test_any_changes_of_headers.hypothesis.inner_test(documents_shard, cache, changes, right_checksum)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [2**30, 2**62, -512])
def test_a_header_that_claims_much_gets_nothing(shard, cache, kind, size):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    refresh(shard, info.tobuf(tarfile.GNU_FORMAT) + shard.read_bytes())
    tracemalloc.start()
    try:
        assert assert_read_or_refused(shard, cache) is None
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_chain_of_headers_ends(shard, cache):
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    refresh(shard, 5000 * info.tobuf() + shard.read_bytes())
    assert assert_read_or_refused(shard, cache) is None


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


SAMPLE = {
    "tokens.npy": npy(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({LENGTH},), }}", bytes(4 * LENGTH)),
    "loss_mask.npy": npy(f"{{'descr': '|b1', 'fortran_order': False, 'shape': ({LENGTH},), }}", b"\1" * LENGTH),
    "answers.npy": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (0, 3), }"),
}
dtypes = st.sampled_from(
    ["<i4", ">i8", "<u8", "|b1", "<f4", "<f8", "<c16", "|O", "O", "|V0", "|S0", "<U9", "<M8[ns]", "(2,)i4", "x", "i4,O",
     [("a", "<i4")], [("a", "|O")], ("<i4", (3,)), ["<i4"], None, 4, "<i4" * 50]
)  # fmt: skip
shapes = st.lists(st.sampled_from([0, 1, 3, LENGTH, -1, 2**40, 2**63, 10**30, True, None]), max_size=3).map(tuple)
arrays = st.one_of(
    st.binary(max_size=100),
    st.binary(max_size=60).map(npy),
    st.text(alphabet="{}()[]'\",:=\\ \n\tLldescr0123<>", max_size=40).map(npy),
    st.builds(
        lambda dtype, order, shape, data, version: npy(
            repr({"descr": dtype, "fortran_order": order, "shape": shape}), data, version
        ),
        dtypes, st.sampled_from([False, True, None, 0]), shapes, st.binary(max_size=100),
        st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0"]),
    ),
)  # fmt: skip


@fuzz
@given(st.sampled_from(MEMBERS[:4]), arrays, st.none() | st.just(LENGTH))
def test_any_member_of_a_sample(name, array, length):
    try:
        decode({"__url__": "a.tar", "__key__": "a", **SAMPLE, name: array}, length, VOCABULARY)
    except DataError as error:
        assert "\n" not in str(error)


@fuzz
@given(st.sampled_from(["tokens.npy", "lengths.npy", "loss_spans.npy"]), arrays, st.sampled_from(["b", "a-part000001"]))
def test_any_member_of_documents(documents_shard, cache, name, array, key):
    whole = {"tokens.npy": np.arange(12, dtype=np.uint8), "lengths.npy": np.array([12], np.uint32)}
    documents_shard.unlink()
    with TarWriter(str(documents_shard)) as tar:
        tar.write({"__key__": "a-part000000", **whole})
        tar.write({"__key__": key, **whole, name: array})
    assert_read_or_refused(documents_shard, cache)


def test_documents_that_claim_terabytes_get_nothing(documents_shard, cache):
    for member, dtype in (("tokens.npy", "|u1"), ("lengths.npy", "<u4"), ("loss_spans.npy", "<u4")):
        huge = npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (1000000000000,), }}", bytes(100))
        documents_shard.unlink()
        with TarWriter(str(documents_shard)) as tar:
            whole = {"tokens.npy": np.arange(12, dtype=np.uint8), "lengths.npy": np.array([12], np.uint32)}
            tar.write({"__key__": "a", **whole, member: huge})
        tracemalloc.start()
        try:
            assert assert_read_or_refused(documents_shard, cache) is None
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()


def test_an_array_that_claims_terabytes_gets_nothing():
    decode({"__url__": "a.tar", "__key__": "a", **SAMPLE})
    for shape in ("(1000000000000,)", "(1000000, 1000000)"):
        huge = npy(f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}", bytes(100))
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match="tokens.npy is not a NumPy array"):
                decode({"__url__": "a.tar", "__key__": "a", **SAMPLE, "tokens.npy": huge})
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()


def pickled_arrays(path) -> list[bytes]:
    """An array of one object as NumPy writes it, and the object alone."""
    file = io.BytesIO()
    np.save(file, np.array([Touching(path)], dtype=object), allow_pickle=True)
    return [file.getvalue(), pickle.dumps(Touching(path))]


def test_nothing_is_unpickled(shard, cache, tmp_path):
    pwned = tmp_path / "pwned"
    for data in pickled_arrays(pwned):
        for name in MEMBERS[:4]:
            with pytest.raises(DataError, match="not a NumPy array"):
                decode({"__url__": "a.tar", "__key__": "a", **SAMPLE, name: data})
        assert len(assert_read_or_refused(shard, cache)) == 3
        (kept,) = (cache.folder / "index").iterdir()
        kept.write_bytes(data)
        assert len(assert_read_or_refused(shard, cache)) == 3
    assert not pwned.exists()
    np.load(io.BytesIO(pickled_arrays(pwned)[0]), allow_pickle=True)
    assert pwned.exists()  # it would


INDEX = 3 * (len(MEMBERS) + 1) * 2  # numbers in the index of three samples
places = st.sampled_from([-(2**63), -2, -1, 0, 1, 512, 4096, 2**40, 2**63 - 1])


@fuzz
@given(
    arrays
    | st.binary(max_size=200).map(lambda data: b"PK\3\4" + data)
    | st.lists(places, min_size=INDEX, max_size=INDEX).map(
        lambda numbers: npy(
            f"{{'descr': '<i8', 'fortran_order': False, 'shape': (3, {len(MEMBERS) + 1}, 2), }}",
            np.array(numbers).tobytes(),
        )
    )
)
def test_any_kept_index(shard, cache, data):
    """An index that cannot be of the shard is made again; one that can leads to samples that are none."""
    Shard.open(str(shard), cache)
    for kept in (cache.folder / "index").iterdir():
        kept.write_bytes(data)
    assert_read_or_refused(shard, cache)


@fuzz
@given(st.lists(st.tuples(st.integers(0, INDEX - 1), st.integers(-1, 6000)), max_size=6))
def test_any_kept_index_of_documents(documents_shard, cache, changes):
    Shard.open(str(documents_shard), cache)
    (kept,) = (cache.folder / "index").iterdir()
    index = np.load(kept)
    for place, number in changes:
        index.reshape(-1)[place] = number
    np.save(kept, index)
    assert_read_or_refused(documents_shard, cache)
    kept.unlink(missing_ok=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, 2**32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
manifest_fields = {
    "task": st.sampled_from(["depo", "rule110", "gsm", "gsm_infinite", "text", "other"]) | json_values,
    "fields": st.dictionaries(
        st.sampled_from(["nodes", "max_hop", "tokenizer", "inputs", "rows", "names", "alphabet"]),
        json_values | st.sampled_from(["bytes", "tiktoken:x", "/dev/zero", "/", "x"]),
    )
    | json_values,
    **{name: json_values for name in ("window", "context_length", "pad_token_id", "vocab_size", "command")},
}


@fuzz
@given(
    st.fixed_dictionaries({}, optional=manifest_fields).map(lambda manifest: json.dumps(manifest).encode())
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=50)
    | st.just(b"[" * 100_000)
)
def test_any_manifest(shard, cache, data):
    (shard.parent / "manifest.json").write_bytes(data)
    assert_read_or_refused(shard, cache)
