"""What README and docs tell a newcomer to type, typed as it stands, on little data and for a few steps."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers import runs
from tests.helpers.cases import names

ROOT = Path(__file__).resolve().parents[1]
SHORT = {  # appended to commands that would take minutes
    "powernap train": "train.steps=3 optimizer.warmup_steps=1 evaluation.samples=8 evaluation.every=null train.log_every=1",
    "powernap data build track": "--train-samples 256 --test-samples 16 --samples-per-shard 128",
    "powernap data build parity_task": "--train-samples 256 --test-samples 16 --samples-per-shard 128",
    "powernap generate": "--max-tokens 5",
}
WALKS = {
    "README.md": "## Text, from a folder to an answer",
    "docs/start.md": "## A run of your own",
    "docs/extending.md": "## A task",
}


def typed(page: str, heading: str) -> list[list[str]]:
    section = (ROOT / page).read_text().partition(f"{heading}\n")[2]
    block = re.search(r"^```\n(.*?)^```$", section, re.M | re.S)[1]
    lines = [re.sub(r"\s#\s.*", "", line) for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("powernap ")]


@pytest.mark.parametrize("page", names(["README.md"], WALKS))
def test_it_works_as_it_stands(tmp_path, page):
    (tmp_path / "FOLDER").mkdir()
    pages = sorted((ROOT / "docs").glob("*.md"))[:8]
    for number, source in enumerate(pages):
        (tmp_path / "FOLDER" / f"{number}.txt").write_text(source.read_text())
    shutil.copy(ROOT / "examples" / "parity_task" / "parity_task.py", tmp_path)
    commands = typed(page, WALKS[page])
    assert len(commands) >= 4
    for command in commands:
        if command[1] == "ui":  # serves until it is stopped
            continue
        more = next((words for start, words in SHORT.items() if " ".join(command).startswith(start)), "")
        done = runs.warm_powernap(*command[1:], *more.split(), cwd=tmp_path, COLUMNS="80")
        assert done.returncode == 0, (command, done.stderr)
    assert os.listdir(tmp_path / "runs" / "mine" / "checkpoints") == ["step_00000003"]
