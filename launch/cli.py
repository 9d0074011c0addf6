"""The `powernap` command; each subcommand is a file in commands/.

Every import that costs time waits until its subcommand runs: help answers at once.
"""

import argparse
import errno
import os
import sys
import traceback
import warnings

from powernap.launch.commands import (
    cancel,
    checkpoint,
    compare,
    data,
    demo,
    evaluate,
    generate,
    list_jobs,
    logs,
    plan,
    report,
    status,
    submit,
    sync,
    train,
    ui,
    wait,
)
from powernap.model.errors import PowernapError
from powernap.parallel import exit_codes

DESCRIPTION = "Train hybrid language models that sleep: fast weights written by recurrent passes over each window."
# In the order of the help.
COMMANDS = (
    train,
    plan,
    submit,
    status,
    logs,
    wait,
    cancel,
    list_jobs,
    evaluate,
    report,
    generate,
    checkpoint,
    data,
    compare,
    sync,
    ui,
    demo,
)

# What disks and folders do to anybody.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ESTALE}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; return its exit code. A user's mistake is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Megatron-core warns of kernels that it does not find, and both libraries of what they themselves call.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    options = _parse(arguments)
    rank = os.environ.get("RANK", "0")
    who = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        return options.run(options, arguments) or 0
    except BrokenPipeError:  # somebody's `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it leaves
        return exit_codes.FAILED
    except (PowernapError, OSError) as error:
        if not _is_users_mistake(error):
            raise
        from powernap.train.secrets import mask_secrets

        text = mask_secrets(" ".join(str(error).split()))
        # What is not printable, a terminal may obey.
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
        who = "" if text.startswith(f"rank {rank} ") else who
        sys.stderr.write(f"powernap: error: {who}{text}\n")  # one write: several ranks may speak at once
        return getattr(error, "exit_code", exit_codes.WRONG_USE)
    except KeyboardInterrupt:
        if rank == "0":
            print("powernap: interrupted", file=sys.stderr, flush=True)
        return exit_codes.INTERRUPTED


def _parse(arguments: list[str]) -> argparse.Namespace:
    """argparse takes key=value only before the options; here they may stand anywhere."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    given = getattr(options, "overrides", getattr(options, "fields", None))
    if wrong := [word for word in rest if given is None or word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        given += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="powernap", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="print version and commit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Asks git only if it is wanted."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        from powernap.train.origin import commit

        code = commit()
        reason = f" ({code['reason']})" if "reason" in code else ""
        changes = ", with uncommitted changes" if code["uncommitted_changes"] else ""
        print(f"powernap {version('powernap')}, commit {code['commit']}{reason}{changes}")
        parser.exit()


def _is_users_mistake(error: Exception) -> bool:
    """Our own errors say what is wrong in one line, and so do missing files; another OSError is a bug with a traceback."""
    if isinstance(error, PowernapError) or type(error) in (FileNotFoundError, PermissionError):
        return True
    return bool(error.filename) and error.errno in DISK_ERRORS


def entry_point() -> None:
    """The process `powernap`.

    A rank that failed leaves without tidying up: it must not wait for the others, and what its libraries do when their
    threads still wait may abort the process, which would then end with another exit code than the one it has.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = exit_codes.FAILED
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
