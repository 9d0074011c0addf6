"""~ and $NAME in paths: expanded wherever a path may stand, or refused with a hint where it is another machine's."""

import os
from pathlib import Path

import pytest
import yaml

from powernap.launch import cli
from powernap.launch.commands import arguments
from powernap.launch.jobs.cluster import find_cluster
from powernap.launch.jobs.description import JobDescription
from powernap.train.data.cache import ShardCache
from powernap.train.data.text import Text
from powernap.train.paths import PathError, expand, expand_shards
from powernap.train.recipe_file import RecipeError, check, load_recipe
from tests.helpers import runs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(runs.RECIPE))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~", "/home/me"), ("~/a", "/home/me/a"), ("~root/a", "/root/a"), ("$SCRATCH/a", "/scratch/me/a"), ("./~/a", "./~/a"),
        ("a/${SCRATCH}b", "a//scratch/meb"), ("a~", "a~"), ("$", "$"), ("a$1", "a$1"), ("a,~", "a,~"),
    ],
)  # fmt: skip
def test_expanded_as_by_a_shell(here, path, expanded):
    assert expand(path) == expanded


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$NOWHERE/a", r"\$NOWHERE is not set here"), ("~nobody-at-all/a", "there is no user nobody-at-all"),
        ("${SCRATCH:-a}", r"only \$NAME and \$\{NAME\} are expanded"),
    ],
)  # fmt: skip
def test_what_cannot_be_expanded_says_so(here, path, words):
    with pytest.raises(PathError, match=words):
        expand(path)


def test_a_path_that_exists_as_written_stays_so(tmp_path):
    """A dollar may be part of a folder's name."""
    there = tmp_path / "costs $HOME1"
    with pytest.raises(PathError, match="HOME1"):
        expand(str(there / "x"))
    there.mkdir()
    assert expand(str(there)) == str(there)


def test_shards(here):
    assert expand_shards("{~/a,$SCRATCH/b}/{0..3}.tar") == "{/home/me/a,/scratch/me/b}/{0..3}.tar"
    for spec in ("http://host/~me/$a.tar", "pipe:cat ~/a.tar $TOKEN", "s3://$b/~"):  # a command has a shell of its own
        assert expand_shards(spec) == spec


def test_fields_of_recipes_and_of_text(here):
    """They are kept expanded: what reads config.yaml later need not have the same variables."""
    fields = ["run.root=~/runs", "data.train={web: {shards: [~/a.tar, $SCRATCH/b.tar]}}", "data.test=$SCRATCH/t.tar"]
    recipe = load_recipe("tiny.yaml", [*fields, "data.cache=$SCRATCH/cache"])
    assert recipe.run.root == "/home/me/runs" and recipe.data.test == "/scratch/me/t.tar"
    assert recipe.data.train["web"].shards == ["/home/me/a.tar", "/scratch/me/b.tar"]
    assert str(recipe.data.cache_folder) == "/scratch/me/cache"
    text = check(Text, {"inputs": ["~/a", "$SCRATCH"], "tokenizer": "~/t.json"})
    assert (text.inputs, text.tokenizer) == (["/home/me/a", "/scratch/me"], "/home/me/t.json")
    (here / "own.yaml").write_text("base: $NOWHERE/tiny.yaml\n")
    with pytest.raises(RecipeError, match=r"own.yaml: base=\$NOWHERE/tiny.yaml: \$NOWHERE is not set"):
        load_recipe("own.yaml")


@pytest.mark.parametrize("field", ["run.root", "data.train", "data.test", "data.cache"])
def test_the_field_is_named(here, field):
    with pytest.raises(RecipeError, match=rf"^{field}=\$NOWHERE/x: \$NOWHERE is not set here"):
        load_recipe("tiny.yaml", [f"{field}=$NOWHERE/x"])


@pytest.mark.parametrize("field", ["run.root", "data.train", "data.test"])
def test_what_pods_would_see_otherwise_is_refused(here, field):
    for path in ("~/x", "$SCRATCH/x"):
        with pytest.raises(RecipeError, match=rf"^{field}=.*: write the path as the pods see it"):
            load_recipe("tiny.yaml", [f"{field}={path}"], files="elsewhere")
    assert load_recipe("tiny.yaml", ["data.train=pipe:curl $URL"], files="elsewhere").data.train == "pipe:curl $URL"


def test_the_machine_that_uses_a_cache_expands_it(here):
    for files in ("shared", "elsewhere"):
        assert load_recipe("tiny.yaml", ["data.cache=$NOWHERE/x"], files=files).data.cache == "$NOWHERE/x"
    with pytest.raises(RecipeError, match="job.environment|environment=~/venv: .* write the whole path"):
        check(JobDescription, {"environment": "~/venv"})


def test_options_of_commands(here, capsys):
    assert str(arguments.path("$SCRATCH/x")) == "/scratch/me/x"
    assert cli.main(["list", "--root=~/none"]) == 0
    assert capsys.readouterr().out == "no jobs below /home/me/none/\n"
    for command in (
        ["list", "--root=$NOWHERE"],
        ["data", "inspect", "$NOWHERE/x.tar"],
        ["eval", "x", "--test", "$NOWHERE/x"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(command)
        assert "$NOWHERE is not set here" in capsys.readouterr().err
    runs_named = ["compare", "$NOWHERE/a", "b"]
    assert cli.main(runs_named) == 2 and "$NOWHERE is not set here" in capsys.readouterr().err


def test_without_a_home(here, monkeypatch):
    """As in a container whose user has no entry in the password file."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert find_cluster("local").kind == "local"
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    for cache in ([], ["data.cache=~/.cache/powernap"]):  # a run's config.yaml names the default
        folder = load_recipe("tiny.yaml", cache).data.cache_folder
        assert folder == ShardCache().folder == Path(f"/tmp/powernap-{os.getuid()}/.cache/powernap")
    with pytest.raises(RecipeError, match="^data.cache=~/mine: .*HOME is not set"):
        load_recipe("tiny.yaml", ["data.cache=~/mine"])
