"""What pyproject.toml cannot say: wheels and source archives carry the commit they were made of, as train/run/commit.json."""

import importlib.util
import json
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
PROVENANCE = ROOT / "train" / "run" / "provenance.py"
# The top-level folders are the packages of `powernap`: model/ is powernap.model, and so on; launch/top is `powernap` itself.
TOP = ("model", "parallel", "train", "launch")
ITSELF = "launch.top"


def write_commit(folder: str | Path) -> None:
    """For train/run/provenance.py, which reads it where there is no git; asked here, so that both mean the same."""
    spec = importlib.util.spec_from_file_location("provenance", PROVENANCE)
    provenance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(provenance)
    Path(folder, "commit.json").write_text(json.dumps(provenance.commit()) + "\n")


class BuildWithCommit(build_py):
    def run(self) -> None:
        if self.editable_mode:  # which has its checkout beside it
            return super().run()
        # An earlier build's, with modules that are gone.
        shutil.rmtree(Path(self.build_lib, "powernap"), ignore_errors=True)
        super().run()
        write_commit(Path(self.build_lib, "powernap", "train", "run"))


class SourceWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir, "train", "run"))


found = find_packages(ROOT, include=[*TOP, *(f"{name}.*" for name in TOP)], exclude=[ITSELF])
setup(
    packages=["powernap", *(f"powernap.{package}" for package in found)],
    package_dir={"powernap": ITSELF.replace(".", "/"), **{f"powernap.{name}": name for name in TOP}},
    cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit},
)
