"""The `powernap` command; each subcommand is a file in commands/.

Slow imports are deferred until their subcommand runs, so that --help answers at once.
"""

import argparse
import difflib
import errno
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NoReturn, cast

from powernap.launch.commands import (
    cancel,
    checkpoint,
    compare,
    completion,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    import_model,
    list_jobs,
    logs,
    plan,
    recipe,
    report,
    status,
    submit,
    sync,
    train,
    ui,
    wait,
)
from powernap.model.errors import PowernapError
from powernap.parallel.liveness import exit_codes
from powernap.parallel.liveness.parent import follow_parent
from powernap.train.home import provide_home

DESCRIPTION = "Train hybrid language models that sleep: fast weights written by recurrent passes over each window."
# In the order of --help.
COMMANDS = (
    train,
    plan,
    recipe,
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
    import_model,
    data,
    compare,
    sync,
    ui,
    doctor,
    demo,
    completion,
)

STDOUT = "standard output"
# Errors of disks and paths, not of the program.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ESTALE}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; return its exit code. A user's mistake is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Megatron-core warns about missing kernels, and both libraries about deprecated calls of their own.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    rank = os.environ.get("RANK", "0")
    prefix = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        options = parse(arguments)
        provide_home()
        code = options.run(options, arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader such as `| head` has exited
        _discard_stdout()
        return exit_codes.FAILED
    except (PowernapError, OSError) as error:
        if not _is_users_mistake(error):
            raise
        if getattr(error, "filename", None) == STDOUT:
            _discard_stdout()
        from powernap.train.run.secrets import mask_secrets

        message = mask_secrets(" ".join(str(error).split()))
        # A terminal may interpret characters that are not printable.
        message = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        prefix = "" if message.startswith(f"rank {rank} ") else prefix
        _print_error(f"{prefix}{message}")
        return getattr(error, "exit_code", exit_codes.WRONG_USE)
    except KeyboardInterrupt:
        if rank == "0":
            print("powernap: interrupted", file=sys.stderr, flush=True)
        return exit_codes.INTERRUPTED


def parse(arguments: list[str]) -> argparse.Namespace:
    """argparse accepts key=value only before the options; here they may be anywhere."""
    _Parser.typed = arguments
    parser = command_parser()
    options, rest = parser.parse_known_args(arguments)
    pairs = getattr(options, "overrides", getattr(options, "fields", None))
    if wrong := [word for word in rest if pairs is None or word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        assert pairs is not None
        pairs += rest
    return options


class _Parser(argparse.ArgumentParser):
    typed: ClassVar[list[str]] = []  # all arguments of the command

    def error(self, message: str) -> NoReturn:
        """With an example of a complete command, if an argument is missing."""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", wrong[2])
            close = difflib.get_close_matches(wrong[1], known, n=1, cutoff=0.6)
            super().error(
                f"no command '{wrong[1]}'"
                + (f": did you mean {close[0]}?" if close else f": choose one of {', '.join(known)}")
            )
        examples = re.search(r"examples?: (.*)$", self.epilog or "")
        if "are required" in message and examples:  # of those with most of the words that are there, the first
            alike = max(examples[1].split("; "), key=lambda example: len({*example.split()} & {*self.typed}))
            message += f", such as {alike}"
        super().error(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse ignores errors of writing; a --help that cannot be written must fail."""
        if file is sys.stdout:
            file.write(message)
            file.flush()
        else:
            super()._print_message(message, file)


class _Stdout(io.TextIOWrapper):
    """Its errors have a filename, as those of files do."""

    def write(self, text: str) -> int:
        with _naming_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _naming_stdout():
            super().flush()


@contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


def command_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="powernap", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="print version and commit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Asks git for the commit, only when it is printed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        from powernap.train.run.provenance import commit

        code = commit()
        reason = f" ({code['reason']})" if "reason" in code else ""
        changes = ", with uncommitted changes" if code["uncommitted_changes"] else ""
        print(f"powernap {version('powernap')}, commit {code['commit']}{reason}{changes}")
        parser.exit()


def _is_users_mistake(error: PowernapError | OSError) -> bool:
    """Our own errors explain themselves in one line, and so do missing files; other OSErrors are bugs and need a traceback."""
    if isinstance(error, PowernapError) or type(error) in (FileNotFoundError, PermissionError):
        return True
    return bool(error.filename) and error.errno in DISK_ERRORS


def _print_error(message: str) -> None:
    with suppress(OSError):  # stderr may be closed
        sys.stderr.write(f"powernap: error: {message}\n")  # one write: lines of several ranks must not mix


def _discard_stdout() -> None:
    """Send unwritten output to /dev/null, or Python complains about it on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> bool:
    """Open closed standard streams as /dev/null: otherwise the next file opened would take their number, and with it prints
    and errors. Returns whether stdout was open."""
    was_open = sys.stdout is not None
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin, sys.stdout, sys.stderr = (
        stream or os.fdopen(number, mode, closefd=False)
        for number, (stream, mode) in enumerate(((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    )
    return was_open


def entry_point() -> None:
    """The process `powernap`.

    A failed rank exits without cleaning up: it must not wait for the others, and the cleanup of libraries whose threads are
    still waiting may abort the process, which would replace its exit code.
    """
    if not _open_closed_streams():
        _print_error("standard output is closed: write >/dev/null to discard it")
        sys.exit(exit_codes.WRONG_USE)
    out = cast(io.TextIOWrapper, sys.stdout)
    modes: dict[str, Any] = {"line_buffering": out.line_buffering, "write_through": out.write_through}
    encoding, errors = out.encoding, out.errors
    sys.stdout = sys.__stdout__ = _Stdout(out.detach(), encoding, errors, **modes)  # type: ignore[misc]  # typed as final

    follow_parent()
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
