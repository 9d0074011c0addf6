"""Text from files to a held-out loss: whole documents, their fast weights carried from step to step, in several layouts."""

import itertools
import json
import math
import shutil
from collections import Counter

import pytest
import yaml
from safetensors import safe_open

from powernap.launch.cli import main
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.manifest import read_manifest, write_manifest
from powernap.train.data.build import build
from powernap.train.data.check import check_data
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.sequences import Cutting
from powernap.train.data.text import Text
from powernap.train.evaluation.evaluate import evaluate
from powernap.train.recipe_file import check, load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs
from tests.helpers.cases import asked_for, names
from tests.helpers.streams import sequences_of

SENTENCES = ["the cat sat on the mat. ", "a dog ran to the old house. ", "we sleep when the window is full. "]
WINDOWS = 3  # in a sequence
LAYOUTS = {"pipeline": ["parallel.pipeline=2"], "zero3": ["parallel.data=2", "zero.stage=3"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    documents = ["".join(SENTENCES[(n * k) % 3] for k in range(1, 5 + n % 13)) for n in range(400)]
    lines = [json.dumps({"text": text.replace("cat", f"cat {n}")}) for n, text in enumerate(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    fields = {"window": 32, "windows": WINDOWS, "documents": "whole", "test_share": 0.1}
    text = check(Text, {"inputs": str(folder / "corpus.jsonl"), **fields})
    build(CorpusSource(text, 5_000), folder / "data", workers=1)
    recipe = {
        **runs.RECIPE,
        "model": {**runs.RECIPE["model"], "window": 32, "vocab_size": 258, "pad_token_id": 257},
        "sleep": {"passes": 2, "every_window": True, "carry": True},
        "data": {
            "train": "data/train-*.tar",
            "test": "data/test-*.tar",
            "documents": "whole",
            "sequence_length": 97,
            "lanes": 8,
        },
        "train": {"steps": 12, "global_batch_size": 8, "log_every": 6, "recompute": "none"},
        "checkpoint": {"every": 6},
        "optimizer": {"lr": 1e-2, "warmup_steps": 5},
        "evaluation": {"samples": 17, "passes": [1, 2]},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    return runs.train_in_turn(folder, 1, {"one": []}) | runs.train_in_turn(folder, 2, asked_for(request, LAYOUTS))


@pytest.mark.parametrize("name", names(["one"], LAYOUTS))
def test_the_loss_falls_on_held_out_text_the_same_in_every_layout(trained, name):
    one, records = (read_metrics(trained[run] / "metrics.jsonl") for run in ("one", name))
    assert records[0]["loss"] > 5 and records[-1]["loss"] < 3.5  # a uniform guess has 5.55
    assert records[-1]["held_out_loss/N2"] < 3.6
    assert {"fast_weights/block_1/pass_1/norm", "fast_weights/block_1/pass_2/norm"} <= set(records[0])
    assert "38,516 parameters" in (trained[name] / "logs" / "train.log").read_text()
    for step in range(3):  # what is carried counts from the second on
        assert records[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
    assert records[-1]["held_out_loss/N2"] == pytest.approx(one[-1]["held_out_loss/N2"], rel=0.02)


@pytest.mark.wide  # test_layouts.py has separate documents in a pipeline
def test_separate_documents_train_alike_in_a_pipeline(folder):
    """A rank that does not read gets to know where documents begin."""
    apart = ["sleep.carry=false", "data.documents=separate", "data.lanes=null"]
    apart += ["train.steps=2", "checkpoint.every=2", "optimizer.warmup_steps=0"]
    runs_of_both = runs.train_in_turn(folder, 1, {"apart": apart})
    runs_of_both |= runs.train_in_turn(folder, 2, {"apart-pipeline": [*apart, "parallel.pipeline=2"]})
    one, pipeline = (read_metrics(run / "metrics.jsonl") for run in runs_of_both.values())
    assert [line["samples"] for line in one] == [line["samples"] for line in pipeline]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in pipeline], rel=1e-4)
    assert one[-1]["held_out_loss/N2"] == pytest.approx(pipeline[-1]["held_out_loss/N2"], rel=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["pipeline"])
def test_a_resumed_run_carries_what_the_unbroken_one_carried(folder, trained, name):
    """The lines of both are equal to the last digit; without the carried fast weights they are not."""
    (folder / "again").mkdir()
    again = shutil.copytree(trained[name], folder / "again" / "pipeline")
    shutil.rmtree(again / "checkpoints" / "step_00000012")
    runs.train_in_turn(folder, 2, {"pipeline": [*LAYOUTS["pipeline"], "run.root=again", "--resume"]})
    resumed, unbroken = (read_metrics(run / "metrics.jsonl") for run in (again, trained[name]))
    assert [line["seconds"] for line in resumed[:6]] == [line["seconds"] for line in unbroken[:6]]
    assert resumed[6]["seconds"] != unbroken[6]["seconds"]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in resumed] == [line[key] for line in unbroken]
    with safe_open(again / "checkpoints" / "step_00000006" / "rank-00001.safetensors", "pt") as saved:
        state = saved.get_tensor("fast_weights/1")
    assert state.shape == (8, 2, 16, 16) and state.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.wide  # test_checkpoint.py reads what is carried in other layouts, without whole runs
@pytest.mark.parametrize("name", ["pipeline"])
def test_what_is_carried_goes_on_in_another_layout(folder, trained, name):
    """Written by two pipeline stages, read by one process and by two data-parallel ranks: every row's fast weights."""
    copies, again = {}, {}
    for reader in ("alone", "zero3", "forgotten"):
        copies[reader] = shutil.copytree(trained[name], folder / f"elsewhere-{reader}" / "pipeline")
        shutil.rmtree(copies[reader] / "checkpoints" / "step_00000012")
        again[reader] = ["run.name=pipeline", f"run.root=elsewhere-{reader}", "--resume"]
    forget(copies["forgotten"] / "checkpoints" / "step_00000006")
    runs.train_in_turn(folder, 2, {"zero3": [*LAYOUTS["zero3"], *again.pop("zero3")]})
    runs.train_in_turn(folder, 1, again)
    unbroken = read_metrics(trained[name] / "metrics.jsonl")
    found = {reader: read_metrics(run / "metrics.jsonl") for reader, run in copies.items()}
    for reader in ("alone", "zero3"):
        assert [line["samples"] for line in found[reader]] == [line["samples"] for line in unbroken]
        losses = [line["loss"] for line in found[reader]]
        assert losses[6:9] == pytest.approx([line["loss"] for line in unbroken][6:9], rel=1e-5)
        assert losses[6:] == pytest.approx([line["loss"] for line in unbroken][6:], rel=5e-3)
    assert abs(found["forgotten"][6]["loss"] / unbroken[6]["loss"] - 1) > 1e-4


def forget(checkpoint):
    """Take the fast weights out of a checkpoint, as if nothing had been carried."""
    content = read_manifest(checkpoint)
    content["lanes"] = None
    write_manifest(checkpoint, {key: value for key, value in content.items() if key not in ("format", "sha256")})


@pytest.mark.wide  # test_order.py and test_separate.py follow documents
def test_long_documents_have_the_loss_of_one_long_sequence(folder, trained, topology):
    """Held-out text in sequences of three windows, carried, against all windows in one sequence: in all, and by window."""
    found = {}
    for name, changes in (
        ("carried", []),
        ("whole", [f"data.sequence_length={6 * WINDOWS * 32 + 1}"]),
        ("forgotten", ["sleep.carry=false"]),
        ("separate", ["sleep.carry=false", "data.documents=separate"]),
    ):
        recipe = load_recipe(str(folder / "tiny.yaml"), [*changes, f"data.test={folder}/data/test-*.tar"])
        stage = HybridStage(recipe.model, recipe.sleep, topology.groups).double().to(topology.device)
        RunFolder(trained["one"]).newest_checkpoint().load_weights(stage)
        found[name] = evaluate(stage, recipe, [2], 1000, topology)
    losses = {name: result.loss["2"] for name, result in found.items()}
    assert losses["carried"] == pytest.approx(losses["whole"], rel=1e-9)
    assert abs(losses["forgotten"] / losses["whole"] - 1) > 1e-3
    assert found["separate"] == found["forgotten"]  # held out, each document is read alone

    tokens = Counter()
    last_windows = {"1": 1, "2": 2, "3-4": 4, "5-8": 8, "9-16": 16}
    cutting = Cutting(6 * WINDOWS * 32 + 1, "whole", 257)
    shards = [sequences_of(path, cutting) for path in sorted((folder / "data").glob("test-*.tar"))]
    for sample in itertools.chain.from_iterable(shards):  # a document
        for token in sample.loss_mask.nonzero()[0].tolist():
            window = (token - 1) // 32 + 1  # of the token before, which predicts it
            tokens[next(name for name, last in last_windows.items() if window <= last)] += 1
    carried, whole, forgotten = (found[name].loss_by_window["2"] for name in ("carried", "whole", "forgotten"))
    assert found["carried"].tokens_by_window == found["whole"].tokens_by_window == tokens and len(tokens) == 5
    assert carried == pytest.approx(whole, rel=1e-9)
    assert sum(tokens[name] * loss for name, loss in carried.items()) / tokens.total() == pytest.approx(losses["whole"])
    # Nothing is forgotten within the first sequence, of three windows.
    assert [forgotten[name] == pytest.approx(whole[name], rel=1e-9) for name in tokens] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_several_test_sets_are_reported_apart_and_in_bits_per_byte(folder, trained, topology):
    """Each as it is alone; the first is the run's own."""
    sets = {"some": f"{folder}/data/test-00000[0-2].tar", "others": [f"{folder}/data/test-00000[3-9].tar"]}
    found = {}
    for name, test in {**sets, "both": sets}.items():
        recipe = load_recipe(str(folder / "tiny.yaml"), [f"data.test={json.dumps(test)}"])
        check_data(
            recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": f"{folder}/data/train-*.tar"})})
        )
        stage = HybridStage(recipe.model, recipe.sleep, topology.groups).double().to(topology.device)
        RunFolder(trained["one"]).newest_checkpoint().load_weights(stage)
        found[name] = evaluate(stage, recipe, [2], 1000, topology)
    both = found["both"]
    assert (both.name, list(both.others)) == ("some", ["others"])
    assert both.loss == found["some"].loss and both.others["others"].loss == found["others"].loss
    assert both.loss != found["others"].loss
    names = {name.split("/")[2] for name in both.metrics()}
    assert names == {"some", "others"} and both.metrics()["held_out_loss/N2/some"] == both.loss["2"]
    assert found["some"].metrics()["held_out_loss/N2"] == both.loss["2"]
    lines = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    split = json.loads((folder / "data" / "manifest.json").read_text())["splits"]["test"]
    assert 0 < split["text_bytes"] < sum(len(line.encode()) for line in lines)
    assert split["tokens"] == split["text_bytes"] + split["documents"]  # a byte a token, and the ends
    bits = both.loss["2"] / math.log(2) * split["tokens"] / split["text_bytes"]
    assert both.bits_per_byte["2"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("test", "message"),
    [("{}", "no test set: name at least one"), ("{a/b: x.tar}", "'a/b' becomes part of a metric's name"),
     ("{a: gone-*.tar}", "data.test.a=gone-*.tar: no file matches")],
)  # fmt: skip
def test_test_sets_that_cannot_be_are_answered_in_one_line(folder, test, message, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=none", f"data.test={test}"], capfd, message)


def test_eval_tells_the_loss(folder, trained):
    result = runs.warm_powernap("eval", "one", "--passes", "1,2,3", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "held-out loss after step 12" in result.stdout and "N=3" in result.stdout
    assert "bits per byte: N=1 " in result.stdout
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["window", "1", "2", "3-4", "5-8", "9-16"] in table and ["N=1", "N=2", "N=3"] == [
        row[0] for row in table[5:8]
    ]
    saved = json.loads((trained["one"] / "evaluation.json").read_text())
    assert saved["loss"]["2"] == pytest.approx(read_metrics(trained["one"] / "metrics.jsonl")[-1]["held_out_loss/N2"])
    assert (trained["one"] / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", names([], LAYOUTS))
def test_a_run_of_two_ranks_each_with_a_part_of_the_weights_speaks_in_one_process(
    folder, trained, topology, name, monkeypatch, capfd
):
    monkeypatch.chdir(folder)
    assert main(["generate", name, "--prompt", "a dog ran to the old", "--max-tokens", "80"]) == 0
    said = capfd.readouterr().out
    assert set(said) <= set("".join(SENTENCES) + "0123456789\n") and len(said) == 81


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.lanes=null"], ["each of the 8 sequences of a step continues a lane of its own", "data.lanes=8"]),
        (["data.sequence_length=96"], ["data.sequence_length=96 cuts a document inside a window", "such as 97"]),
        (["sleep.eviction=sliding"], ["carry=true carries fast weights alone", "eviction=hard"]),
        (["data.train={a: {shards: data/train-*.tar}}"], ["data.train is a mixture"]),
        (["data.on_error=skip"], ["would continue behind a hole", "data.on_error=stop"]),
        (["model.pattern=AA", "sleep.passes=1"], ["needs a block with fast weights", "model.pattern=AA"]),
        (["data.sequence_length=3201"], ["no document in", "write a smaller data.sequence_length"]),
        (["data.documents=separate"], ["what a sequence leaves is of several documents: use data.documents=whole"]),
        (
            ["data.documents=separate", "sleep.carry=false", "data.sequence_length=99"],
            ["each begins at a window, so data.sequence_length=99", "such as 129"],
        ),
        (["data.documents=packed"], ["a sequence continues the one before only if", "write data.documents=whole"]),
        (["model.pad_token_id=null"], ["holds documents, which end before a sequence does: write model.pad_token_id"]),
    ],
)
def test_what_cannot_be_carried_is_answered_in_one_line(folder, overrides, words, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=none", *overrides], capfd, *words)
