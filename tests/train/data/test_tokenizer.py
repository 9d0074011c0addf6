"""Vocabularies change no text without a word: settings of a tokenizer.json, ids with gaps, a model's own end and pad."""

import json
import pickle

import pytest
import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from powernap.train.data.sample import DataError
from powernap.train.data.tokenizer import load_tokenizer
from powernap.train.data.vocabulary import described_by, vocabulary_of

ALPHABET = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
END = "<|endoftext|>"


def byte_level(**ids):
    tokenizer = Tokenizer(models.BPE(vocab=ALPHABET | ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def load(tmp_path):
    def load(tokenizer, **settings):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in settings.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return load_tokenizer(str(tmp_path / "tokenizer.json"))

    return load


def test_what_would_cut_pad_or_vary_a_text_is_switched_off_and_reported(load):
    stored = byte_level()
    stored.enable_truncation(64)
    stored.enable_padding(length=512, pad_id=0)
    stored.model.dropout = 0.5
    loaded = load(stored)
    assert len(loaded.encode("hello " * 50)) == 300
    notes = "\n".join(loaded.notes)
    assert "its stored truncation to 64 tokens is switched off" in notes
    assert "its stored padding is switched off" in notes and "its dropout=0.5 of merges is switched off" in notes


def test_added_ids_follow_the_largest_where_ids_have_gaps(load):
    loaded = load(byte_level(h=400))
    assert (loaded.end, loaded.pad, loaded.vocab_size) == (401, 402, 403)
    assert 400 in loaded.encode("hello")
    detokenizer = loaded.detokenizer()
    assert "".join(detokenizer.step(token) for token in [*loaded.encode("hi"), 300, 401, 500]) == "hi<300>[end]<500>"
    assert loaded.token_name(300) == "<300>"


@pytest.mark.parametrize(
    ("special", "settings", "end", "pad", "notes"),
    [
        ([], {}, 256, 257, ["ends with 256 (added: it has none)", "pads are 257 (added"]),
        ([END], {}, 256, 257, [f"ends with 256 ({END}, a special token of its own)", "pads are 257 (added"]),
        (["<pad>", "</s>"], {}, 257, 256, ["257 (</s>, a special", "256 (<pad>, a special"]),
        (
            [END, "<stop>", "<fill>"],
            {"tokenizer_config": {"eos_token": "<stop>", "pad_token": {"content": "<fill>"}}},
            257,
            258,
            ["257 (<stop>, the eos_token of tokenizer_config.json)", "258 (<fill>, the pad_token of tokenizer_config.json)"],
        ),
        (["<stop>"], {"special_tokens_map": {"eos_token": "<stop>"}}, 256, 257, ["eos_token of special_tokens_map.json"]),
        # A pad that is also the end would hide it.
        ([END], {"tokenizer_config": {"eos_token": END, "pad_token": END}}, 256, 257, ["pads are 257 (added"]),
    ],
)  # fmt: skip
def test_end_and_pad_are_the_models_own_where_it_has_them(load, special, settings, end, pad, notes):
    own = byte_level()
    own.add_special_tokens(special)
    loaded = load(own, **settings)
    assert (loaded.end, loaded.pad) == (end, pad)
    assert loaded.vocab_size == max(256 + len(special), end + 1, pad + 1)
    assert [loaded.token_name(token) for token in (end, pad)] == ["[end]", "[pad]"]
    assert not [note for note in notes if note not in loaded.notes[0]]


def test_special_tokens_in_a_text_are_text(load):
    own = byte_level()
    own.add_special_tokens([END])
    loaded = load(own)
    for tokenizer in (loaded, pickle.loads(pickle.dumps(loaded))):  # as a process of `data build` gets it
        tokens = tokenizer.encode(f"a{END}b")
        assert tokenizer.end not in tokens and not tokenizer.difference(f"a{END}b", tokens)

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.add_special_tokens(["<unk>", AddedToken("</s>", special=True)])
    loaded = load(unigram)
    with pytest.raises(DataError, match="holds '</s>' as text, which tokenizer=.* cannot tell from its special token"):
        loaded.encode("a</s>a")
    one, error, other = loaded.encode_batch(["aa", "a</s>a", "a"])
    assert [one.tolist(), other.tolist()] == [loaded.encode("aa"), loaded.encode("a")]
    assert "holds '</s>' as text" in str(error)
    assert loaded.difference("aéa", loaded.encode("aéa")) == "'aéa' became 'a <unk> a'"


def test_what_changes_or_adds_to_a_text_is_reported(load):
    own = byte_level()
    own.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    own.add_special_tokens(["<s>"])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    loaded = load(own)
    notes = "\n".join(loaded.notes)
    assert "its normalizer (NFKC, Lowercase) changes text: 'Émile paid １２" in notes and "'émile paid 12 fine" in notes
    assert "its post_processor (TemplateProcessing) is not applied" in notes
    assert loaded.difference("an Émile", loaded.encode("an Émile")) == "'an Émile' became 'an émile'"
    assert not loaded.difference("plain", loaded.encode("plain")) and 256 not in loaded.encode("plain")


def test_tokenizers_that_add_a_blank_in_front_do_not_divide_a_document(load):
    own = byte_level()
    assert load(own).separable
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not load(own).separable


def test_shards_built_before_decode_as_before(load, tmp_path):
    """Their manifests have no end_token_id: end and pad were the two ids behind the vocabulary's count."""
    own = byte_level(h=400)
    own.add_special_tokens([END])
    loaded = load(own)
    assert (loaded.end, loaded.pad) == (256, 401)
    fields = {"inputs": "-", "tokenizer": str(tmp_path / "tokenizer.json")}
    old = {"task": "text", "fields": fields, "vocab_size": 259, "pad_token_id": 258}
    for manifest in (old, {"task": "text", "fields": fields}):  # the latter in an exported model
        task = described_by(manifest)
        assert (vocabulary_of(task).end, task.pad_token_id) == (257, 258)
        assert [task.token_name(token) for token in (257, 258)] == ["[end]", "[pad]"]
    assert vocabulary_of(described_by({**old, "end_token_id": 256, "pad_token_id": 401})).end == 256


def test_tiktokens_own_end(monkeypatch):
    ranks = {bytes([n]): n for n in range(256)}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={END: 300})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    loaded = load_tokenizer("tiktoken:tiny")
    assert (loaded.end, loaded.pad, loaded.vocab_size) == (300, 301, 302)
    assert 300 not in loaded.encode(f"a{END}b")


def test_a_text_that_a_library_cannot_tokenize_is_refused(load, monkeypatch):
    pattern = r"\w+| ?[^\s\w]+|\s+(?!\S)|\s"  # of GPT-2, in short
    ranks = {bytes([n]): n for n in range(256)}
    encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    with pytest.raises(DataError, match=r"cannot be tokenized by tiktoken \(.*StackOverflow"):
        load_tokenizer("tiktoken:tiny").encode(" " * 1_000_000 + "x")
    one, error = load_tokenizer("tiktoken:tiny").encode_batch(["x y", " " * 1_000_000 + "x"])
    assert one.tolist() == [120, 32, 121] and "cannot be tokenized by tiktoken" in str(error)
    loaded = load(Tokenizer(models.WordLevel({"The": 0}, unk_token="<none>")))
    with pytest.raises(DataError, match="cannot be tokenized by .*tokenizer.json"):
        loaded.encode("word")
    one, error = loaded.encode_batch(["The", "word"])  # the library answers for all of them at once
    assert one.tolist() == [0] and "cannot be tokenized by" in str(error)


def test_a_broken_file_beside_the_tokenizer_is_named(load, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json: cannot be read"):
        load(byte_level())
