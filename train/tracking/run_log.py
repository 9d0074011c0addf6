"""A run's output while it trains: a bar on a terminal, lines in logs/train.log, metrics.jsonl, MLflow."""

import logging
import sys
import time
from contextlib import suppress
from typing import Any, Self

import torch
from tqdm import tqdm

from powernap.parallel.checkpoint.writer import Outcome
from powernap.parallel.topology import Topology
from powernap.train.config import Recipe
from powernap.train.run.folder import RunFolder
from powernap.train.run.secrets import mask_secrets
from powernap.train.tracking.about import description, passes_text
from powernap.train.tracking.metrics import MetricsLog
from powernap.train.tracking.summary import Summary, duration, held_out
from powernap.train.tracking.tracked import Tracked
from powernap.train.tracking.tracker import Status
from powernap.train.tracking.trackers import Trackers

logger = logging.getLogger("powernap")  # the parent of every module's logger here
LOG = "train.log"
step_logger = logging.getLogger("powernap.step")  # too many lines for a terminal, which has the bar


def slow_on_gpus(recipe: Recipe, topology: Topology) -> list[str]:
    """What would make a run on GPUs many times slower than need be."""
    if topology.device.type != "cuda":
        return []
    import torch.distributed as dist
    from torch.cuda import device_count

    found = []
    if recipe.train.precision == "fp32":
        found.append(
            "train.precision=fp32 on GPUs: no tensor cores, none of FLA's kernels; bf16 is several times faster"
        )
    if topology.world_size > 1 and dist.get_backend() == "gloo":
        found.append(
            f"{topology.world_size} ranks talk by gloo, through the processors' memory, since those of a machine see {device_count()} of "
            "its GPUs: let every rank see all of them (SLURM: --gpus-per-node in place of --gpus-per-task)"
        )
    return found


class RunLog:
    """Everything rank 0 writes during a run; on the other ranks every method does nothing.

    resume_step: the step that a run resumes after, None for a new run.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, topology: Topology, resume_step: int | None) -> None:
        self._recipe, self._folder, self._topology = recipe, folder, topology
        self._first = resume_step or 0
        self._resume_step = resume_step
        self._steps_left = self._first < recipe.train.steps
        self._enabled = topology.is_main
        self._tracker = Trackers()
        self._stopped_after: int | None = None

    def __enter__(self) -> Self:
        if not self._enabled:
            return self
        self._metrics = MetricsLog(self._folder.metrics, self._resume_step)
        self._handlers = [_file_handler(self._folder), _console_handler()]
        for handler in self._handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        resume_step = self._resume_step if self._steps_left else None
        self._tracker = Trackers.open(self._recipe, self._folder.path, resume_step, running=self._steps_left)
        self._tracked = Tracked(self._recipe, self._folder, resumed=self._resume_step is not None)
        self._bar = tqdm(
            total=self._recipe.train.steps,
            initial=self._first,
            desc=self._recipe.run.name,
            unit=" steps",
            smoothing=0,  # the mean: single steps differ, and some are followed by an evaluation
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._summary = Summary(self._recipe, self._folder.path, self._topology)
        self._start = time.monotonic()
        return self

    def start(self, num_parameters: int, passed_over: list[str], notes: list[str]) -> None:
        """Log what is about to run, which checkpoints were passed over, and `notes`: what it starts from, what has changed."""
        if not self._enabled:
            return
        recipe, topology = self._recipe, self._topology
        logger.info(
            "%s: %s parameters, pattern %s, windows of %d tokens, N=%s",
            recipe.run.name,
            f"{num_parameters:,}",
            recipe.model.pattern,
            recipe.model.window,
            passes_text(recipe),
        )
        processes = f"{topology.world_size} process{'es' if topology.world_size > 1 else ''}"
        if topology.device.type == "cpu":
            threads = torch.get_num_threads()
            processes += f" of {threads} thread{'s' if threads > 1 else ''}"
        logger.info("%s on %s, %s, into %s", processes, topology.device.type, recipe.train.precision, self._folder.path)
        for line in slow_on_gpus(recipe, topology):
            logger.warning("%s", line)
        for line in notes:
            logger.info("%s", line)
        for reason in passed_over:
            logger.warning("passed over a checkpoint: %s", reason)
        if self._first and self._steps_left:
            logger.info("resumed after step %d of %d", self._first, recipe.train.steps)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Record a step; log and track it only every train.log_every steps, and after an evaluation."""
        if not self._enabled:
            return
        flops = self._tracked.flops_of({"step": step, **metrics})
        record = self._metrics.write(step, **metrics, **({"flops": flops} if flops else {}))
        self._tracked.add(record)
        if step == self._first + 1:
            self._begin_estimating()
        else:
            self._bar.update()
        self._summary.add(record)
        found = held_out(record)
        if self._tracked.is_point(record) or step in (self._first + 1, self._recipe.train.steps):
            self._tracker.log_metrics(step, self._tracked.of(record))
            self._log_step(step, record)
        for line in found:
            logger.info("step %s: %s", f"{step:,}", line)

    def event(self, text: str, *arguments: Any) -> None:
        """Log a line to the terminal and the log file."""
        if self._enabled:
            logger.info(text, *arguments)

    def checkpoint(self, outcome: Outcome | None) -> None:
        """Log how a save ended, if one did."""
        if self._enabled and outcome:
            (logger.warning if outcome.error else logger.info)("%s", outcome.describe())

    def stopped(self, step: int) -> None:
        """Log that the run stopped after `step`, as it was asked to."""
        self._stopped_after = step
        self.event("asked to stop: stopped after step %d of %d; continue with --resume", step, self._recipe.train.steps)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not self._enabled:
            return
        self._bar.close()
        status: Status = "FINISHED"
        if kind is not None:
            stopped = not issubclass(kind, Exception)  # KeyboardInterrupt, SystemExit: a user's decision
            status = "KILLED" if stopped else "FAILED"
            step_logger.error("%s", "stopped" if stopped else "failed", exc_info=None if stopped else error)
        elif self._stopped_after is not None:
            status = "KILLED"
        elif not self._steps_left:
            logger.info("finished before: all %d steps are done", self._first)
        else:
            for line in self._summary.lines(time.monotonic() - self._start):
                logger.info("%s", line)
            self._tracker.describe(description(self._recipe, self._folder.path, self._summary.result()))
        if (log := self._folder.logs / LOG).is_file():
            self._tracker.log_artifact(log)
        self._tracker.close(status, 30.0 if status == "FINISHED" else 5.0)  # the grace period before a kill is short
        self._metrics.close()
        for handler in self._handlers:
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()

    def _begin_estimating(self) -> None:
        """Time from here on: the first step warms up, reads and compiles, and tells nothing about the others."""
        self._warm = time.monotonic()
        if not self._bar.disable:
            self._bar.n = self._bar.initial = self._bar.last_print_n = self._first + 1
            self._bar.unpause()
            self._bar.refresh()

    def _log_step(self, step: int, record: dict[str, Any]) -> None:
        speed = record["tokens"] / record["seconds"]
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed:,.0f} tokens/s")
        steps = self._recipe.train.steps
        timed = step - self._first - 1
        eta = f"{duration((time.monotonic() - self._warm) / timed * (steps - step))} left" if timed else "first step"
        step_logger.info(
            "step %*d/%d  loss %.4f  grad norm %.3f  lr %.2e  %s tokens/s  %s",
            len(str(steps)), step, steps, record["loss"], record["grad_norm"], record["lr"],
            f"{speed:,.0f}", eta,
        )  # fmt: skip


class _Formatter(logging.Formatter):
    """Masks secrets: errors and their tracebacks contain the full URLs of shards."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))


class _BarHandler(logging.StreamHandler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a closed terminal is no reason to end a run
            tqdm.write(self.format(record), file=sys.stderr)


def _console_handler() -> logging.Handler:
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler = _BarHandler()
        handler.addFilter(lambda record: record.name != step_logger.name)
    # The interpreter prints a failure's traceback; here it is only for the file.
    handler.addFilter(lambda record: not record.exc_info)
    handler.setFormatter(_Formatter("%(message)s"))
    return handler


class _LogFile(logging.FileHandler):
    """Reports a full disk once: a lost line is not worth a traceback, nor a run."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._reported:
            self._reported = True
            print(f"powernap: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def _file_handler(folder: RunFolder) -> logging.Handler:
    handler = _LogFile(folder.logs / LOG, encoding="utf-8")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
