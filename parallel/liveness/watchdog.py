"""Hangs that explain themselves.

Every rank records what it is doing. A thread checks whether that has changed; if it has not for the time-out, the rank
publishes its state, reads the others', reports in one line who waits for what, and exits. The state is what the rank does
and, from collectives.py, what it has enqueued for others: the time-outs of gloo and NCCL come later and know nothing of steps
and segments.
"""

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from powernap.parallel.grid import Grid, first_three
from powernap.parallel.liveness import collectives, exit_codes, parent
from powernap.parallel.liveness.collectives import Enqueued

LINGER = 2.0  # seconds: the first exit kills the peers; let them report before that
JOINING = 60.0  # seconds at least for ranks to join: one that still imports libraries from a busy disk is not lost
ASK_AT_MOST = 512  # ranks; more would flood the store
ASK_OF_GROUP = 64  # of more ranks, those of the group that is waited for
NOTES = 8192  # on NCCL the host is at most a step ahead of what the device does

STDERR = 2
UNRECORDED = "for which collective is not known: torch's flight recorder is empty, as with TORCH_FR_BUFFER_SIZE=0"

# A main thread inside one of these waits for other ranks.
_WAITING_IN = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/",
    "megatron/core/tensor_parallel/",
    "deepspeed/comm/",
)


class Progress:
    """What this rank is doing. Cheap enough to record at every segment."""

    def __init__(self):
        self.step: int | None = None
        self.joined = False  # whether all ranks have met
        self._noted: deque[tuple[int, str]] = deque(maxlen=NOTES)  # (nanoseconds since the epoch, text)
        self.note("starting")

    def note(self, brief: str, doing: Callable[..., str] | None = None, *details: object) -> None:
        """`doing` returns a longer text for `details` on demand."""
        self._brief, self._doing, self._details = brief, doing, details
        self._noted.append((time.time_ns(), self._in_step(brief)))
        self.changed = time.monotonic()

    def describe(self, brief: bool = False) -> str:
        return self._in_step(self._brief if brief or self._doing is None else self._doing(*self._details))

    def noted_at(self, nanoseconds: int) -> str | None:
        """What was noted last at a time since the epoch; None if that is forgotten."""
        return next((text for when, text in reversed(self._noted.copy()) if when <= nanoseconds), None)

    def _in_step(self, doing: str) -> str:
        return doing if self.step is None else f"step {self.step}, {doing}"


class Watchdog(threading.Thread):
    """Reports why and ends this process when `progress` has not changed for `timeout_seconds`."""

    def __init__(self, progress: Progress, grid: Grid, rank: int, timeout_seconds: float):
        super().__init__(name="powernap-watchdog", daemon=True)
        self._progress, self._grid = progress, grid
        self._rank, self._world_size = rank, math.prod(grid)
        self._patience = min(5.0, timeout_seconds / 5)  # for the others to publish their state
        self._timeout_seconds = timeout_seconds
        self._main_thread = threading.main_thread().ident
        self._stop_requested = threading.Event()
        self.noticed = False  # about to report and exit: an error in the main thread now is a consequence

    def stop(self) -> None:
        self._stop_requested.set()
        self.join()

    def run(self) -> None:
        while not self._stop_requested.wait(min(1.0, self._patience / 4)):
            since = self._progress.changed
            if parent.gone.is_set() and not self._progress.joined:
                os._exit(exit_codes.PREEMPTED)  # parent.py has reported why; there is nothing to save yet
            if time.monotonic() - since > self._timeout - self._patience - LINGER:
                self.noticed = True
                reports = self._gather_reports()
                if self._progress.changed == since and not self._stop_requested.is_set():
                    # One write: print() makes two, and the lines of ranks that exit together would mix.
                    sys.stderr.write(f"powernap: error: {self._explain(reports)}\n")
                    sys.stderr.flush()
                    time.sleep(LINGER)
                    os._exit(exit_codes.HUNG)
                self.noticed = False

    def _gather_reports(self) -> dict[int, dict]:
        """The reports of the ranks that noticed: rank -> {doing, waiting, enqueued}."""
        reports = {self._rank: self._report()}
        # In a thread that may be left behind: the stuck rank may be the one that hosts the store, and some of the
        # store's calls have no time-out.
        exchange = threading.Thread(target=self._exchange, args=(reports,), daemon=True)
        exchange.start()
        exchange.join(self._patience)
        return dict(reports)

    def _report(self) -> dict[str, Any]:
        # NCCL's recorder asks the device with the interpreter's lock held. If no answer comes, no thread of Python can end
        # this process any more.
        faulthandler.dump_traceback_later(self._patience + LINGER, exit=True, file=STDERR)
        try:
            enqueued = collectives.enqueued(self._progress.noted_at)
        except (AttributeError, KeyError, RuntimeError, ValueError):  # no other version of torch has failed here yet
            enqueued = None
        finally:
            faulthandler.cancel_dump_traceback_later()
        waits = self._waits() or (enqueued is not None and enqueued.pending is not None)
        return {"doing": self._progress.describe(), "waiting": waits, "enqueued": enqueued}

    def _exchange(self, reports: dict[int, dict]) -> None:
        ranks, own = self._to_ask(reports[self._rank]), reports[self._rank]
        deadline = time.monotonic() + self._patience
        try:
            store = _connect()
            store.set(f"stuck/{self._rank}", json.dumps(own))
            while len(reports) < len(ranks) and time.monotonic() < deadline:
                for rank in ranks:
                    if rank not in reports and store.check([f"stuck/{rank}"]):
                        reports[rank] = json.loads(store.get(f"stuck/{rank}"))
                time.sleep(0.1)
        except (
            RuntimeError,
            OSError,
            KeyError,
        ):  # not joined yet; or the rank that hosts the store is gone
            pass

    def _to_ask(self, own: dict) -> set[int]:
        if self._world_size <= ASK_AT_MOST:
            return set(range(self._world_size))
        enqueued = own["enqueued"]
        group = enqueued.pending.ranks if enqueued and enqueued.pending else []
        return {0, self._rank, *(group if len(group) <= ASK_OF_GROUP else ())}

    def _explain(self, reports: dict[int, dict]) -> str:
        who = self._grid.describe_rank
        others = {rank: report for rank, report in reports.items() if rank != self._rank}
        silent = [rank for rank in range(self._world_size) if rank not in reports]
        parts = [f"{who(self._rank)} waited {self._timeout:.0f} s and gives up: {reports[self._rank]['doing']}"]
        sentences, named = self._explain_collectives(reports)
        parts += sentences
        busy = [rank for rank, report in others.items() if not report["waiting"] and rank not in named]
        if silent and self._world_size <= ASK_AT_MOST:
            parts.append(f"no word from {first_three(map(who, silent))}: stopped, or dead")
        parts += [f"{who(rank)} is busy: {reports[rank]['doing']}" for rank in busy[:3]]
        if not silent and all(report["waiting"] for report in reports.values()):
            parts.append("every rank waits for another")
        return "; ".join(parts)

    def _explain_collectives(self, reports: dict[int, dict]) -> tuple[list[str], set[int]]:
        """`collectives.explain` of the ranks whose recorder has anything."""
        enqueued = {rank: Enqueued.from_json(r["enqueued"]) for rank, r in reports.items() if r["enqueued"]}
        if self._rank not in enqueued:
            return [UNRECORDED] if self._progress.joined else [], set()
        doing = {rank: report["doing"] for rank, report in reports.items()}
        return collectives.explain(self._rank, enqueued, doing, self._grid)

    @property
    def _timeout(self) -> float:
        return self._timeout_seconds if self._progress.joined else max(JOINING, self._timeout_seconds)

    def _waits(self) -> bool:
        """Whether the main thread is communicating rather than computing or reading."""
        assert self._main_thread is not None
        frame = sys._current_frames().get(self._main_thread)
        return frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_IN)


def _connect() -> dist.Store:
    """A separate connection to the ranks' common store: the main thread may be waiting in its own."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
    )
    return dist.PrefixStore(f"powernap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
