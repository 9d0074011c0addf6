"""A run that goes on with prompts: text as it comes, draws, stops, saved streams, the command."""

import json
import random
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import torch

from powernap.launch.cli import main
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch
from powernap.train.data.sample import DataError
from powernap.train.data.tokenizer import HuggingFace, Tiktoken, load_tokenizer
from powernap.train.data.vocabulary import Numbers, TextVocabulary, Words, find_vocabulary
from powernap.train.evaluation.evaluate import evaluate
from powernap.train.generation import generate
from powernap.train.generation.generate import GenerateError, load_run
from powernap.train.recipe_file import check
from powernap.train.run.folder import RunFolder
from powernap.train.tasks import TASKS
from tests.helpers import runs

DEPO = {"task": "depo", "fields": {"nodes": 6, "max_hop": 2, "queries": 4, "names": "ends"}}
BYTES = {"task": "text", "fields": {"inputs": "corpus", "tokenizer": "bytes"}}


def recipe(folder, **sections):
    shards = {"train": f"{folder}/data/train-*.tar", "test": None, "sequence_length": 24}
    changed = {name: {**runs.RECIPE.get(name, {}), **values} for name, values in {"data": shards, **sections}.items()}
    return check(Recipe, {**runs.RECIPE, **changed})


def write_run(folder, topology, manifest, name="run", seed=0, **sections):
    """A run with drawn weights and shards that hold nothing: all that generation reads of one."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train-000000.tar").touch()
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    run = RunFolder(folder / "runs" / name)
    run.create(recipe(folder, run={"name": name, "seed": seed}, **sections))
    runs.write_drawn(run, topology)
    return run.path


@pytest.fixture(scope="module")
def depo(tmp_path_factory, topology):
    return write_run(tmp_path_factory.mktemp("depo"), topology, DEPO, sleep={"passes": [1, 3, 2]})


@pytest.fixture(scope="module")
def text(tmp_path_factory, topology):
    sizes = {"window": 8, "vocab_size": 258, "pad_token_id": 257}
    return write_run(tmp_path_factory.mktemp("text"), topology, BYTES, model={**runs.RECIPE["model"], **sizes})


def said(outputs, rows=1):
    """Text, tokens and reason of each row."""
    found = [["", [], None] for _ in range(rows)]
    for output in outputs:
        row = found[output.row]
        assert row[2] is None
        row[:] = [row[0] + output.text, [*row[1], output.token], output.finish_reason]
    return found


def scripted(monkeypatch, tokens):
    """The model's draws, whatever it computes."""
    script = iter(tokens)
    monkeypatch.setattr(generate, "draw", lambda *_: next(script))


# What is said


def test_greedy_decoding_produces_exactly_the_answers_that_evaluate_counts(depo, monkeypatch, topology):
    """Answers of one to three tokens, half of them written down from what the model says, in the answer window."""
    model = load_run(depo, passes=2)
    source = random.Random(0)
    places = [(14, 15, 1), (16, 18, 2), (18, 19, 1), (21, 24, 2)]
    tokens = torch.tensor([[source.randrange(1, 15) for _ in range(24)] for _ in range(12)])
    tokens[:4, :5] = 0  # pads
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)

    def greedy(row, start, stop):
        return said(model.generate([tokens[row, :start].tolist()], max_tokens=stop - start))[0][1]

    for row in range(len(tokens)):
        for start, stop, _ in places:
            loss_mask[row, start:stop] = True
            if source.random() < 0.5:
                tokens[row, start:stop] = torch.tensor(greedy(row, start, stop))
    right = {1: 0, 2: 0}
    for row in range(len(tokens)):
        for start, stop, depth in places:
            right[depth] += greedy(row, start, stop) == tokens[row, start:stop].tolist()
    batch = Batch(tokens, loss_mask, torch.ones(len(tokens), dtype=torch.bool), [torch.tensor(places)] * len(tokens))
    monkeypatch.setattr("powernap.train.evaluation.evaluate.evaluation_batches", lambda *_, **__: [batch])
    run = RunFolder(depo).recipe()
    run = run.model_copy(update={"data": run.data.model_copy(update={"test": run.data.train})})
    result = evaluate(model.stage, run, [1, 2], len(tokens), topology, floors=False)
    assert {int(d): round(share * 24) for d, share in result.accuracy["2"].items()} == right
    assert all(4 < count < 20 for count in right.values())
    assert {int(d): round(share * 24) for d, share in result.accuracy["1"].items()} != right  # slept on with another N


def test_what_a_row_says_does_not_depend_on_the_others(text):
    model = load_run(text)
    prompts = ["a", "a longer prompt, two windows", "a"]
    options = {"max_tokens": 25, "temperature": 1.5, "top_p": 0.95}
    together = said(model.generate(prompts, seed=7, **options), rows=3)
    alone = [said(model.generate([prompt], seed=7 + row, **options))[0] for row, prompt in enumerate(prompts)]
    assert together == alone
    assert together[0] != together[2]  # the same prompt, another draw
    assert said(model.generate(["a"], seed=8, **options))[0] != together[0]


def test_pieces_come_as_they_are_said_and_the_window_sleeps_when_the_next_token_arrives(text, monkeypatch):
    model = load_run(text)
    stream = model.stream()
    slept = []
    monkeypatch.setattr(
        stream.decoder, "_sleep", lambda rows, sleep=stream.decoder._sleep: (slept.append(rows), sleep(rows))
    )
    outputs = stream.generate(["seven b"], max_tokens=3)
    for asleep in (0, 0, 1):
        next(outputs)
        assert len(slept) == asleep
    assert next(outputs, None) is None
    assert stream.decoder.lengths == [9] and len(stream.unread[0]) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_question_asked_in_between_leaves_no_trace(text, whole):
    model, options = load_run(text), {"max_tokens": 11, "temperature": 0.9}
    asked, silent = model.stream(2, seed=3), model.stream(2, seed=3)
    for stream in (asked, silent):
        said(stream.generate(["a cat", "two dogs sat"], **options), 2)
    answers = asked.ask(["who sat?", "?"], **options)
    question = said(answers, 2) if whole else [next(answers), answers.close()]
    again = said(silent.ask(["who sat?", "?"], **options), 2)
    assert not whole or question == again
    assert asked.decoder.lengths == silent.decoder.lengths
    for _ in range(2):
        assert said(asked.generate(**options), 2) == said(silent.generate(**options), 2)
    with pytest.raises(GenerateError, match="2 streams"):
        asked.ask(["one"])


def test_the_largest_trained_number_of_passes_is_the_default(depo):
    assert load_run(depo).passes == 3 and load_run(depo, 5).passes == 5
    tokens = [[random.Random(1).randrange(1, 15) for _ in range(40)]]
    greedy = {n: load_run(depo, n).stream().decoder.feed(tokens).tolist() for n in (None, 3, 1)}
    assert greedy[None] == greedy[3] != greedy[1]


def test_mistakes_in_python_are_told_before_anything_is_read(depo):
    model = load_run(depo)
    with pytest.raises(GenerateError, match="prompts is one text: write a list of prompts, such as .'1 2'."):
        model.generate("1 2")
    with pytest.raises(GenerateError, match="1 prompts for 2 streams"):
        model.stream(2).generate(["1"])
    with pytest.raises(GenerateError, match="passes=0: write 1 or more"):
        load_run(depo, 0)


# Saved streams


def test_a_stream_goes_on_in_another_process_to_the_last_bit(text, tmp_path):
    """Three streams, 11 tokens in the command's own process and 14 here, against 25 here."""
    options = ["--temperature", "1.2", "--top-p", "0.9", "--seed", "3"]
    prompts = [word for prompt in ("one", "two and more", "x") for word in ("--prompt", prompt)]
    state = str(tmp_path / "state.pt")
    begun = runs.warm_powernap(
        "generate",
        str(text),
        *prompts,
        "--max-tokens",
        "11",
        *options,
        "--json",
        "--save-state",
        state,
        cwd=text.parent.parent,
    )
    assert begun.returncode == 0 and begun.stderr == "", begun.stderr
    before = [json.loads(line) for line in begun.stdout.splitlines()]

    model = load_run(text)
    whole = model.stream(3, seed=3)
    sampling = {"temperature": 1.2, "top_p": 0.9}
    expected = said(whole.generate(["one", "two and more", "x"], max_tokens=25, **sampling), rows=3)
    later = model.load_stream(state)
    after = said(later.generate(max_tokens=14, **sampling), rows=3)
    assert [b["tokens"] + a[1] for b, a in zip(before, after, strict=True)] == [row[1] for row in expected]
    assert later.unread == whole.unread and later.decoder.lengths == whole.decoder.lengths
    assert all(torch.equal(x, later.decoder.state()[name]) for name, x in whole.decoder.state().items())


def test_what_was_read_is_kept_without_a_word_said(text, tmp_path):
    model = load_run(text)
    stream = model.stream()
    assert list(stream.generate(["a prompt of some windows"], max_tokens=0)) == []
    stream.save(tmp_path / "read.pt")
    later = model.load_stream(tmp_path / "read.pt")
    expected = said(model.generate(["a prompt of some windows"], max_tokens=9))
    assert said(later.generate(max_tokens=9)) == expected
    more = said(later.generate([" and more"], max_tokens=9))
    whole = list(b"a prompt of some windows") + expected[0][1] + list(b" and more")
    assert more == said(model.generate([whole], max_tokens=9))


def test_a_state_of_another_model_is_refused(text, topology, tmp_path):
    stream = load_run(text).stream()
    list(stream.generate(["a"], max_tokens=1))
    stream.save(tmp_path / "state.pt")
    sections = {"model": load_run(text).stage.model.model_dump()}
    (tmp_path / "other").mkdir()
    weights = write_run(tmp_path / "other", topology, BYTES, "weights", seed=1, **sections)
    slept = write_run(
        tmp_path / "other", topology, BYTES, "slept", sleep={"passes": 2, "every_window": True}, **sections
    )
    same = write_run(
        tmp_path / "other", topology, BYTES, "same", sleep={"passes": [1, 2], "backprop_passes": 1}, **sections
    )
    load_run(same).load_stream(tmp_path / "state.pt")
    for other in (weights, slept):
        with pytest.raises(GenerateError, match=f"of another model: its run, or checkpoint, is not {other.name}"):
            load_run(other).load_stream(tmp_path / "state.pt")
    with pytest.raises(GenerateError, match="slept 2 passes each, not 1: write --passes 2"):
        load_run(text, 1).load_stream(tmp_path / "state.pt")


# Text as it comes


def joined(vocabulary, tokens, stops=()):
    """All outputs of a row that says `tokens`, and why it ended."""
    row, outputs = generate._Text(vocabulary, [list(vocabulary.units(stop)) for stop in stops]), []
    for place, token in enumerate(tokens):
        output, finish = row.add(token, last=place == len(tokens) - 1)
        outputs.append(output)
        if finish:
            break
    return outputs, finish


BPE = tokenizers.Tokenizer(tokenizers.models.BPE())
BPE.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
BPE.decoder = tokenizers.decoders.ByteLevel()
SAID = "naïve — 3 €, 😀 the end"


@pytest.fixture(params=["bytes", "huggingface", "tiktoken"])
def vocabulary(request, tmp_path, monkeypatch):
    if request.param == "huggingface":
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        BPE.train_from_iterator([SAID], tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet))
        BPE.save(str(tmp_path / "tokenizer.json"))
        return TextVocabulary(HuggingFace(tmp_path / "tokenizer.json"))
    if request.param == "tiktoken":
        ranks = {bytes([n]): n for n in range(256)} | {b"na": 256, b"th": 257}
        encoding = tiktoken.Encoding("tiny", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|end|>": 259})
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
        return TextVocabulary(Tiktoken("tiny"))
    return TextVocabulary(load_tokenizer("bytes"))


def test_characters_are_never_broken(vocabulary):
    tokens = vocabulary.encode(SAID)
    outputs, finish = joined(vocabulary, tokens)
    assert "".join(outputs) == SAID and finish == "length"
    assert "\ufffd" not in "".join(outputs) and "" in outputs  # some tokens are half a character
    assert joined(vocabulary, [*tokens, vocabulary.end, *tokens]) == ([*outputs, ""], "end")


def test_bytes_that_are_no_text_do_not_stop_the_rest(vocabulary):
    bad = vocabulary.encode("€")[:2]
    tokens = [*bad, *vocabulary.encode("ok"), *bad, vocabulary.end + 1, *vocabulary.encode("on")]
    said = "".join(joined(vocabulary, tokens)[0])
    assert said.replace("\ufffd", "") == "ok[pad]on"
    assert "<999>" in "".join(joined(vocabulary, [999, 999])[0])  # a token beyond the vocabulary


def test_a_stop_text_ends_a_row_and_is_held_back(vocabulary):
    tokens = vocabulary.encode(SAID)
    for stop in ("€", "3 €, 😀", "naï", "ve — 3", "d"):
        outputs, finish = joined(vocabulary, tokens, ["nowhere", stop])
        assert "".join(outputs) == SAID[: SAID.index(stop)] and finish == "stop"
    assert joined(vocabulary, tokens, ["the end?"])[1] == "length"
    assert "".join(joined(vocabulary, tokens, ["the end?"])[0]) == SAID  # what was held back comes at the end
    assert "".join(joined(vocabulary, tokens, [", 😀", "3 €, 😀 t"])[0]) == SAID[: SAID.index(",")]
    outputs, _ = joined(vocabulary, vocabulary.encode("aaab"), ["aab"])
    assert "".join(outputs) == "a"


def test_words_stop_at_words():
    words = Words(["[pad]", "1", "12", "[hop 1]", "1.", "[end]"])
    assert words.encode(" 1 12 [hop 1]\n1. ") == [1, 2, 3, 4] and words.end == 5
    assert joined(words, [2, 2, 1, 4], ["1"]) == (["12", " 12", ""], "stop")
    assert joined(words, [2, 3, 1, 3, 4], ["[hop 1] 1."]) == (["12", "", " [hop 1] 1", "", ""], "stop")
    assert joined(words, [2, 9, 5, 1]) == (["12", " <9>", ""], "end")


@pytest.mark.parametrize("name", TASKS)
def test_words_of_a_task_come_back_as_its_tokens(name):
    task = TASKS[name]()
    names = [task.token_name(token) for token in range(task.vocab_size)]
    assert Words(names).encode(" ".join(names)) == list(range(task.vocab_size))


def test_the_vocabulary_is_that_of_the_shards(depo, text, tmp_path, topology):
    assert load_run(depo).vocabulary.encode("1 6. [hop 2]") == [1, 12, 14]
    assert load_run(text).vocabulary.encode("hé") == [104, 195, 169]
    both = {name: {"shards": str(run.parent.parent / "data" / "*.tar")} for name, run in (("a", depo), ("b", text))}
    for train, why in (
        ({**both}, r"data.train mixes vocabularies \(a, b\): write the prompt as --tokens 1,2,3"),
        ("http://far/train-0.tar", "data.train=http://far/train-0.tar: no manifest.json beside the shards"),
        (f"{tmp_path}/gone-*.tar", "no file matches"),
    ):
        found = find_vocabulary(recipe(tmp_path, data={"train": train, "sequence_length": 24}).data)
        assert isinstance(found, Numbers)
        with pytest.raises(DataError, match=why):
            found.encode("1")
    twice = {"a": both["a"], "b": {**both["a"], "weight": 2.0}}
    assert isinstance(find_vocabulary(recipe(tmp_path, data={"train": twice, "sequence_length": 24}).data), Words)


def test_a_run_without_vocabulary_speaks_in_numbers(tmp_path, topology):
    run = write_run(tmp_path, topology, {})
    text, tokens, finish = said(load_run(run).generate([[1, 2, 3]], max_tokens=5))[0]
    assert text == " ".join(map(str, tokens)) and len(tokens) == 5 and finish == "length"
    assert said(load_run(run).generate([[1, 2, 3]], stop=[str(tokens[2])], max_tokens=5))[0][2] == "stop"


# The command, in this process


def command(capfd, *arguments):
    code = main(["generate", *map(str, arguments)])
    return code, *capfd.readouterr()


def test_text_appears_as_it_is_said(text, capfd, monkeypatch):
    scripted(monkeypatch, [*"né".encode(), 256])
    seen = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: seen.append(words[0]))
    assert main(["generate", str(text), "--prompt", "a"]) == 0
    assert seen == ["n", "", "é", "", "powernap: the document ended after 4 of 100 tokens"]


def test_a_seed_says_the_same_again(text, capfd):
    options = ["--prompt", "a", "--temperature", 1, "--max-tokens", 12]
    first, again, default, other = (
        command(capfd, text, *options, *seed) for seed in (["--seed", 0], ["--seed", 0], [], ["--seed", 1])
    )
    assert first == again == default != other and first[0] == 0 and first[1].endswith("\n")


def test_several_prompts_are_labelled(text, capfd, monkeypatch):
    scripted(monkeypatch, [ord("a"), ord("b"), ord("c"), ord("."), ord("d"), 256])
    code, out, _ = command(capfd, text, "--prompt", "x", "--tokens", "1,2,3", "--stop", ".")
    assert (code, out) == (0, "[2] b\n[1] acd\n")


def test_json_has_the_tokens(depo, capfd, tmp_path):
    (tmp_path / "prompt.txt").write_text("1 6. [hop 2]\n")
    code, out, _ = command(capfd, depo, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 4, "--json")
    line = json.loads(out)
    assert code == 0 and len(line["tokens"]) == 4 and line["finish"] == "length" and line["prompt"] == 1
    by_tokens = json.loads(command(capfd, depo, "--tokens", "1,12,14", "--max-tokens", 4, "--json")[1])
    assert by_tokens == line
    assert line["text"] == " ".join(load_run(depo).vocabulary.step(token)[0] for token in line["tokens"])


def test_a_state_goes_on_with_more_text(text, capfd, tmp_path):
    state = tmp_path / "state.pt"
    whole = command(capfd, text, "--prompt", "a prompt, and more", "--max-tokens", 6)
    assert command(capfd, text, "--prompt", "a prompt", "--max-tokens", 0, "--save-state", state) == (0, "", "")
    assert command(capfd, text, "--state", state, "--prompt", ", and more", "--max-tokens", 6) == whole
    saved = torch.load(state, weights_only=True)
    earlier = {name.replace(".conv_state", ".history"): tensor for name, tensor in saved["decoder"].items()}
    assert earlier.keys() != saved["decoder"].keys()
    torch.save(saved | {"decoder": earlier}, state)  # as an earlier version wrote it
    assert command(capfd, text, "--state", state, "--prompt", ", and more", "--max-tokens", 6) == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no prompt: write --prompt TEXT"]),
        (["--prompt", ""], ["empty prompt"]),
        (["--prompt", "1 seven"], ["unknown word 'seven'", "such as"]),
        (["--prompt", "[hop 3]"], ["unknown word '[hop 3]'", "[hop 1]"]),
        (["--tokens", "1,15"], ["token 15", "0 .. 14"]),
        (["--tokens", "1", "--stop", ""], ["stop: an empty text"]),
        (["--prompt-file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--state", "nowhere.pt"], ["nowhere.pt", "no such file"]),
        (["--state", "config.yaml"], ["config.yaml", "not a state"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(depo, capfd, monkeypatch, arguments, words):
    monkeypatch.chdir(depo)
    code, out, error = command(capfd, depo, *arguments)
    assert (code, out) == (2, "") and error.startswith("powernap: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(top_p=0.0), "top_p=0.0.*at most 1"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(max_tokens=-1), "max_tokens=-1"),
    ],
)
def test_options_out_of_bounds_in_python(depo, options, words):
    with pytest.raises(GenerateError, match=words):
        list(load_run(depo).generate([[1]], **options))


def test_a_run_without_a_checkpoint_is_answered_in_one_line(tmp_path, topology, capfd):
    RunFolder(tmp_path / "runs" / "none").create(recipe(tmp_path))
    code, _, error = command(capfd, tmp_path / "runs" / "none", "--tokens", "1")
    assert code == 2 and "no checkpoint yet" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("none/state.pt", "no folder {folder}/none: make it first"),
        ("", "{folder}: is a folder: write a file in it"),
        ("file/state.pt", "no folder {folder}/file: make it first"),
        ("/proc/state.pt", "--save-state /proc/state.pt: /proc cannot be written"),
        ("/dev/null", "--save-state /dev/null: is no file"),
    ],
)
def test_where_a_state_goes_is_checked_before_anything_is_read(text, capfd, tmp_path, monkeypatch, place, words):
    monkeypatch.setattr("powernap.train.generation.generate.load_run", lambda *_: pytest.fail("read too early"))
    (tmp_path / "file").touch()
    missing = tmp_path / "no-prompt.txt"  # not read either
    code, out, err = command(capfd, text, "--prompt-file", missing, "--save-state", tmp_path / place)
    assert (code, out) == (2, "") and words.format(folder=tmp_path) in err and err.count("\n") == 1


def test_a_state_that_cannot_be_written_leaves_the_one_before(text, tmp_path, monkeypatch):
    stream = load_run(text).stream()
    (tmp_path / "state.pt").write_bytes(b"before")

    def full(_, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(GenerateError, match="state.pt: cannot be written .*unexpected pos"):
        stream.save(tmp_path / "state.pt")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
