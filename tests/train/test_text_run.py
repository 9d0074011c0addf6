"""Text from files to a held-out loss: built, trained in two layouts, evaluated; and a run goes on with a prompt."""

import json

import pytest
import yaml

import runs
from powernap.launch.cli import main
from powernap.train.config import check
from powernap.train.data.shards import TextSource, build
from powernap.train.data.text import Text
from powernap.train.metrics import read_metrics

SENTENCES = ["the cat sat on the mat. ", "a dog ran to the old house. ", "we sleep when the window is full. "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": "".join(SENTENCES[(n * k) % 3] for k in range(1, 9))}) for n in range(400)]
    lines = [line.replace("cat", f"cat {n}") for n, line in enumerate(lines)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    text = check(Text, {"inputs": str(folder / "corpus.jsonl"), "window": 32, "windows": 3, "test_share": 0.1})
    build(TextSource(text, 20_000), folder / "data", workers=1)
    recipe = {
        **runs.RECIPE,
        "model": {**runs.RECIPE["model"], "window": 32, "vocab_size": 258, "pad_token_id": 257},
        "sleep": {"passes": 2, "every_window": True},
        "data": {"train": "data/train-*.tar", "test": "data/test-*.tar", "sequence_length": 97},
        "train": {"steps": 20, "global_batch_size": 16, "log_every": 10, "checkpoint_every": 20},
        "optimizer": {"lr": 1e-2, "warmup_steps": 5},
        "evaluation": {"samples": 17, "passes": [1, 2]},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_loss_falls_on_held_out_text_the_same_in_a_pipeline(folder, here, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    one = runs.train_in_turn(folder, 1, {"one": []})["one"]
    two = runs.train_in_turn(folder, 2, {"two": ["parallel.pipeline=2"], "zero3": ["parallel.data=2", "zero.stage=3"]})
    for run in (one, *two.values()):
        records = read_metrics(run / "metrics.jsonl")
        assert records[0]["loss"] > 5 and records[-1]["loss"] < 3.5  # a uniform guess has 5.55
        assert records[-1]["held_out_loss/N2"] < 3.6
        assert {"fast_weights/block_1/pass_1/norm", "fast_weights/block_1/pass_2/norm"} <= set(records[0])
        assert "38,516 parameters" in (run / "logs" / "train.log").read_text()
        assert records[0]["loss"] == pytest.approx(read_metrics(one / "metrics.jsonl")[0]["loss"], rel=1e-5)
        assert records[-1]["held_out_loss/N2"] == pytest.approx(
            read_metrics(one / "metrics.jsonl")[-1]["held_out_loss/N2"], rel=0.02
        )
    result = runs.powernap("eval", "one", "--passes", "1,2,3", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "held-out loss after step 20" in result.stdout and "N=3" in result.stdout
    saved = json.loads((one / "evaluation.json").read_text())
    assert saved["loss"]["2"] == pytest.approx(read_metrics(one / "metrics.jsonl")[-1]["held_out_loss/N2"])
    assert (one / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    # A run that two ranks trained, each with a part of the weights, speaks in one process.
    for name in two:
        assert main(["generate", name, "--prompt", "a dog ran to the old", "--max-tokens", "80"]) == 0
        said = capfd.readouterr().out
        assert set(said) <= set("".join(SENTENCES) + "0123456789\n") and len(said) == 81
