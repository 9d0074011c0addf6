"""A run's records for MLflow on disk, in its folder: the trainer appends them, the delivering process reads them.

mlflow_spool.jsonl      a JSON object per line, in the order in which MLflow gets them; never truncated, so that another
                        server can be given the whole run
mlflow_spool.position   how far it has been delivered
mlflow_spool.lock       held by the delivering process, such as the trainer
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
    start: int  # its offset in the file, in bytes
    end: int  # the offset of the next one
    record: dict[str, Any]  # its "type" determines the other fields


class Spool:
    """The file of records. One process may append while others append and read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPOOL
        self._file: int | None = None
        self._cut = False  # whether the last line may have no end

    def append(self, record: dict[str, Any]) -> None:
        """Write one line, which survives a crash of this process; some 20 microseconds.

        Raises:
            OSError: such as a full disk. The record is lost; a later one can be written.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._cut = self._ends_inside_a_line()
        # A record cut short by a crash or a full disk becomes a line of its own, which readers pass over.
        line = b"\n" * self._cut + json.dumps(record).encode() + b"\n"
        self._cut = True
        if os.write(self._file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._cut = False

    def read(self, start: int = 0) -> Iterator[Line]:
        """The lines from byte `start` on, without those that are no record or have no end yet."""
        try:
            file = self.path.open("rb")
        except OSError:  # missing, or not readable for us
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
        """The first record of type "start", which has the key of the MLflow run that all records belong to."""
        return next((line.record for line in self.read() if line.record["type"] == "start"), None)

    def experiment(self) -> str:
        """The experiment in the newest record of type "start": a run may be resumed into another one."""
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
    """How far a spool has been delivered, stored beside it.

    Attributes:
        delivered: bytes from the start of the spool.
        aside: starts of earlier lines that still wait, each with the reason, such as an unreachable artifact store.
        refused: starts of earlier lines that MLflow will never accept, each with the reason.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "mlflow_spool.position"
        self.delivered = 0
        self.aside: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        # Missing or damaged, start at 0: a record that is delivered twice does not appear twice.
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(self._path.read_text())
            # After a power failure the spool may have lost lines that had been delivered.
            self.delivered = min(saved["delivered"], (folder / SPOOL).stat().st_size)
            if isinstance(saved["aside"], list):  # as earlier versions wrote it, without reasons
                saved["aside"] = dict.fromkeys(saved["aside"], "MLflow did not take it")
            self.aside = {int(start): reason for start, reason in saved["aside"].items()}
            self.refused = {int(start): reason for start, reason in saved.get("refused", {}).items()}

    def save(self) -> None:
        new = self._path.with_name(self._path.name + ".tmp")
        with suppress(OSError):  # a full disk: the position stays in memory, and the next process repeats some records
            state = {"delivered": self.delivered, "aside": self.aside, "refused": self.refused}
            new.write_text(json.dumps(state) + "\n")
            os.replace(new, self._path)

    def reset(self) -> None:
        """Nothing is delivered yet: MLflow does not have this run."""
        self.delivered, self.aside, self.refused = 0, {}, {}
        self.save()


def delivery_lock(folder: Path) -> ProcessLock:
    """Lets one process at a time deliver a run's spool."""
    return ProcessLock(folder / "mlflow_spool.lock")
