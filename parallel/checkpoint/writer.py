"""Writing a checkpoint while training continues.

    save()                 every rank copies its fragments out of the partitions: all that training waits for
      thread on each rank    writes its file, reads it back for the SHA-256
      thread on rank 0       collects them, writes the manifest, renames step_N.tmp to step_N, prunes

A failure leaves step_N.tmp, which is never taken for a checkpoint, and earlier checkpoints as they were. All ranks
learn the outcome, and report it at the next call.
"""

import hashlib
import os
import shutil
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from powernap.model.fast_weights import LayerStates
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint import manifest
from powernap.parallel.checkpoint.manifest import CheckpointError
from powernap.parallel.checkpoint.shards import split_of, whole_shape
from powernap.parallel.liveness.collectives import BESIDE_TRAINING
from powernap.parallel.topology import Topology
from powernap.parallel.zero.optimizer import ZeroOptimizer

FAILURES = 3  # failed saves in a row before training stops: its further progress could not be kept
MARGIN = 2**20  # bytes free beyond a checkpoint's, for manifest and folder


def _file_mode() -> int:
    umask = os.umask(0)  # it can only be read by setting it; at import no other thread creates files
    os.umask(umask)
    return 0o666 & ~umask


FILE_MODE = _file_mode()


@dataclass(frozen=True)
class Outcome:
    """How one save ended."""

    step: int
    nbytes: int  # of all ranks
    error: str | None  # in one line; None: the checkpoint is complete
    stall: float  # seconds that training waited
    seconds: float  # until it was complete
    pruned: tuple[Path, ...] = ()

    def describe(self) -> str:
        if self.error:
            return f"no checkpoint of step {self.step}: {self.error}"
        pruned = f", {', '.join(path.name for path in self.pruned)} deleted" if self.pruned else ""
        return (
            f"checkpoint of step {self.step}: {self.nbytes / 1e6:,.1f} MB in {self.seconds:.2f} s, of which training waited "
            f"{self.stall:.2f} s{pruned}"
        )


class Writer:
    """Writes the checkpoints of a run. All ranks make the same calls.

    Args:
        folder: the run's `checkpoints`; it must exist.
        about: further fields of the manifest: "versions", "config".
        keep_last, keep_every: see `manifest.prune`.
        asynchronous: keep training while files are written, at the price of a copy in host memory.
    """

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        about: dict[str, Any],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
    ):
        self.folder = folder
        self._topology = topology
        self._about = about
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous = asynchronous
        # A separate group: its messages, some from the thread, never mix with training's.
        self._group = _group_of_all(topology.timeout_seconds) if topology.world_size > 1 else None
        # As a save does: ranks connect now, while the launcher, which may keep the addresses, is alive.
        self._broadcast(self._gather(None))
        self._thread: threading.Thread | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._outcome: Outcome | None = None
        self._failures = 0  # in a row
        self._error: str | None = None  # the last one's

    def save(
        self,
        step: int,
        stage: HybridStage,
        zero: ZeroOptimizer,
        state: dict[str, Any],
        layer_states: LayerStates | None = None,
    ) -> None:
        """Write the state after `step`, in the background if asynchronous; waits for an unfinished save.

        Args:
            state: what else the run needs to resume, as JSON; rank 0's is written.
            layer_states: states that this rank's sequences carry to the next step, if any.

        Raises:
            CheckpointError: on all ranks, if this one and the ones before could not be written.
        """
        start = time.monotonic()
        self._settle()
        tensors, fragments = self._collect(stage, zero, layer_states)
        parts = self._gather(sum(value.nbytes for value in tensors.values()))
        nbytes = sum(parts) if parts else 0
        error = self._broadcast(self._make_room(step, nbytes) if self._topology.is_main else None)
        if error is not None:
            stall = time.monotonic() - start
            self._end(Outcome(step, nbytes, error, stall, stall))
            return
        failed = None  # on this rank; the other ranks learn of it after writing
        if self._asynchronous:
            try:
                tensors = self._copy(tensors)
            except (RuntimeError, MemoryError) as raised:
                failed = f"{self._topology.describe()}: no memory for a copy of its part ({_one_line(raised)})"
        entry = {"tensor": self._topology.tp_rank, "data": self._topology.dp_rank, **fragments}
        content = {
            "step": step, "layout": layout_of(zero, self._topology), **self._about, "state": state,
            "groups": zero.groups(), **self._describe(stage, zero, layer_states),
        }  # fmt: skip
        stall = time.monotonic() - start

        def write() -> None:
            outcome = self._write(step, tensors, entry, content, failed)
            waited = stall if self._asynchronous else time.monotonic() - start
            self._end(Outcome(step, nbytes, outcome[0], waited, time.monotonic() - start, outcome[1]))

        if not self._asynchronous:
            write()
            return
        self._thread = threading.Thread(target=write, name="powernap-checkpoint", daemon=True)
        self._thread.start()

    def news(self) -> Outcome | None:
        """The outcome of a save that ended on this rank since the last call; None: nothing new."""
        if self._thread is not None and self._thread.is_alive():
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def finish(self) -> Outcome | None:
        """Wait for an unfinished save; return `news`.

        Raises:
            CheckpointError: if the last checkpoint could not be written.
        """
        self._join()
        if self._failures:
            raise CheckpointError(f"the last checkpoint could not be written: {self._error}")
        return self.news()

    def _settle(self) -> None:
        self._join()
        if self._failures >= FAILURES:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be written, the last: {self._error}; make room, and go "
                "on with --resume"
            )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _end(self, outcome: Outcome) -> None:
        self._failures = self._failures + 1 if outcome.error else 0
        self._error = outcome.error
        self._outcome = outcome

    def _collect(
        self, stage: HybridStage, zero: ZeroOptimizer, layer_states: LayerStates | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """This rank's tensors by their names in its file, and their manifest entry. Nothing is copied."""
        topology, tensors = self._topology, {}
        entry: dict[str, Any] = {"fragments": {}, "blocks": []}
        for name, parameter in _written_here(stage, topology):
            fragment = zero.fragment(parameter)
            if fragment is None or not fragment.size:
                continue
            entry["fragments"][name] = [fragment.start, fragment.stop]
            for kind, (start, value) in zero.values(parameter, fragment).items():
                tensors[f"{kind}/{name}"] = value.narrow(0, fragment.start - start, fragment.size)
        if layer_states is not None:
            entry["blocks"] = [str(block) for block in stage.fast_weight_mixers]
            states = zip(entry["blocks"], layer_states, strict=True)
            tensors |= {f"fast_weights/{block}": state.detach() for block, state in states}
        return tensors, entry

    def _describe(self, stage: HybridStage, zero: ZeroOptimizer, layer_states: LayerStates | None) -> dict[str, Any]:
        """The manifest's "parameters" and "lanes": of this rank's stage here; rank 0 merges all later."""
        topology = self._topology
        group_of = {
            id(p): number for number, group in enumerate(zero.parameter_groups) for p in group
        }  # not of frozen ones
        parameters = {}
        for name, parameter in _written_here(stage, topology):
            split = split_of(parameter)
            shape = whole_shape(parameter, topology.tp_size)
            parameters[name] = {"shape": shape, "split": split and list(split), "group": group_of.get(id(parameter))}
        lanes = None
        if layer_states is not None:
            shapes = {
                str(b): list(state.shape[1:]) for b, state in zip(stage.fast_weight_mixers, layer_states, strict=True)
            }
            blocks = {block: [heads * topology.tp_size, *rest] for block, (heads, *rest) in shapes.items()}
            rows = len(layer_states[0]) if layer_states else 0
            lanes = {"count": rows * topology.dp_size, "blocks": blocks}
        return {"parameters": parameters, "lanes": lanes}

    def _copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy into host memory, reusing the previous save's pages."""
        for name, value in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != value.shape:
                pinned = value.device.type == "cuda"
                copy = self._copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            copy.copy_(value, non_blocking=True)
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in tensors}

    def _make_room(self, step: int, nbytes: int) -> str | None:
        """On rank 0: make an empty step_N.tmp if the disk has room for it; return why not, or None."""
        unfinished = self._unfinished(step)
        try:
            if not self.folder.is_dir():
                return f"{self.folder}: gone, {nbytes:,} bytes needed there"
            for leftover in (*self.folder.glob("step_*.tmp"), *self.folder.glob("step_*.deleted")):
                shutil.rmtree(leftover)
            if (free := shutil.disk_usage(self.folder).free) < nbytes + MARGIN:
                return f"{self.folder}: {nbytes + MARGIN:,} bytes needed, {free:,} free"
            unfinished.mkdir()
        except OSError as error:
            return f"{unfinished}: {error.strerror}, {nbytes:,} bytes needed there"
        return None

    def _write(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        entry: dict[str, Any],
        content: dict[str, Any],
        error: str | None,
    ) -> tuple[str | None, tuple[Path, ...]]:
        """Write this rank's file and, on rank 0, make all of them a checkpoint; return error and pruned folders.

        Args:
            error: of this rank, from before writing.
        """
        name = f"rank-{self._topology.rank:05d}.safetensors"
        path = self._unfinished(step) / name
        try:
            try:
                if not error:
                    entry |= _write_file(path, tensors)
            except (OSError, SafetensorError) as failed:
                needed = sum(value.nbytes for value in tensors.values())
                error = f"{path}: {_reason(failed)}, {needed:,} bytes needed"
            parts = self._gather((name, entry, content["parameters"], content["lanes"], error))
            outcome = self._commit(step, content, parts) if parts else None
            return self._broadcast(outcome)
        except RuntimeError as failed:  # another rank is gone
            return f"{self._topology.describe()}: {_one_line(failed)}", ()

    def _commit(
        self, step: int, content: dict[str, Any], parts: list[tuple[str, dict, dict, dict | None, str | None]]
    ) -> tuple[str | None, tuple[Path, ...]]:
        """On rank 0: manifest, rename, prune."""
        for *_, error in parts:
            if error:
                return error, ()
        unfinished, final = self._unfinished(step), self.folder / manifest.folder_name(step)
        lanes = content["lanes"]
        for _, _, parameters, others, _ in parts:
            content["parameters"] |= parameters
            if lanes:
                assert others is not None
                lanes["blocks"] |= others["blocks"]
                lanes["count"] = max(lanes["count"], others["count"])  # a stage without such a block counts none
        try:
            files = {name: entry for name, entry, *_ in parts}
            written = datetime.now(UTC).isoformat(timespec="seconds")
            manifest.write_manifest(unfinished, {**content, "written": written, "files": files})
            _sync(unfinished / manifest.NAME)
            _sync(unfinished)
            if final.exists():  # a broken one of the same step, which the run has passed over
                shutil.rmtree(final)
            unfinished.rename(final)
            _sync(self.folder)
        except OSError as failed:
            return f"{unfinished}: {failed.strerror}", ()
        try:
            return None, tuple(manifest.prune(self.folder, self._keep_last, self._keep_every))
        except OSError:  # the checkpoint is there; the next one tries again
            return None, ()

    def _unfinished(self, step: int) -> Path:
        return self.folder / f"{manifest.folder_name(step)}.tmp"

    def _gather(self, value: Any) -> list | None:
        """`value` of all ranks, on rank 0."""
        if self._group is None:
            return [value]
        values = [None] * self._topology.world_size if self._topology.is_main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def _broadcast(self, value: Any) -> Any:
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


def _group_of_all(timeout_seconds: float) -> dist.ProcessGroup:
    """Of all ranks. Two connect when they first talk, for a ring and a tree; gloo's own way is every one to all others."""
    lazily = "TORCH_GLOO_LAZY_INIT"
    before = os.environ.get(lazily)
    os.environ[lazily] = "1"
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds), group_desc=BESIDE_TRAINING)
    finally:
        if before is None:
            del os.environ[lazily]
        else:
            os.environ[lazily] = before


def layout_of(zero: ZeroOptimizer, topology: Topology) -> dict[str, int]:
    """The layout a checkpoint is written in, under the recipe's names."""
    sizes = {"data": topology.dp_size, "tensor": topology.tp_size, "pipeline": topology.pp_size}
    return {**{f"parallel.{name}": size for name, size in sizes.items()}, "zero.stage": zero.zero_stage}


def _written_here(stage: HybridStage, topology: Topology):
    """The parameters whose fragments this rank writes: only one rank writes a shared one."""
    for name, parameter in stage.named_parameters():
        if split_of(parameter) is None and topology.tp_rank != 0:
            continue
        if stage.holds_tied_copy and stage.embedding is not None and parameter is stage.embedding.weight:
            continue  # the first stage's
        yield stage.global_name(name), parameter


def _write_file(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write and flush; return size and SHA-256."""
    # safetensors requires every tensor to own its memory: a fragment is part of a partition.
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    path.chmod(FILE_MODE)  # safetensors gives no rights to others
    _sync(path)
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Make a file or folder survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
