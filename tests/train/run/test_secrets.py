"""Passwords and tokens of a recipe reach neither MLflow nor a file that others read."""

import pytest
import yaml

from powernap.train.recipe_file import RecipeError, load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.run.secrets import mask_secrets, mask_values
from tests.helpers import runs

SECRET = "hunter2/Zx+9"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"s3://AKIAABCDEFGHIJKLMNOP:{SECRET}@bucket/a.tar", "s3://***@bucket/a.tar"),
        ("https://me:hunter2@host:8080/a-{00..10}.tar", "https://***@host:8080/a-{00..10}.tar"),
        ("https://me:hun@ter2@host/a.tar", "https://***@host/a.tar"),
        ("https://hunter2@host/a.tar", "https://***@host/a.tar"),
        ("postgresql://me:hunter2@host/mlflow", "postgresql://***@host/mlflow"),
        ("https://host/a.tar?part=1&token=hunter2&x=2", "https://host/a.tar?part=1&token=***&x=2"),
        (
            f"https://b/a.tar?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&X-Amz-Date=1",
            "https://b/a.tar?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Date=1",
        ),
        ("https://a.blob/x.tar?sv=1&sig=hunter2%3D&se=2", "https://a.blob/x.tar?sv=1&sig=***&se=2"),
        ("https://h/a?api_key=hunter2#top", "https://h/a?api_key=***#top"),
        ('pipe:curl -H "Authorization: Bearer hunter2" https://h/a', 'pipe:curl -H "Authorization: ***" https://h/a'),
        ("pipe:curl -H 'x-api-key: hunter2' https://h/a", "pipe:curl -H 'x-api-key: ***' https://h/a"),
        ("pipe:curl -s -u me:hunter2 https://h/a", "pipe:curl -s -u *** https://h/a"),
        ("pipe:curl -ume:hunter2 https://h/a", "pipe:curl -u*** https://h/a"),
        ("pipe:wget --password='hunter2 b' h", "pipe:wget --password=*** h"),
        (f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp s3://b/k -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/k -"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
    ],
)  # fmt: skip
def test_credentials_are_masked_and_the_rest_stays(text, masked):
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked
    assert mask_values({"a": [text, 1, None]}) == {"a": [masked, 1, None]}


@pytest.mark.parametrize(
    "text",
    [
        "data/train-*.tar",
        "https://host:8080/path@v2/a.tar?version=3&monk=y",
        "abfs://container@account.dfs.core.windows.net/a.tar",
        "hdfs://user@node:8020/a.tar",
        "s3://bucket/a@b:c/d.tar",
        "pipe:gzip -dc a.tar.gz",
        "model.pad_token_id=0: tokens: 500, key: 3",
        "powernap generate mine --tokens 1,2 --max-tokens 1 -u",
    ],
)
def test_what_is_no_secret_stays(text):
    assert mask_secrets(text) == text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose shards come through commands that hold a password."""
    folder = tmp_path_factory.mktemp("secrets")
    runs.prepare(folder, train_samples=64)
    assert runs.warm_powernap("train", *arguments(folder), cwd=folder).returncode == 0
    return folder


def arguments(folder, secret="hunter2", shard="train-000000"):
    test = next((folder / "data").glob("test-*.tar"))
    train = next((folder / "data").glob(f"{shard}*.tar"))
    return [
        "tiny.yaml", "run.name=kept", "data.lanes=1", "train.steps=2", f"data.cache={folder / 'cache'}",
        f"data.train=pipe:MY_PASSWORD={secret} cat {train}", f"data.test=pipe:MY_PASSWORD={secret} cat {test}",
    ]  # fmt: skip


def test_no_file_of_a_run_holds_its_secret(folder):
    run = folder / "runs" / "kept"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"].startswith("pipe:MY_PASSWORD=*** cat ")
    files = [path for path in folder.rglob("*") if path.is_file() and folder / "cache" not in path.parents]
    names = {path.name for path in files}
    assert {"config.yaml", "mlflow_spool.jsonl", "train.log", "mlflow.db"} <= names
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    spool = (run / "mlflow_spool.jsonl").read_text()
    assert "MY_PASSWORD=***" in spool  # it is about those shards


def test_an_error_names_the_shard_without_its_secret(folder):
    gone = f"data.test=pipe:MY_PASSWORD=hunter2 cat {folder}/gone.tar"
    result = runs.warm_powernap("train", *arguments(folder), "run.name=gone", gone, "data.retries=0", cwd=folder)
    assert result.returncode != 0 and "gone.tar: cannot be read" in result.stderr
    assert "MY_PASSWORD=***" in result.stderr and "hunter2" not in result.stderr


def test_a_run_resumes_with_its_secret_given_again_or_renewed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = RunFolder(folder / "runs" / "kept")
    for secret in ("hunter2", "renewed"):
        recipe, *overrides = arguments(folder, secret)
        run.check_start(load_recipe(recipe, overrides), resume=True)
    other = [f"data.train=pipe:MY_PASSWORD=hunter2 cat {folder}/other.tar"]
    with pytest.raises(RecipeError, match="data.train=pipe:MY_PASSWORD=.*cannot change on --resume") as error:
        run.check_start(load_recipe(recipe, [*overrides, *other]), resume=True)
    assert "hunter2" not in str(error.value)


def test_an_evaluation_asks_for_the_secret(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    runs.assert_refused(["eval", "kept"], capfd, "data.test=pipe:MY_PASSWORD=***", "keeps no secrets", "--test")
    runs.assert_refused(["eval", "kept", "--test", "data/test-*.tar"], capfd, "not the shards of the run")
    test = arguments(folder)[-1].removeprefix("data.test=")
    result = runs.warm_powernap("eval", "kept", "--test", test, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "runs" / "kept" / "evaluation.json").is_file()
    spool = (folder / "runs" / "kept" / "mlflow_spool.jsonl").read_text()
    assert '"with_N2_accuracy_depth_1"' in spool and "hunter2" not in spool
