"""GSM-Infinite's published lines as samples: question first, and the answer alone bears loss."""

import bz2
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from powernap.launch import cli
from powernap.train.config import Recipe
from powernap.train.data.build import build
from powernap.train.data.cache import ShardCache
from powernap.train.data.gsm_infinite import GsmInfinite
from powernap.train.data.inspect import inspect_shards
from powernap.train.data.sample import DataError, decode
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.shard import Shard
from powernap.train.data.tokenizer import load_tokenizer
from powernap.train.data.verify import verify
from powernap.train.data.vocabulary import TextVocabulary, depth_name_of
from powernap.train.evaluation.floors import Floor
from powernap.train.generation.export import export
from powernap.train.generation.generate import load_run
from powernap.train.recipe_file import RecipeError, check
from powernap.train.run.folder import RunFolder
from tests.helpers import runs


def line(number, *, op=2, **changes):
    """A line with all fields of the published data, in their order."""
    problem = f"The number of adult owl in Maple Creek equals {number}. "
    problem += "The number of adult deer in Maple Creek equals 3 plus the number of adult owl in Maple Creek. "
    fields = {
        "problem": problem,
        "question": "How many adult deer does Maple Creek have?",
        "solution": f"Define adult owl in Maple Creek as y; so y = {number}. Define adult deer in Maple Creek as P; "
        f"so P = 3 + y = 3 + {number} = {number + 3}. Answer: {number + 3}.",
        "op": op,
        "id": 7,
        "template": "crazy_zootopia",
        "mode": "normalforward",
        "length": "zero_context",
        "d": 2,
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE, trained on such lines, with an end token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    texts = [str(part) for n in range(20) for part in (*line(n).values(), f"Answer: {n}.")]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    trained.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


def task(inputs, **fields):
    return check(GsmInfinite, {"inputs": str(inputs), "window": 64, "windows": 4, **fields})


def samples(folder):
    """Split -> samples, in order."""
    return {
        split: [
            decode(members)
            for path in sorted(folder.glob(f"{split}-*.tar"))
            for members in Shard.open(str(path), ShardCache(folder.parent / "cache"))
        ]
        for split in ("train", "test")
    }


def read(sample, words, context_length):
    """Context, cue and answer as text; the pads are where they belong."""
    (start, stop, _) = sample.answers[0]
    assert len(sample.answers) == 1 and np.array_equal(np.flatnonzero(sample.loss_mask), np.arange(start, stop))
    tokens = sample.tokens.tolist()
    context = [token for token in tokens[:context_length] if token != words.pad]
    assert tokens[: len(context)] == context and set(tokens[stop:]) <= {words.pad} and tokens[stop - 1] == words.end
    detokenizer = words.detokenizer()
    spell = lambda tokens: "".join([*map(detokenizer.step, tokens), detokenizer.finish()])  # noqa: E731
    return spell(context), spell(tokens[context_length:start]), spell(tokens[start : stop - 1])


@pytest.mark.parametrize("real", [True, False])
def test_question_problem_and_answer(tmp_path, tokenizer, real):
    name = str(tokenizer) if real else "bytes"
    lines = [line(n, op=2 + n % 3) for n in range(50)]
    write(tmp_path / "in" / "a.jsonl", lines[:30])
    (tmp_path / "in" / "b.jsonl.bz2").write_bytes(bz2.compress("\n".join(map(json.dumps, lines[30:])).encode()))
    made = task(tmp_path / "in", tokenizer=name)
    build(CorpusSource(made, 4000), tmp_path / "data", workers=1)
    found, words = samples(tmp_path / "data"), load_tokenizer(name)
    seen = {}
    for split, members in found.items():
        for sample in members:
            assert len(sample.tokens) == made.sequence_length == 4 * 64 + 16
            context, cue, answer = read(sample, words, 4 * 64)
            assert cue == "Answer:"
            assert context not in seen
            seen[context] = (split, int(answer), int(sample.answers[0, 2]))
    expected = {f"{one['question']} {one['problem'].strip()}": one for one in lines}
    assert seen.keys() == expected.keys()
    for text, (_, answer, depth) in seen.items():
        assert expected[text]["solution"].endswith(f"Answer: {answer}.") and depth == expected[text]["op"]
    assert 3 <= len(found["test"]) <= 20 and len(list((tmp_path / "data").glob("train-*.tar"))) > 2
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert (manifest["task"], manifest["documents"], manifest["skipped"], manifest["changed"]) == (
        "gsm_infinite",
        50,
        [],
        0,
    )
    assert manifest["files"].keys() == {str(tmp_path / "in" / name) for name in ("a.jsonl", "b.jsonl.bz2")}
    assert real == ("tokenizer_sha256" in manifest)
    assert not verify(tmp_path / "data").problems
    assert depth_name_of(manifest) == "operations"


def test_a_problem_belongs_to_one_split_whatever_is_asked_about_it(tmp_path):
    lines = [line(n, question=question) for n in range(40) for question in ("How many?", "How many does it have?")]
    made = task(write(tmp_path / "in" / "a.jsonl", lines), test_share=0.5)
    build(CorpusSource(made, 10**6), tmp_path / "data", workers=1)
    words = load_tokenizer("bytes")
    problems = {
        split: {read(sample, words, 256)[0].split("?", 1)[1] for sample in members}
        for split, members in samples(tmp_path / "data").items()
    }
    assert not problems["train"] & problems["test"] and len(problems["train"] | problems["test"]) == 40
    assert min(map(len, problems.values())) > 5


def test_all_for_the_test(tmp_path, capsys):
    inputs = write(tmp_path / "in" / "a.jsonl", map(line, range(5)))
    folder = tmp_path / "data"
    assert cli.main(
        ["data", "build", "gsm_infinite", str(folder), f"inputs={inputs}", "window=256", "windows=1", "test_share=1",
         "--workers", "1"]
    ) == 0  # fmt: skip
    assert [len(members) for members in samples(folder).values()] == [0, 5]
    said = " ".join(capsys.readouterr().out.split())
    assert "0 samples in 0 shards to train on, 5 samples in 1 shard held out" in said
    assert f"data.test='{folder}/test-*.tar'" in said
    report = inspect_shards(str(folder), ShardCache(tmp_path / "cache"), show=1)
    assert "window 0, slept on:\n    How many" in report and "window 1, answers:\n    Answer:* 3[end]*" in report
    assert "depth 2: _ 3 [end]" in report and "GsmInfinite" not in report
    with pytest.raises(DataError, match="all 5 samples are held out"):
        build(CorpusSource(task(inputs, test_share=0.9999), 10**6), tmp_path / "other", workers=1)


BAD = {
    "no problem": (line(1, problem=None), "has no 'problem': GSM-Infinite's problems have problem, question, solution, op"),
    "no question": (line(1, question=None), "has no 'question'"),
    "no solution": (line(1, solution=None), "has no 'solution'"),
    "no op": (line(1, op=None), "has no 'op'"),
    "a list": (line(1, question=["?"]), "'question' must be text, not [\"?\"]"),
    "empty": (line(1, problem=""), "'problem' must be text, not \"\""),
    "op as text": (line(1, op="2"), "'op' must be a whole number, not \"2\""),
    "op as truth": (line(1, op=True), "'op' must be a whole number, not true"),
    "op below zero": (line(1, op=-1), "'op' must count operations, not be -1"),
    "symbolic": (line(1, solution="ANSWER:\nV1, V2\n"), "'solution' must end with 'Answer: N.', as in the medium"),
    "an earlier answer": (line(1, solution="Answer: 3. Then more."), "'solution' must end with 'Answer: N.'"),
    "a fraction": (line(1, solution="Answer: 3/2."), "'solution' must end with 'Answer: N.'"),
    "too long": (line(1, problem="x" * 300), "takes 343 tokens, more than windows=4 hold: write windows=6"),
    "too large": (line(1, solution="Answer: 1234567890."), "the answer 1234567890 takes 19 tokens, more than answer_length=16: write answer_length=19"),
    "no object": ([1], "is a JSON array"),
    "a number": (3, "is no JSON object: write one object per line"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_used(tmp_path, name):
    bad, message = BAD[name]
    inputs = write(tmp_path / "in" / "a.jsonl", [line(5), bad, *map(line, range(6, 16))])
    with pytest.raises(DataError) as caught:
        build(CorpusSource(task(inputs), 10**6), tmp_path / "data", workers=1)
    place = f"{inputs}: the line at byte {len(json.dumps(line(5))) + 1}"
    assert str(caught.value).startswith(place) and message in str(caught.value) and "\n" not in str(caught.value)
    build(CorpusSource(task(inputs, on_error="skip"), 10**6), tmp_path / "data", workers=1)
    assert sum(map(len, samples(tmp_path / "data").values())) == 11
    (skipped,) = json.loads((tmp_path / "data" / "manifest.json").read_text())["skipped"]
    assert skipped == str(caught.value)
    with pytest.raises(DataError, match="more than skip_budget=0 documents skipped"):
        build(CorpusSource(task(inputs, on_error="skip", skip_budget=0), 10**6), tmp_path / "none", workers=1)


def test_rows_of_parquet_are_lines(tmp_path):
    """As the authors upload them: other columns are not read."""
    rows = [{**line(n), "messages": [{"role": "user", "content": "?"}]} for n in range(40)]
    (tmp_path / "rows").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows" / "a.parquet", row_group_size=15)
    lines = write(tmp_path / "lines" / "a.jsonl", rows)
    found = []
    for number, inputs in enumerate((tmp_path / "rows", lines)):
        build(CorpusSource(task(inputs), 10**6), tmp_path / f"data{number}", workers=1)
        found.append(samples(tmp_path / f"data{number}"))
    assert len(found[0]["train"]) > 20
    for split in ("train", "test"):
        for one, other in zip(*(each[split] for each in found), strict=True):
            assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.answers, other.answers)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([line(1), line(2, op=None)], "row 1: 'op' must be a whole number, not null"),
        ([line(1, op=None)], "row 0 has no 'op': GSM-Infinite's problems have"),
        ([{"text": "x"}], "row 0 has no 'problem'"),
        ([line(1, op=2.0)], "row 0: 'op' must be a whole number, not 2.0"),
        ("\xff", "cannot be read (In column 1: Invalid: Invalid UTF8"),
        (None, "no Parquet file"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path, rows, message):
    path = tmp_path / "a.parquet"
    if rows is None:
        path.write_text("PAR1")
    elif rows == "\xff":
        binary = pyarrow.array([b"\xff"])
        text = pyarrow.StringArray.from_buffers(1, *binary.buffers()[1:])
        row = {name: [value] for name, value in line(1).items()} | {"question": text}
        pyarrow.parquet.write_table(pyarrow.table(row), path)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=re.escape(message)):
        build(CorpusSource(task(path), 10**6), tmp_path / "data", workers=1)


def test_a_tokenizer_that_joins_the_cue_and_the_answer_is_refused(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joining = Tokenizer(models.BPE({token: n for n, token in enumerate([*alphabet, ":\u0120"])}, [(":", "\u0120")]))
    joining.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joining.save(str(tmp_path / "tokenizer.json"))
    made = task(write(tmp_path / "in" / "a.jsonl", [line(1)]), tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="reads 'Answer:' otherwise if ' 4' follows: write another tokenizer"):
        build(CorpusSource(made, 10**6), tmp_path / "data", workers=1)


def test_a_mended_line_continues_the_build(tmp_path):
    lines = [*map(line, range(30)), line(30, op="?")]
    inputs = write(tmp_path / "in" / "a.jsonl", lines)
    size = inputs.stat().st_size // 3
    with pytest.raises(DataError, match="'op' must be"):
        build(CorpusSource(task(inputs), size), tmp_path / "data", workers=1)
    first = (tmp_path / ".data.unfinished" / "train-000000.tar").stat().st_mtime_ns
    write(inputs, [*lines[:-1], line(30)])
    build(CorpusSource(task(inputs), size), tmp_path / "data", workers=1)
    assert (tmp_path / "data" / "train-000000.tar").stat().st_mtime_ns == first
    build(CorpusSource(task(inputs), size), tmp_path / "again", workers=1)
    assert (tmp_path / "again" / "train-000001.tar").read_bytes() == (
        tmp_path / "data" / "train-000001.tar"
    ).read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 8, "answer_length": 9}, "answer_length=9 must not exceed window=8"),
        ({"test_share": 1.5}, "test_share"),
        ({"inputs": []}, "inputs is empty"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(RecipeError, match=message):
        check(GsmInfinite, {"inputs": "x", **fields})


def test_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a.txt: no .jsonl, .parquet or .arrow"):
        build(CorpusSource(task(tmp_path / "a.txt"), 10**6), tmp_path / "data", workers=1)


def test_a_run_answers_a_held_out_prompt(tmp_path, topology, tokenizer):
    """As text or as tokens, read and written with the tokenizer that the manifest names; exported too."""
    made = task(write(tmp_path / "in" / "a.jsonl", map(line, range(20))), tokenizer=str(tokenizer))
    build(CorpusSource(made, 10**6), tmp_path / "data", workers=1)
    sizes = {"window": made.window, "vocab_size": made.vocab_size, "pad_token_id": made.pad_token_id}
    data = {split: f"{tmp_path}/data/{split}-*.tar" for split in ("train", "test")} | {"sequence_length": 272}
    run = RunFolder(tmp_path / "run")
    run.create(check(Recipe, {**runs.RECIPE, "model": {**runs.RECIPE["model"], **sizes}, "data": data}))
    runs.write_drawn(run, topology)
    sample = samples(tmp_path / "data")["test"][0]
    start, stop, _ = sample.answers[0].tolist()
    prompt = sample.tokens[:start].tolist()
    model, exported = load_run(run.path), export(run.newest_checkpoint(), run.recipe(), tmp_path / "exported")
    assert isinstance(model.vocabulary, TextVocabulary) and model.vocabulary.end == made.vocabulary.end
    question = model.vocabulary.encode(line(0)["question"])
    assert question == prompt[: len(question)]
    said = [
        [output.token for output in of.stream(1).generate([prompt], max_tokens=stop - start)]
        for of in (model, load_run(exported))
    ]
    assert said[0] == said[1] and 1 <= len(said[0]) <= stop - start
    floor = Floor.of_test(run.recipe().data)
    floor.add_all(sample.tokens[None], [sample.answers])
    assert floor.shares(floor.counts)["constant"] == {2: 1.0}
