"""`powernap plan`: fast, without torch, 80 columns, and reads which windows predict from the data."""

import json
import subprocess
import sys

import pytest

from powernap.launch.cli import main
from tests.helpers import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    runs.prepare(folder, train_samples=64)
    return folder


def test_plan_is_fast_and_imports_no_torch(folder):
    code = (
        "import sys; from powernap.launch.cli import main; main(['plan', 'tiny.yaml']); print('torch' in sys.modules)"
    )
    with runs.seconds_of_commands_below(2.0):
        output = subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True)
    assert output.splitlines()[-1] == "False"
    assert max(map(len, output.splitlines())) <= 80 and "\033" not in output


def test_windows_come_from_the_first_sample(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["plan", "tiny.yaml", "sleep.passes=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["windows_slept"], found["windows_read"], found["segments"]) == (1, 1, 4)
    assert found["windows_assumed"] is False

    # windows of four: the context is three of them, the questions with their answers are the rest
    assert main(["plan", "tiny.yaml", "model.window=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows_read"] > 1


def test_without_data_the_last_window_predicts(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for train in ("nowhere/*.tar", "pipe:false", "tiny.yaml"):
        assert main(["plan", "tiny.yaml", "model.window=6", f"data.train={train}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["windows_assumed"] is True
        assert (found["windows_slept"], found["windows_read"]) == (3, 1)


def test_without_data_every_window_predicts_where_the_recipe_says_so(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    text = ["tiny.yaml", "model.window=6", "sleep.every_window=true", "data.train=nowhere/*.tar"]
    assert main(["plan", *text, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["windows_assumed"], found["windows_from"]) == (False, "recipe")
    assert (found["windows_slept"], found["windows_read"], found["segments"]) == (3, 4, 10)
    assert main(["plan", *text]) == 0
    text_plan = capsys.readouterr().out
    assert "in 4 windows of 6: 3 slept on" in text_plan and "as sleep.every_window says" in text_plan
    assert main(["plan", *text, "--suggest", "--devices", "1", "--json"]) == 0
    efficient = json.loads(capsys.readouterr().out)[0]
    assert main(["plan", *text[:2], "data.train=nowhere/*.tar", "--suggest", "--devices", "1", "--json"]) == 0
    assert efficient["bytes"] > json.loads(capsys.readouterr().out)[0]["bytes"]  # more segments are kept


def test_memory_decides(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["plan", "tiny.yaml", "--memory", "80GiB"]) == 0
    assert "fits       yes" in capsys.readouterr().out
    assert main(["plan", "tiny.yaml", "--memory", "0.1MB"]) == 0
    assert "fits       NO" in capsys.readouterr().out


def test_what_is_allowed_and_perhaps_not_meant_is_said(folder, capsys, monkeypatch):
    """Hours, a cheaper choice that fits, data that are read again and again, bf16 without a GPU."""
    monkeypatch.chdir(folder)
    assert (
        main(
            [
                "plan",
                "tiny.yaml",
                "train.precision=bf16",
                "train.recompute=segment",
                "train.steps=40",
                "--memory",
                "80GB",
            ]
        )
        == 0
    )
    plan = capsys.readouterr().out
    assert "time       0 seconds if each GPU reaches 400 TFLOP/s" in plan
    assert "train.recompute=none fits, too" in plan
    assert "tokens from data.train, which holds" in plan and "each is read 10 times" in " ".join(plan.split())
    assert main(["plan", "tiny.yaml", "train.recompute=none", "train.steps=2", "--memory", "80GB"]) == 0
    plan = capsys.readouterr().out
    assert not any(words in plan for words in ("TFLOP/s", "fits, too", "is read"))  # fp32, the cheapest, once
    job = ["submit", "tiny.yaml", "--on", "local", "--dry-run", "data.lanes=1", "train.steps=40"]
    assert main([*job, "train.precision=bf16"]) == 0
    notes = capsys.readouterr().err
    assert "note: bf16 without a GPU: job.device=gpu" in notes and "each is read 10 times" in notes
    assert main([*job, "train.steps=2"]) == 0 and "note" not in capsys.readouterr().err


TENSOR = ["parallel.tensor=2"]


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (TENSOR, 2),
        ([*TENSOR, "parallel.sequence=true"], 2),
        (["parallel.pipeline=2"], 2),
        (["parallel.pipeline=2", "parallel.pipeline_layout=A|G", "parallel.data=2", *TENSOR], 8),
        (["parallel.data=4", "zero.stage=2"], 4),
        (["parallel.data=4", "zero.stage=3", "train.precision=bf16"], 4),
        (["sleep.eviction=sliding", "parallel.pipeline=2", "sleep.passes=[1,2,4]", "train.recompute=false"], 2),
        (["zero.offload=true"], 1),
        (["train.recompute=nested", "train.offload_inputs=true", "parallel.pipeline=2"], 2),
        (["train.recompute=selective", "sleep.eviction=sliding"], 1),
    ],
)
def test_every_layout_is_planned(folder, capsys, monkeypatch, layout, ranks):
    monkeypatch.chdir(folder)
    assert main(["plan", "tiny.yaml", *layout, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == ranks
    for stage in found["stages"]:
        memory = stage["memory"]
        states = memory["weights"] + memory["gradients"] + memory["optimizer"]
        passing = memory["buffers"] + memory["segments"] + memory["activations"]
        assert memory["total"] == states + max(passing, memory["step"]) > 0
    assert main(["plan", "tiny.yaml", *layout]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and f"ranks      {ranks} = " in text


def test_suggestions(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["plan", "tiny.yaml", "--suggest", "--devices", "4", "--memory", "80GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found and all(s["data"] * s["tensor"] * s["pipeline"] == 4 and s["fits"] for s in found)
    assert main(["plan", "tiny.yaml", "--suggest", "--devices", "4"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in text for word in found[0]["overrides"].split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.sequence_length=20"], ["data.sequence_length=20", "24"]),
        (["--devices", "4"], ["--devices", "--suggest"]),
        (["--suggest", "--devices", "7"], ["7 devices"]),
        (["parallel.tensor=4"], ["attention.heads=2", "4 would be"]),
        (["parallel.data=2", "zero.stage=3", "optimizer.name=muon"], ["optimizer.name=muon"]),
        (["parallel.pipeline=3"], ["parallel.pipeline=3", "use at most 2"]),
        (["parallel.pipeline=2", "parallel.pipeline_layout=AG|"], ["write A|G"]),
        (["parallel.pipeline=2", "train.micro_batch_size=16"], ["1, 2, 4, 8 would do"]),
        (["parallel.pipeline=2", "zero.stage=3"], ["use zero.stage=1"]),
        (["parallel.data=3"], ["train.global_batch_size=16", "parallel.data=3"]),
        (["parallel.pipelin=2"], ["did you mean parallel.pipeline?"]),
    ],
)
def test_mistakes_are_answered_in_one_line(folder, capfd, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    assert main(["plan", "tiny.yaml", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("powernap: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize("arguments", [["--memory", "80"], ["--memory", "0GB"], ["--suggest", "--devices", "many"]])
def test_sizes_that_are_none_are_refused(capfd, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "demo", *arguments])
    assert caught.value.code == 2 and "write a " in capfd.readouterr().err
