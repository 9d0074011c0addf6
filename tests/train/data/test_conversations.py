"""Conversations and questions: the loss is on what the assistant says, and on how it ends."""

import json

import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet

from powernap.model.batch import plan_segments
from powernap.train.config import Recipe
from powernap.train.data.build import build
from powernap.train.data.check import check_data
from powernap.train.data.sample import DataError
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.sequences import Cutting
from powernap.train.data.text import Text
from powernap.train.data.tokenizer import load_tokenizer
from powernap.train.recipe_file import RecipeError, check
from tests.helpers import tiny
from tests.helpers.streams import one_line, sequences_of

CHATS = [
    [
        ("system", "be short"),
        ("user", f"what is {n}?"),
        ("assistant", f"{n} is {n}"),
        ("user", "and?"),
        ("assistant", ""),
    ]
    for n in range(20)
]
ENDS_WITH_USER = [("assistant", "hello"), ("user", "bye")]
RECORDS = [{"m": {"turns": [dict(role=r, content=c) for r, c in chat]}} for chat in [*CHATS, ENDS_WITH_USER]]
SHARE_GPT = [
    {"m": {"turns": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c} for r, c in chat]}}
    for chat in [*CHATS, ENDS_WITH_USER]
]


def built(folder, records, name="a.jsonl", **fields):
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), corpus / name, row_group_size=8)
    else:
        (corpus / name).write_text("\n".join(map(json.dumps, records)))
    text = check(Text, {"inputs": str(corpus / name), "test_share": 0, "window": 16, **fields})
    build(CorpusSource(text, 10**6), folder / "data", workers=1)
    return folder / "data"


def documents_of(data, tokenizer):
    """(tokens, loss mask) of each, from sequences of their own."""
    found = []
    for path in sorted(data.glob("train-*.tar")):
        for sample in sequences_of(path, Cutting(1025, "whole", tokenizer.pad, tokenizer.vocab_size), data / "cache"):
            length = int((sample.tokens != tokenizer.pad).sum())
            found.append((sample.tokens[:length].tolist(), sample.loss_mask[:length].tolist()))
    return found


def expected(chat, template, end):
    tokens, mask = [], []
    for role, content in chat:
        before, after = template.replace("{role}", role).split("{content}")
        loss = role == "assistant"
        tokens += [*f"{before}{content}{after}".encode()]
        mask += [False] * len(before.encode()) + [loss] * len(f"{content}{after}".encode())
    tokens, mask = [*tokens, end], [*mask, chat[-1][0] == "assistant"]
    return tokens, [False, *mask[1:]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("records", [RECORDS, SHARE_GPT], ids=["role", "from"])
@pytest.mark.parametrize("turn", ["plain", "<{role}>{content}</>"])
def test_the_loss_is_on_the_answers(tmp_path, name, records, turn):
    data = built(tmp_path, records, name, chat_field="m.turns", turn=turn)
    template = "{role}: {content}\n" if turn == "plain" else turn
    chats = [*CHATS, ENDS_WITH_USER]
    assert documents_of(data, load_tokenizer("bytes")) == [expected(chat, template, 256) for chat in chats]
    assert json.loads((data / "manifest.json").read_text())["documents"] == len(chats)


def test_questions_and_answers(tmp_path):
    pairs = [{"q": f"what is {n}?", "of": {"a": f"it is {n}"}} for n in range(20)]
    data = built(tmp_path, pairs, text_field="q", answer_field="of.a")
    chats = [[("user", pair["q"]), ("assistant", pair["of"]["a"])] for pair in pairs]
    assert documents_of(data, load_tokenizer("bytes")) == [expected(chat, "{role}: {content}\n", 256) for chat in chats]


def test_special_tokens_of_a_template_are_the_tokenizers_and_those_in_a_content_are_refused(tmp_path):
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    trained.train_from_iterator([c for chat in CHATS for _, c in chat], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    fields = dict(chat_field="m.turns", turn="chatml", tokenizer=str(tmp_path / "tokenizer.json"))
    sly = [{"m": {"turns": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]}}]
    data = built(tmp_path, RECORDS[:1] + sly, on_error="skip", **fields)
    tokens, mask = documents_of(data, load_tokenizer(fields["tokenizer"]))[0]
    assert tokens.count(0) == tokens.count(1) == 5 and tokens[-1] == 2  # a start and an end of each turn
    ends = [place for place, token in enumerate(tokens) if token == 1]
    assert [mask[place] for place in ends] == [False, False, True, False, True]
    assert not any(mask[place] for place, token in enumerate(tokens) if token == 0)


def test_every_window_is_read_whatever_it_holds(tmp_path):
    """Sequences that bear loss in different windows train side by side, if documents are separate."""
    data = built(tmp_path, RECORDS, chat_field="m.turns")
    recipe = Recipe.model_validate(
        {
            "run": {"name": "test"},
            "model": tiny.model_config(window=16, vocab_size=258, pad_token_id=257).model_dump(),
            "sleep": {"passes": 2, "every_window": True},
            "data": {
                "train": f"{data}/train-*.tar",
                "sequence_length": 129,
                "documents": "separate",
                "cache": str(tmp_path),
            },
            "train": {"steps": 1, "global_batch_size": 1},
            "optimizer": {"warmup_steps": 0},
        }
    )
    check_data(recipe)
    samples = list(sequences_of(data / "train-000000.tar", Cutting.of(recipe.data, recipe.model)))
    import torch

    tokens, mask = (torch.from_numpy(np.stack([getattr(s, name) for s in samples])) for name in ("tokens", "loss_mask"))
    segments = plan_segments(tokens, mask, recipe.model, recipe.sleep, 2, separate=True)
    assert {segment.window for segment in segments if segment.predicts} == set(range(8))
    packed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"documents": "packed"})})
    with pytest.raises(DataError) as error:
        check_data(packed)
    assert "write data.documents=separate" in one_line(error)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"m": {}}, "is no JSON object with 'm.turns': write chat_field=..."),
        ({"m": {"turns": "text"}}, 'has no conversation, a list of {role, content}, but "text"'),
        ({"m": {"turns": []}}, "has no conversation"),
        ({"m": {"turns": [{"role": "user"}]}}, "a turn must have a role and a content, both text"),
        ({"m": {"turns": [3]}}, "a turn must have a role and a content, both text, not 3"),
        ({"m": {"turns": [{"role": "user", "content": "x"}]}}, "nothing that an assistant says"),
    ],
)
def test_records_that_are_no_conversation(tmp_path, record, message):
    with pytest.raises(DataError) as error:
        built(tmp_path, [record], chat_field="m.turns")
    assert message in one_line(error) and "a.jsonl: the line at byte 0" in str(error.value)


def test_fields_that_do_not_go_together(tmp_path):
    with pytest.raises(RecipeError, match="answer_field and chat_field are both given"):
        check(Text, {"inputs": "x", "chat_field": "a", "answer_field": "b"})
    with pytest.raises(RecipeError, match="write plain, chatml or a text with one {content}"):
        check(Text, {"inputs": "x", "chat_field": "a", "turn": "{role}"})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a.txt: no .jsonl, .parquet or .arrow, which hold conversations"):
        build(CorpusSource(check(Text, {"inputs": str(tmp_path / "a.txt"), "chat_field": "a"}), 100), tmp_path / "data")
