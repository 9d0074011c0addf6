"""An exported model in MLflow's registry: its files, its version, the run that trained it."""

import os

import pytest
from mlflow import MlflowClient

from powernap.launch import cli
from tests.helpers import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    runs.prepare(folder, train_samples=64, data={"lanes": 1}, train={"steps": 2, "global_batch_size": 4})
    for name, more in {"mine": [], "untracked": ["run.trackers=[]"]}.items():
        done = runs.warm_powernap("train", "tiny.yaml", f"run.name={name}", *more, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


def test_every_export_is_a_version_with_its_run_and_its_files(folder, tmp_path, capsys):
    for number, name in enumerate(("one", "other"), start=1):
        assert cli.main(["checkpoint", "export", "mine", str(tmp_path / name), "--register", "the sleeper"]) == 0
        assert f"MLflow: the sleeper, version {number}" in capsys.readouterr().out
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    run_id = (folder / "runs" / "mine" / "mlflow_run_id").read_text().strip()
    versions = client.search_model_versions("name = 'the sleeper'")
    found = {(str(version.version), version.run_id, version.tags["step"]) for version in versions}
    assert found == {("1", run_id, "2"), ("2", run_id, "2")}
    copied = client.download_artifacts(run_id, "models/step_2-other", str(tmp_path))
    assert sorted(os.listdir(copied)) == sorted(os.listdir(tmp_path / "other"))
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() == open(f"{copied}/{weights}", "rb").read()


def test_what_cannot_be_registered_is_refused_before_anything_is_written(tmp_path, capfd):
    to = str(tmp_path / "out")
    for run, name, words in [
        ("untracked", "m", "was trained without run.trackers=[mlflow]"),
        ("mine", "a/b", "write a name without / and :"),
    ]:
        runs.assert_refused(["checkpoint", "export", run, to, "--register", name], capfd, words)
        assert not os.path.exists(to)
