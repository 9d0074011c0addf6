"""Jobs in the JSON of squeue and sacct, whose format changed between versions.

22.05: a state is a string, an exit code wait(2)'s number (squeue) or {return_code: 1} (sacct), unset values are null or 0.
23.02: states are {current: ..}. From 23.11: states are lists, numbers {set: true, infinite: false, number: 1}.
"""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JobLine:
    """
    Attributes:
        id: 37, or 37_1 for an element of an array; also 37 for the pending elements of an array.
        state, reason: as SLURM has them, such as PENDING and Resources.
        exit_code: 128 + N if signal N ended it; None if it has not ended, or failed with an unknown code.
        restarts: None if unknown.
    """

    id: str
    state: str
    reason: str
    exit_code: int | None
    nodes: str
    comment: str
    restarts: int | None = None


def parse_jobs(text: str) -> list[JobLine]:
    """The output of `squeue --json` or `sacct --json`. ValueError if it is neither."""
    try:
        return [_job(job) for job in json.loads(text)["jobs"]]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not SLURM's JSON: {error!r}") from None


def _job(job: dict[str, Any]) -> JobLine:
    state = job["state"] if "state" in job else job["job_state"]
    reason = job.get("state_reason", "")
    if isinstance(state, dict):
        state, reason = state["current"], state.get("reason", "")
    if isinstance(state, list):  # flags follow, such as COMPLETING
        state = "COMPLETING" if "COMPLETING" in state else state[0]
    comment = job.get("comment") or ""
    code = None if state == "COMPLETING" else _exit_code(job.get("exit_code"))
    return JobLine(
        id=_id(job),
        state=state,
        reason="" if reason in ("None", None) else reason,
        exit_code=code or (0 if state == "COMPLETED" else None),  # sacct 22.05 reports 0 for failed jobs too
        nodes=job.get("nodes") or "",
        comment=(comment.get("job") or "") if isinstance(comment, dict) else comment,
        restarts=_number(job.get("restart_cnt")),
    )


def _id(job: dict[str, Any]) -> str:
    fields = job.get("array") or {}
    array = _number(job.get("array_job_id", fields.get("job_id")))
    element = _number(job.get("array_task_id", fields.get("task_id")))
    if not array:
        return str(job["job_id"])
    return str(array) if element is None else f"{array}_{element}"


def _number(value: Any) -> int | None:
    if isinstance(value, dict):
        return value.get("number") if value.get("set") and not value.get("infinite") else None
    return value


def _exit_code(value: Any) -> int | None:
    if not isinstance(value, dict):  # wait(2)'s status
        return None if value is None else value >> 8 or (128 + (value & 127) if value & 127 else 0)
    if "return_code" not in value:  # {set: .., number: ..}
        return _exit_code(_number(value))
    signal = value.get("signal") or {}
    number = _number(signal.get("signal_id", signal.get("id")))
    return 128 + number if number else _number(value["return_code"])
