"""Hangs that explain themselves.

Every rank notes what it does. A thread beside it looks whether that has changed; if it has not for the time-out, the
rank writes down where it stands, reads what the others wrote, says in one line who waits for what, and leaves. It works
the same for gloo and NCCL, whose own time-outs come later and know nothing of steps and segments.
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
JOINING = 60.0  # seconds at least for ranks to meet: one that still reads libraries from a busy disk is not lost
ASK_AT_MOST = 512  # ranks; more would flood the store

# A main thread that stands in one of these waits for other ranks.
_WAITING_IN = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/",
    "megatron/core/tensor_parallel/",
    "deepspeed/comm/",
)


class Progress:
    """What this rank does at the moment. Cheap enough to be noted at every segment."""

    def __init__(self):
        self.step: int | None = None
        self.joined = False  # whether all ranks have met
        self.note("starting")

    def note(self, doing: str | Callable[..., str], *details: object, brief: Callable[[], str] | None = None) -> None:
        """`doing` is a text, or makes one from `details` if somebody asks; `brief` leaves out what comes next."""
        self._doing, self._details, self._brief = doing, details, brief
        self.changed = time.monotonic()

    def describe(self, brief: bool = False) -> str:
        doing = self._doing(*self._details) if callable(self._doing) else self._doing
        if brief and self._brief:
            doing = self._brief()
        return doing if self.step is None else f"step {self.step}, {doing}"


class Watchdog(threading.Thread):
    """Ends this process when `progress` has not changed for `timeout_seconds`, after saying why."""

    def __init__(
        self, progress: Progress, who: Callable[[int], str], rank: int, world_size: int, timeout_seconds: float
    ):
        super().__init__(name="powernap-watchdog", daemon=True)
        self._progress, self._who = progress, who
        self._rank, self._world_size = rank, world_size
        self._patience = min(5.0, timeout_seconds / 5)  # for the others to write down where they stand
        self._timeout_seconds = timeout_seconds
        self._main_thread = threading.main_thread().ident
        self._over = threading.Event()
        self.noticed = False  # it is about to say why and to leave: an error in the main thread now is a consequence

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(min(1.0, self._patience / 4)):
            since = self._progress.changed
            if parent.gone.is_set() and not self._progress.joined:
                os._exit(exit_codes.PREEMPTED)  # it has said why; there is nothing to save yet
            if time.monotonic() - since > self._timeout - self._patience - LINGER:
                self.noticed = True
                reports = self._ask()
                if self._progress.changed == since and not self._over.is_set():
                    # One write: print() makes two, and the lines of ranks that leave together would mix.
                    sys.stderr.write(f"powernap: error: {self._explain(reports)}\n")
                    sys.stderr.flush()
                    time.sleep(LINGER)
                    os._exit(exit_codes.HUNG)
                self.noticed = False

    def _ask(self) -> dict[int, dict]:
        """What the ranks that noticed wrote: rank -> {doing, waiting}."""
        reports: dict[int, dict] = {}
        # In a thread that may be left behind: the rank that is stopped may be the one that keeps the store, and some of the
        # store's questions know no time-out.
        asking = threading.Thread(target=self._exchange, args=(reports,), daemon=True)
        asking.start()
        asking.join(self._patience)
        return dict(reports)

    def _exchange(self, reports: dict[int, dict]) -> None:
        ranks = range(self._world_size) if self._world_size <= ASK_AT_MOST else (0, self._rank)
        deadline = time.monotonic() + self._patience
        try:
            store = _connect()
            own = {"doing": self._progress.describe(), "waiting": self._waits()}
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
        ):  # not met yet; and the store lives with one of the ranks, which may be the one that is gone
            pass

    def _explain(self, reports: dict[int, dict]) -> str:
        silent = [rank for rank in range(self._world_size) if rank not in reports and rank != self._rank]
        busy = [rank for rank, report in reports.items() if not report["waiting"] and rank != self._rank]
        parts = [f"{self._who(self._rank)} waited {self._timeout:.0f} s and gives up: {self._progress.describe()}"]
        if silent and self._world_size <= ASK_AT_MOST:
            parts.append(f"no word from {_some(map(self._who, silent))}: stopped, or dead")
        parts += [f"{self._who(rank)} is busy: {reports[rank]['doing']}" for rank in busy[:3]]
        if not silent and not busy:
            parts.append("every rank waits for another")
        return "; ".join(parts)

    @property
    def _timeout(self) -> float:
        return self._timeout_seconds if self._progress.joined else max(JOINING, self._timeout_seconds)

    def _waits(self) -> bool:
        """Whether the main thread stands in communication rather than in computing or reading."""
        assert self._main_thread is not None
        frame = sys._current_frames().get(self._main_thread)
        return frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_IN)


def _connect() -> dist.Store:
    """A connection of our own to the ranks' common store: the main thread's may be waiting in it."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
    )
    return dist.PrefixStore(f"powernap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
