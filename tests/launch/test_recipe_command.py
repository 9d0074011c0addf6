"""powernap recipe and completion: what a recipe says, where it says it, and what a shell completes."""

import json
import subprocess

import pytest

from powernap.launch import cli
from powernap.train.recipe_file import RecipeError, load_recipe, shipped_recipes


def printed(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_list_says_what_each_recipe_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys, "recipe", "list").splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(shipped_recipes())
    assert "    Baseline: the hybrid without sleep, each window read once." in lines
    assert max(map(len, lines)) <= 80


def test_show_says_where_a_value_comes_from_and_is_a_recipe_again(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: demo/n1\ntrain: {steps: 70}\n")
    overrides = ["sleep={passes: 3}", "optimizer.lr=1e-4"]
    shown = printed(capsys, "recipe", "show", str(mine), *overrides)
    origins = {}
    for line in shown.splitlines():
        value, _, origin = line.partition("  # ")
        origins[value.strip()] = origin
    assert origins["passes: 3"] == origins["lr: 0.0001"] == "command line"
    assert origins["steps: 70"] == str(mine)
    assert origins["name: n1"] == "demo/n1" and origins["pattern: AG"] == "demo" and origins["seed: 0"] == "default"
    assert "mamba2" not in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert load_recipe(str(tmp_path / "again.yaml")) == load_recipe(str(mine), overrides)


def test_secrets_are_not_shown(capsys):
    shown = printed(capsys, "recipe", "show", "demo", "data.train=https://me:hunter2@host/x.tar")
    assert "hunter2" not in shown and "host/x.tar" in shown


def test_fields_in_each_form(capsys):
    assert "sleep.passes: whole number, 1 to 1,024, or list of: " in printed(capsys, "recipe", "fields", "sleep")
    assert "| `sleep.carry` | true or false | `false` |" in printed(capsys, "recipe", "fields", "--markdown")
    assert json.loads(printed(capsys, "recipe", "fields", "--schema"))["title"] == "Powernap recipe"


@pytest.mark.parametrize("task", ["track", "text"])
def test_the_help_of_a_task_has_its_fields(capsys, task):
    with pytest.raises(SystemExit):
        cli.main(["data", "build", task, "--help"])
    fields = capsys.readouterr().out.partition(f"fields of {task}:\n")[2]
    assert {"track": "windows: whole number, 1 or more; default 8", "text": "inputs: "}[task] in fields


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian"], "powernap: error: no command 'trian': did you mean train?"),
        (["data", "bild"], "powernap data: error: no command 'bild': did you mean build?"),
        (["recipe", "show", "dmo"], "powernap: error: no recipe 'dmo': give a YAML file or one of "),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(capsys, words, answer):
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2 and answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("powernap chec", ["checkpoint"]),
        ("powernap train demo/ful", ["demo/full_attention"]),
        ("powernap train demo --auto", ["--auto-resume"]),
        ("powernap data ver", ["verify"]),
    ],
)
def test_bash_completes(capsys, tmp_path, typed, found):
    (tmp_path / "completion").write_text(printed(capsys, "completion", "bash"))
    words = typed.split()
    script = (
        f'. ./completion; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_powernap; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == found, done.stderr


def test_zsh_gets_a_function(capsys):
    assert printed(capsys, "completion", "zsh").startswith("#compdef powernap")


def test_a_mixture_of_paths_and_one_without_quotes():
    mixed = load_recipe("track", ["data.train={a: a.tar, b: {shards: [b.tar], weight: 3}}"])
    assert mixed.data.datasets == {"a": ("a.tar", 1.0), "b": (["b.tar"], 3.0)}
    with pytest.raises(RecipeError, match="put it in quotes, data.train='...'"):
        load_recipe("track", ["data.train={a:", "a.tar}"])
