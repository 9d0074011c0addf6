"""Wheels for a machine without a package index: `python -m benchmarks.wheels FOLDER --have FILE`.

Gathers what Powernap needs with its extra cuda and FILE does not name (the output of `pip list` or `pip freeze` there), at the
versions of constraints.txt, and Powernap itself, for the Python there. What has no wheel is built, which works for packages in pure
Python. There:

    python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
    PYTHONPATH=SITE:CHECKOUT python3 -m benchmarks device
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
STAYS = ("torch", "triton")  # hundreds of megabytes, and of one kind with the driver there


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wheels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder, or one of an earlier call")
    parser.add_argument("--have", type=Path, required=True, metavar="FILE", help="packages there, a line each")
    parser.add_argument("--python", default="3.12", help="version there (default: %(default)s)")
    parser.add_argument(
        "--without", nargs="*", default=["mlflow"], metavar="NAME",
        help="and what it alone needs (default: mlflow, which ranks that do not track never import)",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=64, metavar="MIB", help="together (default: %(default)s)")
    options = parser.parse_args()

    have = {
        canonicalize_name(found[0])
        for line in options.have.read_text().splitlines()
        if (found := re.findall(r"^[\w.-]+", line))
    }
    if missing := [name for name in STAYS if name not in have]:
        sys.exit(f"{options.have}: {', '.join(missing)} is not there and cannot travel")
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    options.folder.mkdir(parents=True, exist_ok=True)
    names = sorted(needed({*have, *map(canonicalize_name, options.without)}))
    for name in names:
        gather(name, versions[name], options.folder, options.python)
    built = ROOT / "build"  # setuptools leaves it beside the sources
    was_there = built.exists()
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", options.folder, ROOT)
    if not was_there:
        shutil.rmtree(built, ignore_errors=True)
    sizes = {path.name: path.stat().st_size / 2**20 for path in options.folder.glob("*.whl")}
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:7.1f} MiB  {path}")
    total = sum(sizes.values())
    print(f"{total:7.1f} MiB  of {options.limit:g}, {len(sizes)} wheels")
    if total > options.limit:
        sys.exit("too large: name with --without what can stay, the largest first")


def needed(without: set[str]) -> Iterator[str]:
    """Powernap's requirements, and theirs, as installed here."""
    seen, waiting = set(without), [("powernap", "cuda")]
    while waiting:
        package, extra = waiting.pop()
        try:
            found = requires(package) or []
        except PackageNotFoundError:  # an extra that is not installed here: what it needs must be there
            continue
        for text in found:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            if name not in seen:
                seen.add(name)
                waiting += [(name, extra) for extra in requirement.extras or {""}]
                yield name


def gather(name: str, version: str, folder: Path, python: str) -> None:
    """A wheel for that Python, or one that is built from source and fits every Python."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    binary = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    if pip("download", "--no-deps", *binary, "--dest", folder, f"{name}=={version}", check=False):
        return
    with tempfile.TemporaryDirectory() as place:
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, f"{name}=={version}")
        (wheel,) = Path(place).glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            sys.exit(
                f"{name}=={version}: has no wheel for Python {python}, and the one built here fits this machine alone"
            )
        (folder / wheel.name).write_bytes(wheel.read_bytes())


def pip(*arguments: object, check: bool = True) -> bool:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and check:
        sys.exit(f"{' '.join(command[1:])}\n{done.stderr[-2000:]}")
    return not done.returncode


if __name__ == "__main__":
    main()
