"""Accuracy by depth: counted again by hand; the table, the JSON and the picture a run gets."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from powernap.model.stage import HybridStage
from powernap.train.data.build import build_task
from powernap.train.data.check import check_data
from powernap.train.data.loader import evaluation_batches
from powernap.train.data.sample import DataError
from powernap.train.evaluation.evaluate import evaluate
from powernap.train.evaluation.intervals import Tally
from powernap.train.evaluation.pictures import draw_accuracy
from powernap.train.evaluation.tables import format_accuracy
from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tasks.track import Track
from tests.helpers import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    runs.prepare(folder)
    return folder


def test_an_answer_counts_when_every_token_of_it_is_right(folder, topology, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = load_recipe("tiny.yaml", ["train.micro_batch_size=8"])
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups)
    truth = {}

    def predictions(stage, batch, topology):
        """The truth, but for the last token of the first answer of every other sequence and for every answer where N is 3."""
        guess = batch.tokens.clone()
        passes = max(segment.pass_number for segment in batch.segments)
        guess[::2, 14] = 0
        return (torch.zeros_like(guess) if passes == 3 else guess), losses_of(batch) * passes, ()

    def losses_of(batch):
        """In no fixed proportion to the loss tokens."""
        return batch.tokens * 0.5

    monkeypatch.setattr("powernap.train.evaluation.evaluate.predict", predictions)

    def of_two_tokens(*arguments, **options):
        """The shards' answers with the token before them, which is always right; both bear loss."""
        for batch in evaluation_batches(*arguments, **options):
            loss_mask = batch.loss_mask | batch.loss_mask.roll(-1, 1)
            answers = [answers - np.array([1, 0, 0]) for answers in batch.answers]
            yield replace(batch, loss_mask=loss_mask, answers=answers)

    monkeypatch.setattr("powernap.train.evaluation.evaluate.evaluation_batches", of_two_tokens)
    batches = list(of_two_tokens(recipe.data, batch_size=8, vocab_size=15, rank=0, world_size=1, limit=43))
    by_sequence = {}  # depth -> (asked, right) of each sequence
    for batch in batches:
        for row, answers in enumerate(batch.answers):
            for depth in sorted(set(answers[:, 2].tolist())):
                starts = answers[answers[:, 2] == depth, 0]
                counts = (len(starts), int(sum(start != 13 or row % 2 for start in starts)))
                by_sequence.setdefault(str(depth), []).append(counts)
            for start, stop, depth in answers.tolist():
                right, asked, kinds = truth.setdefault(depth, [0, 0, []])
                truth[depth] = [
                    right + (start != 13 or row % 2), asked + 1, [*kinds, tuple(batch.tokens[row, start:stop].tolist())]
                ]  # fmt: skip
    result = evaluate(stage, recipe, [2, 3], 43, topology)
    assert result.accuracy["2"] == {str(d): pytest.approx(r / n) for d, (r, n, _) in sorted(truth.items())}
    assert set(result.accuracy["3"].values()) == {0.0}
    for depth, counts in by_sequence.items():
        rows = ((1, m, r, m * m, r * r, r * m, r > 0, r < m) for m, r in counts)
        assert result.interval["2"][depth] == Tally(*map(sum, zip(*rows, strict=True))).interval()
        assert result.interval["3"][depth][0] == 0 < result.interval["3"][depth][1]
        assert result.sequences[depth] == len(counts)
    assert result.answers == {str(d): n for d, (_, n, _) in sorted(truth.items())}
    assert sum(result.answers.values()) == 43 * 4
    most = {str(d): max(kinds.count(k) for k in kinds) / len(kinds) for d, (_, _, kinds) in sorted(truth.items())}
    assert result.guesses["constant"] == pytest.approx(most)
    assert all(result.floor[depth] >= share for depth, share in most.items())
    assert not evaluate(stage, recipe, [2], 40, topology, floors=False).floor
    # The last batch has fewer sequences: a mean of the batches' means is another number.
    mean = float(sum(losses_of(b).sum() for b in batches) / sum(batch.loss_mask[:, 1:].sum() for batch in batches))
    means = [float(losses_of(batch).sum() / batch.loss_mask[:, 1:].sum()) for batch in batches]
    assert abs(sum(means) / len(means) / mean - 1) > 1e-4
    assert result.loss == {"2": pytest.approx(2 * mean), "3": pytest.approx(3 * mean)}


@pytest.fixture(scope="module")
def seen(folder):
    """A run of four steps, in one process and in two."""
    overrides = ["train.steps=4", "evaluation.samples=51"]
    one = runs.train_in_turn(folder, 1, {"seen": overrides})
    return [one["seen"], runs.train_in_turn(folder, 2, {"seen2": [*overrides, "parallel.data=2"]})["seen2"]]


def test_two_processes_count_what_one_counts(seen):
    one, two = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in seen)
    keys = [key for key in one if key.startswith("accuracy/")]
    assert keys == ["accuracy/N2/depth_1", "accuracy/N2/depth_2"]
    assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], abs=0.02)


def test_eval_leaves_a_table_json_and_a_picture_and_logs_them(folder, seen):
    from mlflow import MlflowClient

    result = runs.warm_powernap("eval", "seen", "--passes", "1,2,8", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:5]] == ["hops", "N=1", "N=1", "N=2"]
    assert result.stdout.splitlines()[3].startswith("N=1 ±")
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    run = folder / "runs" / "seen"
    saved = json.loads((run / "evaluation.json").read_text())
    assert saved["step"] == 4 and list(saved["accuracy"]) == ["1", "2", "8"]
    for passes, by_depth in saved["interval"].items():
        assert all(low <= saved["accuracy"][passes][depth] <= high for depth, (low, high) in by_depth.items())
    assert set(saved["floor"]) == {"1", "2"} and sum(saved["answers"].values()) == 51 * 4
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert saved["accuracy"]["2"]["1"] == trained["accuracy/N2/depth_1"]  # the checkpoint holds the trained weights
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    logged = client.get_run((run / "mlflow_run_id").read_text().strip())
    assert logged.data.metrics["with_N8_accuracy_depth_2"] == saved["accuracy"]["8"]["2"]
    names = {artifact.path for artifact in client.list_artifacts(logged.info.run_id)}
    assert {"config.yaml", "evaluation.json", "evaluation.png"} <= names


def test_the_one_accuracy_in_mlflow_is_the_last_evaluations(folder, seen):
    from mlflow import MlflowClient

    run = seen[0]
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert runs.warm_powernap("eval", "seen", "--samples", "3", cwd=folder).returncode == 0
    saved = json.loads((run / "evaluation.json").read_text())
    logged = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}").get_run(
        (run / "mlflow_run_id").read_text().strip()
    )
    (one, two), before = saved["accuracy"]["2"].values(), [trained[f"accuracy/N2/depth_{depth}"] for depth in (1, 2)]
    assert logged.data.metrics["accuracy"] == pytest.approx((one + two) / 2) != pytest.approx(sum(before) / 2)
    assert logged.data.metrics["held_out_loss"] == pytest.approx(saved["loss"]["2"])


def test_a_run_without_checkpoint_or_test_shards_is_answered_in_one_line(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    run = folder / "runs" / "none"
    run.mkdir(parents=True)
    for test, word in (("data/test-*.tar", "no checkpoint yet"), ("null", "data.test is null")):
        text = (folder / "tiny.yaml").read_text().replace("data/test-*.tar", test)
        (run / "config.yaml").write_text(text)
        runs.assert_refused(["eval", "none"], capfd, word)


def test_a_folder_that_cannot_be_written_is_said_before_the_checkpoint_is_read(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunFolder, "newest_checkpoint", lambda _: pytest.fail("read too early"))
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text((folder / "tiny.yaml").read_text())
    # Root may write where the permissions say no, and a read-only disk is not to be had everywhere.
    monkeypatch.setattr("tempfile.TemporaryFile", mock.Mock(side_effect=OSError(30, "Read-only file system")))
    runs.assert_refused(["eval", "mine"], capfd, "runs/mine cannot be written (Read-only file system)")


def test_a_wide_table_breaks_into_lines_of_80_columns():
    depths = {str(step): 0.5 for step in range(1, 33)}
    table = format_accuracy({"N=1": depths, "constant guess": depths})
    assert max(len(line) for line in table.splitlines()) <= 80
    assert table.count("N=1") == 3 and table.count("0.50") == 64


@pytest.mark.parametrize("depths", [["32"], ["1", "2", "3", "4"]])
def test_pictures_show_every_line(tmp_path, monkeypatch, depths):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    accuracy = {n: dict.fromkeys(depths, 0.1 * int(n)) for n in ("1", "2", "4")}
    intervals = {n: dict.fromkeys(depths, (0.1 * int(n) - 0.05, 0.1 * int(n) + 0.02)) for n in accuracy}
    draw_accuracy(accuracy, intervals, dict.fromkeys(depths, 0.125), title="", to=tmp_path / "a.png")
    (axes,) = drawn
    heights = [list(line.get_ydata()) for line in axes.lines]
    areas = [area.get_paths() for area in axes.collections]
    if len(depths) == 1:
        assert heights[0] == pytest.approx([0.1, 0.2, 0.4])
        ends = [path.vertices[:, 1].tolist() for path in areas[0]]
        assert ends == [pytest.approx([h - 0.05, h + 0.02]) for h in (0.1, 0.2, 0.4)]
    else:
        assert heights == [pytest.approx([h] * 4) for h in (0.1, 0.2, 0.4, 0.125)]
        assert [(path.vertices[:, 1].min(), path.vertices[:, 1].max()) for (path,) in areas] == [
            pytest.approx((h - 0.05, h + 0.02)) for h in (0.1, 0.2, 0.4)
        ]


def test_lengths_that_were_never_trained_on_are_evaluated_apart(topology, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = dict(train_samples=1, samples_per_shard=50, seed=0, workers=1)
    for windows, samples in ((3, 20), (5, 10), (4, 8)):
        task = Track(asked="each", windows=windows, min_windows=windows)
        build_task("track", task, tmp_path / str(windows), test_samples=samples, **counts)
    shards = [f"{windows}/test-*.tar" for windows in (3, 5, 4)]
    recipe = load_recipe("track", ["data.train=3/train-*.tar", f"data.test=[{','.join(shards)}]",
        "data.sequence_length=12", "train.global_batch_size=4", "evaluation.samples=9"])  # fmt: skip
    check_data(recipe)
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups)
    result = evaluate(stage, recipe, [1, 2], 9, topology)
    assert result.windows == 3 and result.answers == {"1": 9, "2": 9, "3": 9}
    assert list(result.lengths) == ["4", "5"]
    assert [len(of.answers) for of in result.lengths.values()] == [4, 5]
    assert [set(of.answers.values()) for of in result.lengths.values()] == [{8}, {9}]
    for windows, other in result.lengths.items():  # each is what it would be alone
        data = {"test": f"{windows}/test-*.tar", "sequence_length": 4 * int(windows)}
        alone = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
        assert evaluate(stage, alone, [1, 2], 9, topology) == other
        assert result.metrics()[f"accuracy/N2/windows_{windows}/depth_1"] == other.accuracy["2"]["1"]
    build_task(
        "track", Track(asked="each", windows=3, min_windows=3, questions=2), tmp_path / "two", test_samples=5, **counts
    )
    data = recipe.data.model_copy(update={"test": [shards[0], "two/test-*.tar"]})  # as many windows, more tokens
    result = evaluate(stage, recipe.model_copy(update={"data": data}), [1], 9, topology)
    assert result.answers["1"] == 9 and result.lengths["3_of_18_tokens"].answers["1"] == 10
    first = recipe.data.model_copy(update={"test": shards[1:]})
    with pytest.raises(DataError, match="has 20 tokens, data.sequence_length=12"):
        evaluate(stage, recipe.model_copy(update={"data": first}), [1], 9, topology)


def test_other_shards_are_evaluated_without_a_trace(topology, tmp_path):
    for name, windows in (("data", 3), ("longer", 5)):
        task, counts = Track(asked="each", windows=windows, min_windows=windows), dict(train_samples=2, test_samples=8)
        build_task("track", task, tmp_path / name, **counts, samples_per_shard=50, seed=0, workers=1)
    run = RunFolder(tmp_path / "runs" / "mine")
    shards = ["data.train=data/train-*.tar", "data.test=null", "data.sequence_length=12"]
    run.create(load_recipe("track", ["run.name=mine", *shards]))
    runs.write_drawn(run, topology)
    before = sorted(run.path.rglob("*"))
    found = runs.warm_powernap("eval", "mine", "--shards", "longer/test-*.tar", "data/test-*.tar", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "mine, after step 1, on longer/test-*.tar data/test-*.tar" in found.stdout
    assert "40 answers" in found.stdout and "3 windows in place of 5:" in found.stdout and "24 answers" in found.stdout
    assert sorted(run.path.rglob("*")) == before
    runs.assert_one_line(runs.warm_powernap("eval", "mine", cwd=tmp_path), "write --shards SHARDS")
