"""What someone who looks only at MLflow's pages can read there, in a real browser."""

import contextlib
import json
import os
import socket
import subprocess
import urllib.request

import pytest
from mlflow import MlflowClient

from tests.helpers import browser, runs

pytestmark = browser.needs_chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs.prepare(folder, train_samples=64, data={"lanes": 1}, train={"steps": 2, "global_batch_size": 4})
    trained = runs.warm_powernap("train", "tiny.yaml", "run.name=mine", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    exported = runs.powernap("checkpoint", "export", "mine", "out", "--register", "sleeper", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*runs.COMMAND, "ui", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": ""}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)

    def answers():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return True
        assert server.poll() is None, (folder / "server.log").read_text()

    try:
        runs.wait_for(answers)
        yield f"http://127.0.0.1:{port}/#/experiments"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.wide  # a browser beside MLflow's server
def test_the_page_of_a_run_answers_what_its_readers_ask(folder, pages, tmp_path):
    run = folder / "runs" / "mine"
    run_id = (run / "mlflow_run_id").read_text().strip()
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_run(run_id).info.experiment_id
    shown = browser.words_of(browser.source_of(f"{pages}/{experiment}/runs/{run_id}", tmp_path, seconds=20))
    (digest,) = {
        inputs.dataset.digest
        for inputs in client.get_run(run_id).inputs.dataset_inputs
        if any(tag.value == "training" for tag in inputs.tags)
    }
    commit = json.loads((run / "origin.json").read_text())["commit"]
    for words in (
        "Task depo (nodes=6 ",
        "parameters, pattern AG, windows of 12 tokens, N=2",  # what it is
        "2 steps of 4 sequences of 23 tokens: 184 tokens",  # how much it reads
        "powernap train tiny.yaml", "run.name=mine", commit[:7], f"folder : {run}", "host : ",  # where it comes from
        f"data ({digest}) training",
        "Result: loss ", "held out, N=2: loss ", f"{run}/checkpoints",
        "total_tokens", "total_flops", "grad_norm_max", "skipped_steps", "gradient_spikes", "loss", "accuracy", "held_out_loss",
        "Status Finished", "sleeper",  # what became of it
    ):  # fmt: skip
        assert words in shown, words
    assert "powernap_key" not in shown
    charts = browser.words_of(
        browser.source_of(f"{pages}/{experiment}/runs/{run_id}/model-metrics", tmp_path, seconds=20)
    )
    # One section: in it MLflow sorts by name, as test_tracked.py says. Its charts are drawn when they come into view.
    assert "Model metrics (" in charts and charts.count("Add chart") == 1, charts
