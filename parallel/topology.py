"""From processes to process groups: torch.distributed and Megatron-core's parallel state, on CUDA or CPU."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from powernap.model.errors import PowernapError
from powernap.model.megatron import ProcessGroupCollection, parallel_state
from powernap.parallel import cpu, loopback
from powernap.parallel.grid import Grid
from powernap.parallel.liveness import exit_codes
from powernap.parallel.liveness.heartbeat import beating
from powernap.parallel.liveness.lost_ranks import why_lost
from powernap.parallel.liveness.watchdog import JOINING, Progress, Watchdog
from powernap.parallel.rendezvous import RENDEZVOUS, rendezvous


@dataclass(frozen=True)
class Topology:
    """This process's place among the ranks, and its process groups."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int  # pipeline stage, from 0
    pp_size: int
    device: torch.device
    groups: ProcessGroupCollection
    timeout_seconds: float  # a collective that waits longer raises
    progress: Progress

    @property
    def is_main(self) -> bool:
        """The one process that writes logs, metrics and tracking."""
        return self.rank == 0

    def describe(self) -> str:
        """This rank's place in the grid, for messages."""
        return self.describe_rank(self.rank)

    def describe_rank(self, rank: int) -> str:
        return Grid(self.tp_size, self.dp_size, self.pp_size).describe_rank(rank)

    def rank_of_stage(self, stage: int) -> int:
        """The rank in this rank's pipeline that runs `stage`."""
        return dist.get_global_rank(self.groups.pp, stage)

    def all_reduce_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over data-parallel ranks, in place."""
        dist.all_reduce(values, group=self.groups.dp)
        return values

    def all_reduce_over_stages(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the stages of this pipeline, in place."""
        if self.pp_size > 1:
            dist.all_reduce(values, group=self.groups.pp)
        return values

    def all_reduce_counter_over_data(self, counter: Counter) -> Counter:
        """The sum of `counter` over data-parallel ranks, whose keys may differ."""
        return sum(self.all_gather_over_data(counter), Counter())

    @property
    def is_data_source(self) -> bool:
        """Whether this rank reads the batches of its model and broadcasts them."""
        return self.pp_rank == 0 and self.tp_rank == 0

    def broadcast_in_model(self, values: torch.Tensor) -> torch.Tensor:
        """Broadcast the data source's `values` to all stages and tensor ranks of its model, in place."""
        dist.broadcast(values, group=self.groups.mp, group_src=0)
        return values

    def all_gather_over_data(self, value: object) -> list:
        """`value` of each data-parallel rank."""
        values = [None] * self.dp_size
        dist.all_gather_object(values, value, group=self.groups.dp)
        return values

    def all_gather_object(self, value: object) -> list:
        """`value` of each rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def merge_over_model(self, values: dict[str, float]) -> dict[str, float]:
        """The values of all stages and tensor ranks of this model, averaged where several have the same name."""
        parts: list[Any] = [None] * self.groups.mp.size()
        dist.all_gather_object(parts, values, group=self.groups.mp)
        names = dict.fromkeys(name for part in parts for name in part)
        by_name = {name: [part[name] for part in parts if name in part] for name in names}
        return {name: sum(values) / len(values) for name, values in by_name.items()}

    def broadcast_object(self, value: Any) -> Any:
        """`value` of the main rank, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of all ranks."""
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def raise_together(self, call: Callable[[], None]) -> None:
        """`call` on the main rank; if it raises an OSError or ValueError, every rank raises it and none hangs."""
        error = None
        if self.is_main:
            try:
                call()
            except (OSError, ValueError) as raised:
                error = raised
        if error := self.broadcast_object(error):
            raise error

    def barrier(self) -> None:
        dist.barrier()


def init_distributed(
    tensor: int = 1,
    pipeline: int = 1,
    timeout_seconds: float = 600.0,
    progress: Progress | None = None,
    **process_group,
) -> Topology:
    """Join the processes that torchrun or srun described in the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Args:
        tensor, pipeline: ranks per tensor-parallel group, pipeline stages; data parallelism takes the rest.
        timeout_seconds: a collective that waits longer raises instead of hanging.
        progress: records what this rank is doing.
        process_group: passed to torch.distributed.init_process_group in place of the environment (tests).
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # set, since DeepSpeed requires it
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        # What Triton's autotuner chose stays beside its compiled kernels, for the next start and for the other ranks.
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    # NCCL needs one GPU per rank; ranks that share a GPU, as in tests, use gloo.
    backend = "nccl" if on_cuda and local_world <= torch.cuda.device_count() else "gloo"
    if on_cuda and backend == "gloo" and pipeline > 1:
        raise TopologyError(
            f"parallel.pipeline={pipeline}: {local_world} ranks see {torch.cuda.device_count()} of this machine's GPUs, so they "
            "talk by gloo, which sends no tensor of a GPU to the next stage: let every rank see as many GPUs as there are "
            "ranks, or write parallel.pipeline=1"
        )
    cpu.prepare()
    with cpu.without_mlflow():
        import deepspeed  # noqa: F401  # late: it reads LOCAL_RANK
    loopback.prepare(int(os.environ.get("WORLD_SIZE", 1)), local_world)
    if not dist.is_initialized():
        if not process_group and os.environ.get("WORLD_SIZE") == "1":  # no peers, so no port that others could take
            process_group = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        timeout, name = timedelta(seconds=timeout_seconds), os.environ.get(RENDEZVOUS)
        if process_group or not name or os.environ.get("MASTER_PORT"):
            dist.init_process_group(backend, timeout=timeout, **process_group)
        else:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            with rendezvous(name, rank, timeout_seconds) as store:
                dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    if not parallel_state.model_parallel_is_initialized():
        with nullcontext() if backend == "nccl" else cpu.one_group_for_each_set_of_ranks():
            parallel_state.initialize_model_parallel(
                tensor,
                pipeline,
                distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
                create_gloo_process_groups=False,  # beside the backend's own: nothing uses them
            )
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tensor,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pipeline,
        device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"),
        timeout_seconds=timeout_seconds,
        progress=progress or Progress(),
        groups=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "pp", "mp", "cp", "dp", "embd"]),
    )


def alone() -> Topology:
    """This process as a world of one, or the groups that it is in already; they stay until it ends."""
    process_group: dict[str, Any] = {}
    if not dist.is_initialized():
        process_group = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    return init_distributed(**process_group)


class TopologyError(PowernapError):
    """Ranks that cannot train in this layout here, in one line."""


class RankLostError(PowernapError):
    """Another rank went away while this one waited for it, in one line."""

    exit_code = exit_codes.FAILED


@contextmanager
def distributed_session(tensor: int = 1, pipeline: int = 1, timeout_seconds: float = 600.0) -> Iterator[Topology]:
    """`init_distributed`, with a watchdog if there are other ranks; at the end leaves the process groups that it has joined.

    Not after an error with other ranks: a failed rank must not wait for them, it exits and takes them down.

    Raises:
        RankLostError: if another rank closed its connections, or the network to it failed.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    joins = not dist.is_initialized()  # else another model of this process computes in them, such as load_run's
    grid = Grid(tensor, max(1, world_size // (tensor * pipeline)), pipeline)
    who = grid.describe_rank(rank)
    progress, watchdog = Progress(), None
    progress.note(f"joining the other ranks{rendezvous_address()}")
    if world_size > 1:
        watchdog = Watchdog(progress, grid, rank, timeout_seconds)
        watchdog.start()
    try:
        # The watchdog reports first, since it knows what the rank waited for.
        topology = init_distributed(tensor, pipeline, timeout_seconds + JOINING, progress)
        progress.joined = True
        progress.note("starting")
        with beating(progress, rank):
            yield topology
    except RuntimeError as error:
        if watchdog and watchdog.noticed:
            watchdog.join()  # it ends this process
        if reason := why_lost(str(error)):
            raise RankLostError(f"{who}: {reason}; {progress.describe()}") from None
        if not progress.joined:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankLostError(f"{who}: {progress.describe()}: {reason}") from None
        raise
    except ValueError:  # PowernapErrors, too
        if world_size == 1 and joins:  # at the interpreter's exit, threads of the group may abort the process
            shutdown_distributed()
        raise
    if watchdog:
        watchdog.stop()
    if joins:
        shutdown_distributed()


def rendezvous_address() -> str:
    """For messages: where the ranks of this world meet."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return f" at {address}, port {port or 'to be found'}" if address else ""


def shutdown_distributed() -> None:
    """Leave the process groups, and make DeepSpeed forget them: this process may join others later."""
    import deepspeed.comm

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group() if deepspeed.comm.is_initialized() else dist.destroy_process_group()
