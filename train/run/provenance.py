"""What a run's numbers depend on beside its recipe: machine, versions, commit. Contains no host name and no folder."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository, if this is one
CODE = ("launch", "model", "parallel", "train")
IMAGE_COMMIT = Path(__file__).with_name("commit.json")  # the result of `commit` when this wheel or image was built
NO_COMMIT = "the repository has no commit yet"
# What `powernap submit` and a job's supervisor tell the job's run of themselves.
SUBMITTED_AS, LOCAL_JOB = "POWERNAP_SUBMITTED_AS", "POWERNAP_LOCAL_JOB"
LARGEST = 10 * 2**20  # bytes of a new file
# A patch that git can apply, whatever the user's diff settings.
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
OF_A_HOOK = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}


def origin() -> dict:
    """Date, commit and machine, as in a run's origin.json."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", **commit(), "machine": machine()}


def machine() -> dict:
    import torch  # late: reports read an origin without it

    return {
        "cpu": _cpu_model(),
        "cores": len(_usable_cores()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str]:
    """The versions that a checkpoint's numbers depend on."""
    packages = ("powernap", "torch", "megatron-core", "deepspeed", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": commit()["commit"],
    }


def code_changes(paths: Sequence[str] = CODE) -> bytes:
    """The difference of `paths` from the commit, as a patch for `git apply`: with new files, also those of nested git
    repositories and submodules. Lines before it, which begin with #, name what it leaves out and why."""
    code = commit(paths)
    if IMAGE_COMMIT.is_file():
        installed = (
            b"# Installed from a wheel or an image that was built with uncommitted changes, which are not kept.\n"
        )
        return installed if code["uncommitted_changes"] else b""
    if "reason" in code and code["reason"] != NO_COMMIT:
        return b""
    # Without a commit, compare with the empty tree: everything is new.
    base = "HEAD" if code["commit"] != "unknown" else _line("hash-object", "-t", "tree", "/dev/null")
    notes = [f"Not in this patch: {path}: ignored by git" for path in _ignored(paths)]
    patch = [_git(*DIFF, "--submodule=diff", base, "--", *paths)]
    if patch[0] is None:
        notes.append("Not in this patch: changes of files that the commit has: git diff failed")
    for path in _new_files(paths, notes):
        size = os.lstat(ROOT / path).st_size
        # A diff against /dev/null: git's exit code reports a difference.
        added = None if size > LARGEST else _git(*DIFF, "--no-index", "--", "/dev/null", path, differs=True)
        if added is None:
            why = f"{size / 2**20:.0f} MiB are too much" if size > LARGEST else "git cannot read it"
            notes.append(f"Not in this patch: {path}: {why}")
        patch.append(added)
    words = "".join(f"# {note}\n" for note in notes)
    return words.encode(errors="surrogateescape") + b"".join(part for part in patch if part)


def commit(paths: Sequence[str] = CODE) -> dict:
    """The commit of this code and whether `paths` differ from it; "unknown" and the reason, if this is no checkout and
    its wheel or image does not record one."""
    if IMAGE_COMMIT.is_file():
        return json.loads(IMAGE_COMMIT.read_text())
    # Installed code may lie inside an unrelated checkout.
    if _git("ls-files", "--error-unmatch", "--", "train/run/provenance.py") is None:
        return {"commit": "unknown", "uncommitted_changes": False, "reason": _why_unknown()}
    head = _line("rev-parse", "--verify", "--quiet", "HEAD")
    if not head:
        return {"commit": "unknown", "uncommitted_changes": True, "reason": NO_COMMIT}
    # Overrides the user's status.showUntrackedFiles and diff.ignoreSubmodules.
    status = ("status", "--porcelain", "--untracked-files=normal", "--ignore-submodules=none")
    return {"commit": head, "uncommitted_changes": _git(*status, "--", *paths) != b""}


def _new_files(paths: Sequence[str], notes: list[str], inside: str = "") -> Iterator[str]:
    """Untracked files below ROOT. To the outer repository, a git repository in `paths` is one entry: here its files are
    listed one by one, committed ones too."""
    others = ("ls-files", "-z", "--others", "--exclude-standard")
    for path in _names(*others, "--", *paths, inside=inside) or []:
        if not path.endswith("/"):
            yield inside + path
            continue
        nested = inside + path
        names = _names("ls-files", "-z", "--cached", inside=nested)
        if names is None:
            notes.append(f"Not in this patch: {nested}: a git repository of its own that git cannot read")
            continue
        head = _line("rev-parse", "--verify", "--quiet", "HEAD", inside=nested) or "no commit"
        notes.append(f"In this patch: the files of {nested}, a git repository of its own at {head}")
        notes.extend(f"Not in this patch: {nested}{name}: ignored by git" for name in _ignored((".",), nested))
        for name in names:
            kept = ROOT / nested / name
            if kept.is_dir() and not kept.is_symlink():
                notes.append(f"Not in this patch: {nested}{name}: a submodule of that repository")
            elif os.path.lexists(kept):
                yield nested + name
        yield from _new_files((".",), notes, nested)
    if not inside:
        for line in (_git("ls-files", "-z", "--stage", "--", *paths) or b"").split(b"\0"):
            if line.startswith(b"160000 "):  # a submodule: `git diff --submodule=diff` covers its tracked files
                module = os.fsdecode(line.partition(b"\t")[2]) + "/"
                if (ROOT / module / ".git").exists():
                    yield from _new_files((".",), notes, module)


def _ignored(paths: Sequence[str], inside: str = "") -> list[str]:
    """Files that may be code but are ignored by git: named, but not stored, because they may be secret."""
    endings = [
        f":(glob){path}/**/*{ending}" for path in paths for ending in (".py", ".so", ".yaml", ".yml", ".j2", ".html")
    ]
    return _names("ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--", *endings, inside=inside) or []


def _names(*arguments: str, inside: str = "") -> list[str] | None:
    output = _git(*arguments, inside=inside)
    return None if output is None else [os.fsdecode(name) for name in output.split(b"\0") if name]


def _line(*arguments: str, inside: str = "") -> str:
    return (_git(*arguments, inside=inside) or b"").decode().strip()


def _why_unknown() -> str:
    if shutil.which("git") is None:
        return "git is not installed"
    if not any((folder / ".git").exists() for folder in (ROOT, *ROOT.parents)):
        return "no git repository"
    if _git("rev-parse", "--git-dir") is None:
        return "git cannot read the repository"
    return "the repository around it does not have this code"


def _git(*arguments: str, differs: bool = False, inside: str = "") -> bytes | None:
    """git's output, here or in a repository `inside` this one; None without git or a repository."""
    # In a hook, git's own variables would name another repository.
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
    # The owner of the checkout does not matter: its code already runs. In containers it is often another user.
    command = ["git", "-c", "safe.directory=*", *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT / inside, env=environment | {"GIT_OPTIONAL_LOCKS": "0"}, capture_output=True
        )
    except OSError:
        return None
    return done.stdout if done.returncode == differs else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _usable_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
