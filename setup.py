"""What pyproject.toml cannot say: wheels and source archives carry the commit they were made of, as train/commit.json."""

import importlib.util
import json
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


def write_commit(folder: str | Path) -> None:
    """For train/origin.py, which reads it where there is no git; asked here, so that both mean the same."""
    spec = importlib.util.spec_from_file_location("origin", Path(__file__).resolve().parent / "train" / "origin.py")
    origin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(origin)
    Path(folder, "commit.json").write_text(json.dumps(origin.commit()) + "\n")


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which has its checkout beside it
            write_commit(Path(self.build_lib, "powernap", "train"))


class SourceWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir, "train"))


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit})
