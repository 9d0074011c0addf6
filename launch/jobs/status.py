"""A job's status, in the same terms on every cluster."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["pending", "running", "stopping", "succeeded", "failed", "cancelled", "lost"]
OVER = ("succeeded", "failed", "cancelled", "lost")


@dataclass(frozen=True)
class Status:
    """
    Attributes:
        state: pending: waits for nodes or for a restart; stopping: was asked to end and is saving; lost: the scheduler
            no longer knows the job.
        reason: why it waits or how it ended, as reported by the scheduler.
        restarts: starts after the first, for any reason.
    """

    state: State
    reason: str = ""
    restarts: int = 0
    exit_code: int | None = None
    nodes: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True)
class Progress:
    """The last line of a run's metrics.jsonl."""

    step: int | None = None
    loss: float | None = None


def read_progress(run_folder: Path) -> Progress:
    """A run's progress; empty if its folder is not visible from here."""
    try:
        with (run_folder / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 2**20))
            lines = file.read().splitlines()
    except OSError:
        return Progress()
    for line in reversed(lines):
        try:
            values = json.loads(line)
            return Progress(int(values["step"]), float(values["loss"]))
        except (ValueError, KeyError, TypeError):  # partly written
            continue
    return Progress()


@dataclass(frozen=True)
class Row:
    """A job in the table of `powernap status` and `powernap list`."""

    run: str
    cluster: str
    id: str | None
    attempt: int
    status: Status
    progress: Progress
    steps: int | None

    def as_dict(self) -> dict[str, Any]:
        names = ("run", "cluster", "id", "attempt", "steps")
        return {name: getattr(self, name) for name in names} | asdict(self.status) | asdict(self.progress)


def as_json(rows: list[Row]) -> str:
    return json.dumps([row.as_dict() for row in rows], indent=2)


def as_table(rows: list[Row]) -> list[str]:
    """Lines of at most 80 columns; a reason that does not fit gets a line of its own."""
    header = ("run", "job", "state", "step", "loss", "restarts")
    cells = [header] + [
        (
            row.run,
            row.id or "-",
            row.status.state,
            f"{_shown(row.progress.step)}/{_shown(row.steps)}",
            _shown(row.progress.loss),
            str(row.status.restarts),
        )
        for row in rows
    ]
    widths = [max(len(texts[column]) for texts in cells) for column in range(len(header))]
    lines = []
    for texts, row in zip(cells, [None, *rows], strict=True):
        line = "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip()
        reason = row.status.reason if row else "reason"
        if row and len(line) + 2 + len(reason) > 80:
            lines += [line, f"    {reason}"]
        else:
            lines.append(f"{line}  {reason}".rstrip())
    return lines


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}" if isinstance(number, float) else str(number)
