"""For the Dockerfile: what pyproject.toml needs with some extras, and the versions to take.

Writes, beside itself, requirements.txt and pinned.txt: constraints.txt, but with the base image's torch where it has one. So
pip never fetches a second torch, and ends with an error if the base's does not fit.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parent


def requirements(extras: list[str]) -> list[str]:
    """Dependencies with those of `extras`; SystemExit names an extra that there is not."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        sys.exit(f"EXTRAS={','.join(extras)}: no extra {unknown[0]!r}: there are {', '.join(optional)}")
    return project["dependencies"] + [line for extra in extras for line in optional[extra]]


def pinned(base_torch: str | None) -> list[str]:
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    return [f"torch=={base_torch}" if base_torch and line.startswith("torch==") else line for line in lines]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    wanted = requirements([extra.strip() for extra in sys.argv[1].split(",") if extra.strip()])
    (FOLDER / "requirements.txt").write_text("\n".join(wanted) + "\n")
    (FOLDER / "pinned.txt").write_text("\n".join(pinned(installed("torch"))) + "\n")
