"""What pyproject.toml says against the code and against constraints.txt."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import powernap

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text) for text in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
]
PINS = dict(re.findall(r"^([\w.\-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
PINS = {canonicalize_name(name): version for name, version in PINS.items()}


def imported() -> set[str]:
    """Top-level modules that the product imports, at the top of a file or inside a function."""
    found = set()
    for folder in ("model", "parallel", "train", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"powernap"}


def test_every_import_is_a_declared_dependency():
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    packages = {"fla": ["fla-core"], "triton": ["triton"], **packages_distributions()}  # they need CUDA
    undeclared = {
        name for name in imported() if not declared & {canonicalize_name(package) for package in packages[name]}
    }
    assert not undeclared


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_range_holds_the_version_that_is_pinned(requirement):
    """The wheel says ranges; constraints.txt says what was tested."""
    pin = PINS.get(canonicalize_name(requirement.name))
    if pin is None:
        assert requirement.name in ("torch", "triton")  # whose builds differ by index
        return
    assert requirement.specifier.contains(pin, prereleases=True)


def test_the_product_pins_nothing_in_its_metadata():
    extras = ("cuda", "text", "hf", "eval", "kubernetes")
    product = PROJECT["dependencies"] + [text for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    assert not [text for text in product if "==" in text.split(";")[0]]


def test_public_names_are_what_editors_see():
    seen = {}
    for node in ast.walk(ast.parse(Path(powernap.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("powernap."):
            seen |= {alias.name: node.module for alias in node.names}
    assert seen.keys() | {"__version__"} == set(powernap.__all__) == set(dir(powernap))
    for name, module in seen.items():
        public = getattr(powernap, name)
        assert public.__module__ == module and public.__doc__, name
    assert powernap.__version__ == version("powernap")
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(powernap.__all__)
    with pytest.raises(AttributeError, match="'powernap' has no attribute 'load_runs'"):
        powernap.load_runs  # noqa: B018


def test_public_names_load_torch_where_they_need_it():
    ask = "import powernap, sys; powernap.Recipe, powernap.Mixer, powernap.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], cwd="/").returncode == 0
