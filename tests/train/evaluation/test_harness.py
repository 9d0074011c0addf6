"""Runs in lm-evaluation-harness: a small local task of each kind, against log-probabilities counted here."""

import json
import math
import os
import subprocess

import pytest
import yaml

from powernap.model.decoder import Decoder
from powernap.train.data.build import build
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.text import Text
from powernap.train.recipe_file import check
from tests.helpers import runs, warm

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

QUESTIONS = [
    {"question": "A cat sat on the", "choices": [" mat.", " sun."], "answer": 0},
    {"question": "A dog ran in the long, long, long, long, long grass and on the", "choices": [" mat.", " hill."], "answer": 1},
    {"question": "A", "choices": [" cat sat on the mat.", " zzz"], "answer": 0},
]  # fmt: skip
CHOICE = {
    "task": "local_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
}  # fmt: skip
GENERATE = {
    "task": "local_generate", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "mat",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 9}, "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
ROLLING = {
    "task": "local_text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of three steps on bytes, in windows of 12, and the tasks with their questions."""
    place = tmp_path_factory.mktemp("harness")
    (place / "corpus.txt").write_text("the cat sat on the mat and slept. " * 40)
    text = check(Text, {"inputs": str(place / "corpus.txt"), "window": 12, "windows": 2, "test_share": 0})
    build(CorpusSource(text, 5_000), place / "data", workers=1)
    recipe = {
        **runs.RECIPE,
        "model": {**runs.RECIPE["model"], "vocab_size": 258, "pad_token_id": 257},
        "sleep": {"passes": 2, "every_window": True},
        "data": {"train": "data/train-*.tar", "sequence_length": 25, "lanes": 1},
        "train": {"steps": 3, "global_batch_size": 4, "recompute": "none"},
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    runs.train_in_turn(place, 1, {"one": []})
    (place / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for task in (CHOICE, GENERATE, ROLLING):
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "questions.json")}}}
        (place / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **source, "test_split": "test"}))
    return place


@pytest.fixture
def model(place, topology, monkeypatch):
    from powernap.train.evaluation.harness import PowernapLM

    monkeypatch.chdir(place)
    return PowernapLM(run="one", batch_size=2)


def log_probability(model, context: bytes, continuation: bytes) -> float:
    """Token by token, a text alone; context without a byte: the end token."""
    run = model.model
    decoder, total = Decoder(run.stage, run.passes, 1), 0.0
    logits = decoder.feed([list(context) or [256]])
    for token in continuation:
        total += float(logits[0].double().log_softmax(-1)[token])
        logits = decoder.feed([[token]])
    return total


@pytest.mark.wide
def test_a_local_task_of_each_kind(place, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    names = [task["task"] for task in (CHOICE, GENERATE, ROLLING)]
    manager = TaskManager(include_path=str(place), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)

    for number, asked in enumerate(QUESTIONS):
        (sample,) = [s for s in found["samples"]["local_choice"] if s["doc_id"] == number]
        for choice, (answer,) in zip(asked["choices"], sample["resps"], strict=True):
            expected = log_probability(model, asked["question"].encode(), choice.encode())
            assert float(answer[0]) == pytest.approx(expected, rel=1e-5)
        scores = [float(answer[0]) for (answer,) in sample["resps"]]
        assert sample["acc"] == (scores.index(max(scores)) == asked["answer"])
        (sample,) = [s for s in found["samples"]["local_generate"] if s["doc_id"] == number]
        (outputs,) = sample["resps"]
        alone = model.model.generate([asked["question"]], max_tokens=9, stop=["."])
        assert outputs[0] == "".join(output.text for output in alone)
    texts = [asked["question"].encode() for asked in QUESTIONS]
    total = sum(log_probability(model, b"", text) for text in texts)
    bits = -total / sum(map(len, texts)) / math.log(2)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_the_likeliest_continuation_is_recognised(model):
    """`is_greedy`, in texts of different lengths that sleep at different tokens."""
    run = model.model
    prompts = [list(b"the cat sat on the mat and"), list(b"a")]
    likeliest = [[], []]
    for output in run.generate(prompts, max_tokens=15):
        likeliest[output.row].append(output.token)
    other = [*likeliest[0][:-1], (likeliest[0][-1] + 1) % 256]
    asked = [(("", ""), prompts[0], likeliest[0]), (("", ""), prompts[1], likeliest[1]), (("", ""), prompts[0], other)]
    found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, True, False]
    assert model._loglikelihood_tokens([(("", ""), prompts[1], [])], disable_tqdm=True) == [(0.0, True)]


@pytest.mark.wide  # the same as test_a_local_task_of_each_kind, by the command
def test_the_command(place, tmp_path):
    """The harness's own options, its own table."""
    options = ["--tasks", "local_choice", "--include_path", str(place), "--limit", "2"]
    done = subprocess.run(
        [warm.python(), "-m", "powernap.lm_eval", "run", "--model", "powernap", "--model_args", "run=one", *options],
        cwd=place, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|local_choice|" in done.stdout.replace(" ", "") and "powernap" in done.stdout
