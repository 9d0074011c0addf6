"""Pages as a person sees them, in headless Chromium, where it is there."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not there")


def source_of(url: str, profile: Path, width: int = 1280, seconds: int = 0) -> str:
    """The page's HTML after its scripts have run for `seconds` of their own clock."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},900"]
    command += [f"--virtual-time-budget={1000 * seconds}"] if seconds else []
    return subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, check=True, timeout=120).stdout


def words_of(source: str) -> str:
    """What is to be read on a page."""
    return html.unescape(" ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", source, flags=re.DOTALL).split()))
