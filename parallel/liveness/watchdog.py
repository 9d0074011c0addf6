"""Hangs that explain themselves.

Every rank records what it is doing. A thread checks whether that has changed; if it has not for the time-out, the rank
publishes its state, reads the others', reports in one line who waits for what, and exits. It works the same for gloo
and NCCL, whose own time-outs come later and know nothing of steps and segments.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from powernap.parallel.liveness import exit_codes, parent

LINGER = 2.0  # seconds: the first exit kills the peers; let them report before that
JOINING = 60.0  # seconds at least for ranks to join: one that still imports libraries from a busy disk is not lost
ASK_AT_MOST = 512  # ranks; more would flood the store

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
        self.note("starting")

    def note(self, doing: str | Callable[..., str], *details: object, brief: Callable[[], str] | None = None) -> None:
        """`doing` is a text, or returns one for `details` on demand; `brief` returns one without the next step."""
        self._doing, self._details, self._brief = doing, details, brief
        self.changed = time.monotonic()

    def describe(self, brief: bool = False) -> str:
        doing = self._doing(*self._details) if callable(self._doing) else self._doing
        if brief and self._brief:
            doing = self._brief()
        return doing if self.step is None else f"step {self.step}, {doing}"


class Watchdog(threading.Thread):
    """Reports why and ends this process when `progress` has not changed for `timeout_seconds`."""

    def __init__(
        self, progress: Progress, who: Callable[[int], str], rank: int, world_size: int, timeout_seconds: float
    ):
        super().__init__(name="powernap-watchdog", daemon=True)
        self._progress, self._who = progress, who
        self._rank, self._world_size = rank, world_size
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
        """The reports of the ranks that noticed: rank -> {doing, waiting}."""
        reports: dict[int, dict] = {}
        # In a thread that may be left behind: the stuck rank may be the one that hosts the store, and some of the
        # store's calls have no time-out.
        exchange = threading.Thread(target=self._exchange, args=(reports,), daemon=True)
        exchange.start()
        exchange.join(self._patience)
        return dict(reports)

    def _exchange(self, reports: dict[int, dict]) -> None:
        ranks = range(self._world_size) if self._world_size <= ASK_AT_MOST else (0, self._rank)
        deadline = time.monotonic() + self._patience
        try:
            store = _connect()
            report = {"doing": self._progress.describe(), "waiting": self._waits()}
            store.set(f"stuck/{self._rank}", json.dumps(report))
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

    def _explain(self, reports: dict[int, dict]) -> str:
        silent = [rank for rank in range(self._world_size) if rank not in reports and rank != self._rank]
        busy = [rank for rank, report in reports.items() if not report["waiting"] and rank != self._rank]
        parts = [f"{self._who(self._rank)} waited {self._timeout:.0f} s and gives up: {self._progress.describe()}"]
        if silent and self._world_size <= ASK_AT_MOST:
            parts.append(f"no word from {_first_three(map(self._who, silent))}: stopped, or dead")
        parts += [f"{self._who(rank)} is busy: {reports[rank]['doing']}" for rank in busy[:3]]
        if not silent and not busy:
            parts.append("every rank waits for another")
        return "; ".join(parts)

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


def _first_three(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
