"""metrics.jsonl: one JSON line for every step of a run, the full record that tracking and plots are made from.

Floats keep every digit (JSON holds Python's `repr`, which reads back to the same bits). JSON has no non-finite numbers,
so those are written as the strings "NaN", "Infinity" and "-Infinity" and read back as floats.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from powernap.model.errors import PowernapError

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsError(PowernapError):
    """A metrics.jsonl that cannot be read or continued: one message with the file and its line."""


class MetricsLog:
    """Appends a run's metrics to `path`, each line on disk (in the system's cache) when `write` returns.

    resume_step: None for a new run, whose file must still be empty. A run that resumes after step k passes k (0 if it
    starts over): lines of steps after the checkpoint, and a last line cut short by a crash, are removed first.

    Raises MetricsError if a new run finds metrics in its file, or a resumed one a line that is no record.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        if resume_step is not None and path.exists():
            cut_after(path, resume_step)
        elif path.exists() and path.stat().st_size:
            raise MetricsError(
                f"{path}: holds the metrics of an earlier run: resume that run or choose another run.name"
            )
        self._file = path.open("a", encoding="utf-8")

    def write(
        self, step: int, *, loss: float, grad_norm: float, lr: float, tokens: int, seconds: float, **more: Any
    ) -> dict[str, Any]:
        """Append one line and return it as a dict.

        step: optimizer steps done, from 1. tokens: read in this step, over all ranks. seconds: wall-clock time of this
        step. more: further metrics of the step, any JSON value.
        """
        record = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, "seconds": seconds}
        record |= more
        try:
            self._file.write(json.dumps(to_json(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # which does not name the file
            raise OSError(error.errno, error.strerror, str(self._file.name)) from None
        return record

    def close(self) -> None:
        with suppress(OSError):  # a full disk, already reported by the last write
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, in the order of the file.

    A last line that is no complete record and has no line end is left out: it may still be being written.
    Raises MetricsError, naming file and line, for any other line that is no record, or if the file cannot be read.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line unchanged (with a line end), and its record."""
    try:
        # Undecodable bytes become replacement characters, which no record of ours contains outside of a string.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)  # after the last line end: empty, or a line cut short
        if last and not line:
            return
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            if last:
                return
            raise MetricsError(f'{path}, line {number}: not a JSON object with a whole number "step"')
        yield line + "\n", _from_json(record)


def cut_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, byte for byte. A crash here leaves either the old file or the new one."""
    shorter = path.with_name(path.name + ".tmp")
    with shorter.open("w", encoding="utf-8") as file:
        file.writelines(line for line, record in _lines(path) if record["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)


def to_json(value: Any) -> Any:
    """`value` with its non-finite numbers as strings, which `float` reads back."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value
