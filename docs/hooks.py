"""MkDocs: pages and pictures of other folders join the site, links to source files become plain names.

In the repository each page is read as it is: its links are relative to its own folder.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
JOIN = ("launch/README.md", "docker/README.md", "benchmarks/README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
RESULTS = "benchmarks/results"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    results = sorted((ROOT / RESULTS).glob("*.md")) + sorted((ROOT / RESULTS).glob("*.png"))
    for path in [ROOT / name for name in JOIN] + results:
        name = path.relative_to(ROOT).as_posix()
        name = name if path.suffix else f"{name}.txt"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = (
        PurePosixPath(here).parent if here.startswith(JOIN) or RESULTS in here else PurePosixPath("docs") / here / ".."
    )

    def in_site(match: re.Match) -> str:
        picture, text, target, place = match.groups()
        if "://" in target:
            return match[0]
        path = os.path.normpath(folder / target)
        name = path.removeprefix("docs/")
        name = name if PurePosixPath(name).suffix else f"{name}.txt"
        if files.get_file_from_path(name):
            return f"{picture}[{text}]({os.path.relpath(name, PurePosixPath(here).parent)}{place or ''})"
        if not (ROOT / path).exists():
            raise PluginError(f"{here}: {target} is not there")
        return text if "`" in text else f"`{path}`" if text == target else f"{text} (`{path}`)"

    return "".join(part if code else LINK.sub(in_site, part) for part, code in _parts(markdown))


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """The text, cut where blocks of code begin and end."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return [(part, index % 2 == 1) for index, part in enumerate(parts)]
