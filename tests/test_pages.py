"""README and docs/: links lead somewhere, commands can be typed as they stand, the page of fields is what the command prints."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from powernap.launch.cli import command_parser, main
from powernap.train.config import Recipe
from powernap.train.recipe_file import field_names, find_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "launch" / "README.md", ROOT / "docker" / "README.md",
    ROOT / "benchmarks" / "README.md",
]  # fmt: skip
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(powernap [a-z][^`]*)`")
BLOCK = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```$", re.M | re.S)
COMMENT = re.compile(r"\s#\s.*$", re.M)


def anchors(page: Path) -> set[str]:
    """As GitHub and MkDocs make them of headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The words of each powernap command in the page's blocks, without comments, redirections, and what a shell adds around it."""
    found = []
    for _, block in BLOCK.findall(page.read_text()):
        text = COMMENT.sub("", re.sub(r"\\\n\s*", "", block))
        for line in re.split(r"\n|;|&&|\||\s{3,}(?=powernap)", text):
            line = re.sub(r"^\s*(\$ |do |srun )?", "", line)
            if re.match(r"powernap [a-z]", line):
                found.append(shlex.split(re.split(r"\s>>?\s|\)\"", line)[0])[1:])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def inline_commands(page: Path) -> list[list[str]]:
    """Those in the text that have options or fields; the changelog's name what there was."""
    texts = INLINE.findall(BLOCK.sub("", page.read_text())) if page.name != "CHANGELOG.md" else []
    return [shlex.split(text)[1:] for text in texts if re.search(r"\s--(?!help)|=", text.replace("key=value", ""))]


COMMANDS = {" ".join(words): words for page in PAGES for words in [*commands(page), *inline_commands(page)]}


def test_there_are_commands():
    assert len(COMMANDS) > 70


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_typed_as_it_stands(command):
    words = [word for word in COMMANDS[command] if not re.fullmatch(r"key=value|\[\S+=\S+|\.\.\.\]?", word)]
    parser, out = command_parser(), io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            options, rest = parser.parse_known_args(words)
        except SystemExit as error:
            assert error.code == 0, out.getvalue()  # --help
            return
    assert all("=" in word for word in rest), rest
    if not (hasattr(options, "recipe") and hasattr(options, "overrides")):
        return
    if getattr(options, "build", None):  # in place of a recipe
        assert all(word.startswith("job.") for word in [options.recipe or "job.", *options.overrides])
        assert not parser.parse_known_args(["data", "build", *options.build])[1]
        return
    pairs = [*options.overrides, *rest]
    names = set(field_names(Recipe))
    sections = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    for pair in pairs:
        key = pair.partition("=")[0]
        assert key in names | sections or key.startswith("job."), key
    if not options.recipe.endswith(".yaml") and options.recipe.islower():
        find_recipe(options.recipe)


def test_the_page_of_fields_is_what_the_command_prints(capsys):
    assert main(["recipe", "fields", "--markdown"]) == 0
    assert (ROOT / "docs" / "fields.md").read_text().endswith("\n\n" + capsys.readouterr().out)


def test_the_site_builds(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build", reason="make docs installs MkDocs")
    from mkdocs.config import load_config

    build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))  # strict: a warning is an error
    assert "sleep.passes" in (tmp_path / "fields" / "index.html").read_text()
    assert (tmp_path / "benchmarks" / "results" / "study_program" / "index.html").exists()
