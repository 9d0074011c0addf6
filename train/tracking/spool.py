"""A run's records for MLflow on disk, in its folder: who trains appends them, who delivers reads them.

mlflow_spool.jsonl      a JSON object a line, in the order in which MLflow gets them; never shortened, so that another
                        server can be given the whole run
mlflow_spool.position   how far it has been delivered
mlflow_spool.lock       held by the process that delivers, such as the trainer
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from powernap.train.run.lock import ProcessLock

SPOOL = "mlflow_spool.jsonl"


class Line(NamedTuple):
    start: int  # its place in the file, in bytes
    end: int  # where the next one begins
    record: dict[str, Any]  # has a "type": what it is, and so what else it has


class Spool:
    """The file of records. One process may append while others append and read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPOOL
        self._file: int | None = None
        self._cut = False  # whether the last line may have no end

    def append(self, record: dict[str, Any]) -> None:
        """Write one line, which a crash of this process does not undo; some 20 microseconds.

        Raises:
            OSError: such as of a full disk. The record is lost; a later one can be written.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._cut = self._ends_inside_a_line()
        # What a crash or a full disk has cut short becomes a line of its own, which readers pass over.
        line = b"\n" * self._cut + json.dumps(record).encode() + b"\n"
        self._cut = True
        if os.write(self._file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._cut = False

    def read(self, start: int = 0) -> Iterator[Line]:
        """The lines from byte `start` on. One that is no record, or has no end yet, is left out."""
        try:
            file = self.path.open("rb")
        except OSError:  # there is none yet, or none for us
            return
        with file:
            file.seek(start)
            for text in file:
                end = start + len(text)
                if not text.endswith(b"\n"):
                    return
                with suppress(ValueError):
                    record = json.loads(text)
                    if isinstance(record, dict) and "type" in record:
                        yield Line(start, end, record)
                start = end

    def begin(self) -> dict[str, Any] | None:
        """The first record of type "start", which says which MLflow run all belong to."""
        return next((line.record for line in self.read() if line.record["type"] == "start"), None)

    def experiment(self) -> str:
        """What the newest record of type "start" says: a run may be resumed into another experiment."""
        return [line.record["experiment"] for line in self.read() if line.record["type"] == "start"][-1]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _ends_inside_a_line(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                return False
            file.seek(size - 1)
            return file.read() != b"\n"


class Position:
    """How far a spool has been delivered, kept beside it.

    Attributes:
        delivered: bytes from the start of the spool.
        aside: starts of lines before that which wait, each with the reason, such as an artifact whose store was away.
        refused: starts of lines before that which MLflow will never take, each with the reason.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "mlflow_spool.position"
        self.delivered = 0
        self.aside: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        with suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # none yet: what is delivered twice does not appear twice
            found = json.loads(self._path.read_text())
            # After a power failure the spool may have lost lines that had been delivered.
            self.delivered = min(found["delivered"], (folder / SPOOL).stat().st_size)
            if isinstance(found["aside"], list):  # as earlier versions wrote it, without reasons
                found["aside"] = dict.fromkeys(found["aside"], "MLflow did not take it")
            self.aside = {int(start): reason for start, reason in found["aside"].items()}
            self.refused = {int(start): reason for start, reason in found.get("refused", {}).items()}

    def save(self) -> None:
        new = self._path.with_name(self._path.name + ".tmp")
        with suppress(OSError):  # a full disk: this process knows, and the next one delivers some records twice
            found = {"delivered": self.delivered, "aside": self.aside, "refused": self.refused}
            new.write_text(json.dumps(found) + "\n")
            os.replace(new, self._path)

    def reset(self) -> None:
        """Nothing is delivered yet: MLflow does not have this run."""
        self.delivered, self.aside, self.refused = 0, {}, {}
        self.save()


def delivery_lock(folder: Path) -> ProcessLock:
    """Lets one process at a time deliver a run's spool."""
    return ProcessLock(folder / "mlflow_spool.lock")
