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
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    results = ROOT / "benchmarks" / "results"
    for path in [*(ROOT / name for name in JOIN), *sorted(results.glob("*.md")), *sorted(results.glob("*.png"))]:
        files.append(File.generated(config, _in_site(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(str(page.file.abs_src_path))

    def in_site(match: re.Match) -> str:
        picture, text, target, place = match.groups()
        if "://" in target:
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if files.get_file_from_path(name := _in_site(path)):
            return f"{picture}[{text}]({os.path.relpath(name, PurePosixPath(page.file.src_uri).parent)}{place or ''})"
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} is not there")
        inside = path.relative_to(ROOT)
        return text if "`" in text else f"`{inside}`" if text == target else f"{text} (`{inside}`)"

    return "".join(part if code else LINK.sub(in_site, part) for part, code in _parts(markdown))


def _in_site(path: Path) -> str:
    """A file's place in the site: that of docs/ is the root. Without an ending MkDocs would take it for a page."""
    name = path.relative_to(ROOT).as_posix().removeprefix("docs/")
    return name if path.suffix else f"{name}.txt"


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """The text, cut where blocks of code begin and end."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return [(part, index % 2 == 1) for index, part in enumerate(parts)]
