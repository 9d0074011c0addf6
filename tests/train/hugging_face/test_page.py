"""docs/hugging-face.md, typed as written, on a tiny random model with a tokenizer of its own."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from powernap.launch import cli
from powernap.train.recipe_file import load_recipe
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import warm
from tests.helpers.hugging_face import LINEAR, SIZES

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "hugging-face.md").read_text()
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SCRIPT = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.M | re.S))
STORY = "Once upon a time a model read a long story, window by window, and slept on each of them. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the page: a model, a corpus, a task of the harness."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    place = tmp_path_factory.mktemp("page")
    (place / "corpus").mkdir()
    (place / "corpus" / "story.txt").write_text(STORY * 12)
    (place / "corpus" / "other.txt").write_text((STORY + "It dreamt of nothing. ") * 9)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([STORY], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**SIZES | LINEAR | {"vocab_size": 320, "tie_word_embeddings": True})
    config.eos_token_id, config.pad_token_id = fast.eos_token_id, fast.pad_token_id
    transformers.Qwen3_5ForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "Qwen3.5-0.8B")
    fast.save_pretrained(place / "Qwen3.5-0.8B")
    (place / "tasks").mkdir()
    question = {"question": "Once upon a", "choices": [" time", " zebra"], "answer": 0}
    (place / "tasks" / "story.json").write_text(json.dumps(question))
    task = {
        "task": "story", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "tasks/story.json")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (place / "tasks" / "story.yaml").write_text(yaml.safe_dump(task))
    return place


@pytest.fixture(scope="module")
def outputs(place):
    """Command -> what it printed; the script at the end."""
    (place / "bin").mkdir()
    for name, module in (("powernap", ["-m", "powernap.launch.cli"]), ("python", [])):
        path = place / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {warm.python()} {" ".join(module)} "$@"\n')
        path.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "",
        "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    (place / "out.py").write_text(SCRIPT["out.py"])
    found = {}
    for command in [*COMMANDS, "python -m out"]:
        done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        found[command] = done.stdout
    return found


@pytest.mark.wide  # the other files here do each step
def test_every_command_of_the_page(place, outputs):
    assert len(COMMANDS) == 8
    recipe = load_recipe(str(place / "retrofit.yaml"))
    assert recipe.model.pad_token_id == 1  # the tokenizer's
    steps = read_metrics(place / "runs" / "Qwen3.5-0.8B-sleeps" / "metrics.jsonl")
    assert len(steps) == 20 and steps[-1]["loss"] < steps[0]["loss"]
    built = next(out for command, out in outputs.items() if command.startswith("powernap import"))
    assert (
        "powernap data build text data/text inputs=FILES tokenizer=Qwen3.5-0.8B/tokenizer.json window=64 windows=4"
        in built
    )
    assert "|story|" in next(out for c, out in outputs.items() if "lm_eval" in c).replace(" ", "")


@pytest.mark.wide
def test_a_stock_export_without_the_source_has_the_tokenizer(place, outputs, monkeypatch):
    import transformers

    monkeypatch.chdir(place)
    assert cli.main(["checkpoint", "export", "Qwen3.5-0.8B-sleeps", "alone", "--format", "hf"]) == 0
    theirs, own = (transformers.AutoTokenizer.from_pretrained(place / name) for name in ("Qwen3.5-0.8B", "alone"))
    assert own(STORY).input_ids == theirs(STORY).input_ids
    assert (own.eos_token, own.pad_token) == ("<|endoftext|>", "<|pad|>")
    generation = json.loads((place / "alone" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 0, "pad_token_id": 1}
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "alone")
    assert model.config.eos_token_id == 0


@pytest.mark.wide
def test_the_answer_asleep_is_the_same_everywhere(outputs):
    own = next(out for command, out in outputs.items() if command.startswith("powernap generate"))
    awake, asleep = re.fullmatch(r"awake (.*)\nasleep (.*)\n", outputs["python -m out"], re.S).groups()
    assert len(asleep) >= 40 and own.rstrip("\n").endswith(asleep), (own, asleep)
    assert awake  # the stock class loads it and answers; over several windows it is another model


@pytest.mark.wide
def test_both_exports_in_the_harness_of_others(place, outputs, topology, monkeypatch):
    """lm-evaluation-harness's own `hf` model loads them; asleep it has the log probabilities of `--model powernap`, over windows."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from powernap.train.evaluation.harness import PowernapLM

    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [((STORY * 4).rstrip(), " Once upon a time"), ("Once upon a", " zebra")]
    asked = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(texts)]
    options = {"device": "cpu", "dtype": "float32", "batch_size": 1}
    awake = HFLM(pretrained="awake", **options).loglikelihood(asked)
    asleep = HFLM(pretrained="asleep", trust_remote_code=True, **options).loglikelihood(asked)
    own = PowernapLM(run="Qwen3.5-0.8B-sleeps", batch_size=1).loglikelihood(asked)
    assert [score for score, _ in asleep] == pytest.approx([score for score, _ in own], rel=1e-4)

    tokenizer = transformers.AutoTokenizer.from_pretrained("awake")
    model = transformers.AutoModelForCausalLM.from_pretrained("awake", dtype=torch.float32)
    for (context, continuation), (score, _) in zip(texts, awake, strict=True):
        before, tokens = (tokenizer(text, return_tensors="pt").input_ids for text in (context, context + continuation))
        assert torch.equal(before[0], tokens[0, : before.shape[1]]) and before.shape[1] != tokens.shape[1]
        with torch.no_grad():
            log_probabilities = model(tokens).logits[0, before.shape[1] - 1 : -1].log_softmax(-1)
        expected = log_probabilities.gather(1, tokens[0, before.shape[1] :, None]).sum()
        assert score == pytest.approx(float(expected), rel=1e-4)
    assert abs(awake[0][0] - asleep[0][0]) > 1e-3  # over several windows it is another model
    assert awake[1][0] == pytest.approx(asleep[1][0], rel=1e-4)  # within one it is the same
