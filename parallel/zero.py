"""DeepSpeed ZeRO as the optimizer: splits its states over data-parallel ranks, averages gradients, clips, steps.

The model runs outside DeepSpeed's engine (engine.module), because a schedule calls backward once per segment and
micro-batch, and every weight has a part in each. What makes that legal: at stage 1 `managed_gradient_accumulation:
false`, DeepSpeed's hooks only accumulate and all communication happens in step(); at stages 2 and 3
`coalesce_grad_reduction` around all backward passes of a step.

ZeRO 2 shards the wrong thing here: every segment adds to every weight's gradient, so whole gradients are alive in
every backward pass. The most live tensor bytes of a step, parameters and optimizer left out, in whole sets of float32
gradients (d=192, AGAG, two data-parallel ranks, four micro-batches of five segments, buckets of 50,000 elements):

                                               one pipeline stage   two
    stage 1                                                  2.58   2.69
    stage 2                                                  2.58   2.69
    stage 2, reduced after each micro-batch                  3.13   3.50
    stage 2, reduced after each segment                      3.18   3.56

So stage 2 is refused beside a pipeline, and no better than stage 1 elsewhere.
"""

import contextlib
import gc
import io
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from powernap.model.megatron import ProcessGroupCollection
from powernap.model.stage import HybridStage
from powernap.parallel.planning.memory import REDUCE_BUCKET
from powernap.parallel.schedule import sum_shared_gradients
from powernap.parallel.topology import Topology

MASTER = "master"  # float32 weights, among the names of optimizer states


class Fragment(NamedTuple):
    """The part of a parameter that one data-parallel rank steps: a stretch of the flattened tensor-parallel shard."""

    partition: int  # of this rank's, by number
    offset: int  # in that partition
    start: int  # in the shard
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def _bucket_size(stage: torch.nn.Module) -> int:
    """No more than the model needs: DeepSpeed allocates a whole bucket in every step, 2 GB to page in for a tiny model."""
    return min(REDUCE_BUCKET, sum(p.numel() for p in stage.parameters()))


class ModelParallelUnit:
    """The process grid in the words DeepSpeed asks for.

    To DeepSpeed, model parallelism is everything that is not data parallelism: tensor and pipeline ranks together. No
    name with "sequence_parallel" may appear here: it takes that for its own Ulysses and then leaves the tensor ranks
    out of the gradient norm.
    """

    def __init__(self, groups: ProcessGroupCollection):
        self._groups = groups

    def get_model_parallel_group(self):
        return self._groups.mp

    def get_model_parallel_world_size(self):
        return self._groups.mp.size()

    def get_model_parallel_rank(self):
        return self._groups.mp.rank()

    def get_data_parallel_group(self):
        return self._groups.dp

    def get_data_parallel_world_size(self):
        return self._groups.dp.size()

    def get_data_parallel_rank(self):
        return self._groups.dp.rank()

    def get_tensor_model_parallel_rank(self):
        return self._groups.tp.rank()

    def get_tensor_model_parallel_world_size(self):
        return self._groups.tp.size()

    def get_tensor_model_parallel_group(self):
        return self._groups.tp

    def get_pipeline_model_parallel_world_size(self):
        return self._groups.pp.size()


def _config(
    stage: torch.nn.Module,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    clip: float,
    micro_batch_size: int,
    zero_stage: int,
    offload: bool,
) -> dict[str, Any]:
    """DeepSpeed's."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False, "reduce_bucket_size": _bucket_size(stage)}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": zero_stage > 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if (precision, zero_stage) in (("fp32", 1), ("bf16", 2)):
        # Its buffer to reduce gradients in: in float32 as large as all of them again, there in all backward passes; at
        # bf16 stage 2 it would be bf16.
        zero["contiguous_gradients"] = False
    if zero_stage == 3:
        # A prefetcher learns one order of layers; ours changes with N.
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"  # the sum over data-parallel ranks too
    return config


class _Gradients:
    """All gradients of a stage in one buffer that stays from step to step.

    DeepSpeed's bf16 optimizer has its own that way. Nothing grows in the midst of a step, and no allocator pieces it together.
    """

    def __init__(self, stage: torch.nn.Module):
        self._parameters = list(stage.parameters())
        sizes = [parameter.numel() for parameter in self._parameters]
        self._flat = self._parameters[0].new_zeros(sum(sizes))
        self._parts = self._flat.split(sizes)

    def attach(self) -> None:
        """Every parameter's gradient is zero, and lies here."""
        self._flat.zero_()
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.grad = part.view_as(parameter)


class ZeroOptimizer:
    """One ZeRO engine around a stage.

    Args:
        stage: the module; its parameters become views into DeepSpeed's flat buffers, bf16 if asked.
        optimizer: over the stage's parameters, stepping one flat float32 partition per parameter group. Every rank must
            have the same number of groups, none of them empty: the gradient norm is summed group by group.
        precision: "bf16" keeps float32 master weights and accumulates gradients in float32.
        clip: largest global gradient norm, 0 for no clipping.
        level: ZeRO's stage: 1 splits optimizer states over data-parallel ranks, 2 gradients too, 3 parameters too.
        offload: keep the optimizer's states in host memory and step there.
    """

    def __init__(
        self,
        stage: HybridStage,
        optimizer: torch.optim.Optimizer,
        topology: Topology,
        *,
        precision: Literal["fp32", "bf16"],
        clip: float,
        micro_batch_size: int,
        zero_stage: int = 1,
        offload: bool = False,
    ):
        gc.freeze()  # DeepSpeed collects garbage dozens of times as it starts: not through all that is imported by now
        self.topology = topology
        self.stage = stage
        self.clip = clip
        self.zero_stage = zero_stage
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._unused: dict[torch.nn.Parameter, None] = {}  # so far in this step, in order
        self._loss: torch.Tensor | None = None
        # [parameters of the stage], on the device: what this rank alone accumulated in the last step, in float32.
        self.gradient_norms: torch.Tensor | None = None
        for parameter in stage.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: self._unused.pop(parameter, None))
        if stage.holds_tied_copy:
            assert stage.embedding is not None
            stage.embedding.weight.ds_pipe_replicated = True  # the first stage counts it in the gradient norm
        # DeepSpeed's float32 ZeRO-1 turns a matrix's gradient into Muon's update before it takes the norm: the norm and
        # the clipping would be of updates. So there we average and clip ourselves first. Its bf16 optimizer has the
        # right order. (0.19.8: stage_1_and_2.py get_flat_partition, bf16_optimizer.py step.)
        self._clip_here = precision == "fp32" and any(group.get("use_muon") for group in optimizer.param_groups)
        config = _config(
            stage, topology.device, precision, 0.0 if self._clip_here else clip, micro_batch_size, zero_stage, offload
        )
        import deepspeed  # late: it looks at the environment that init_distributed prepares

        deepspeed.logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=stage,
                optimizer=optimizer,
                config=config,
                # Its bf16 Muon refuses any, also one that says that there is no model parallelism.
                mpu=ModelParallelUnit(topology.groups) if topology.tp_size * topology.pp_size > 1 else None,
            )
        if precision == "bf16":
            for parameter in stage.parameters():
                parameter.grad_dtype = torch.float32
        self._gradients = _Gradients(stage) if precision == "fp32" and zero_stage == 1 else None
        if zero_stage == 3 and stage.model.tie_embeddings:
            assert stage.embedding is not None
            deepspeed.zero.register_external_parameter(stage.output_layer, stage.embedding.weight)

    @property
    def param_groups(self) -> list[dict]:
        return self.zero.param_groups

    @property
    def parameter_groups(self) -> list[list[torch.nn.Parameter]]:
        """The stage's parameters by the optimizer's groups."""
        return self._groups

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Around all backward passes of a step; at its end every rank's gradients are whole, but for averaging."""
        self._unused = dict.fromkeys(self.stage.parameters())
        if self._gradients:
            self._gradients.attach()
        with self.engine.coalesce_grad_reduction() if self.zero_stage > 1 else contextlib.nullcontext():
            yield
            self._complete()
            with torch.no_grad():
                gradients = [self._accumulated(parameter) for parameter in self.stage.parameters()]
                self.gradient_norms = torch.stack(torch._foreach_norm(gradients))
                if self._loss is not None:
                    _poison_if_nonfinite(gradients[0].view(-1)[:1], self._loss)
                    self._loss = None
            sum_shared_gradients(self.stage, self.topology, self._accumulated)

    def skip_step_if_nonfinite(self, loss: torch.Tensor) -> None:
        """Called in `accumulation`: the step is to be skipped, by all ranks, if this rank's `loss` is not finite."""
        self._loss = loss.detach()

    def step(self) -> float:
        """Average gradients over data-parallel ranks, clip, update, clear. Returns the norm before clipping.

        If that is not finite the step is skipped: nothing of the optimizer's state and no weight changes, on any rank.
        The norm is of all ranks' gradients, so all decide alike and nothing more is sent. DeepSpeed does that in every
        optimizer we use: a look at the norm before anything is stepped, as for float16's overflows. (0.19.8: `overflow`
        in stage_1_and_2.py step, stage3.py step, bf16_optimizer.py step.)
        """
        norm = self._average_and_clip() if self._clip_here else None
        self.engine.step()
        return norm if norm is not None else float(self.engine.get_global_grad_norm())

    def gathered_parameters(self, parameters: list[torch.nn.Parameter] | None = None) -> AbstractContextManager:
        """Inside, these parameters are whole, by default every one of this stage; all ranks call it together."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters or list(self.stage.parameters()))

    def _complete(self) -> None:
        """Gradients of zero for parameters that had no part in this step, such as the pass norm's where N is 1.

        DeepSpeed leaves out what has no gradient. Where other ranks have one (an output head, but no loss token here),
        their messages no longer match at stages 1 and 2, in bf16 their norms; stage 3 takes the step before's.
        """
        unused = list(self._unused)
        if unused:
            with self.gathered_parameters(unused):
                torch.autograd.backward(unused, [torch.zeros_like(parameter) for parameter in unused])

    def _accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Where DeepSpeed adds up this parameter's gradient: in float32."""
        for name in ("_hp_grad", "grad_accum", "grad"):
            gradient = getattr(parameter, name, None)
            if gradient is not None:
                return gradient
        raise AssertionError("every parameter has a gradient by now")

    def _average_and_clip(self) -> float:
        parameters = [p for group in self._groups for p in group if p.grad is not None]
        gradients = [p.grad for p in parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        self.topology.all_reduce_over_data(flat).div_(self.topology.dp_size)
        averaged = torch._utils._unflatten_dense_tensors(flat, gradients)
        own = [g for p, g in zip(parameters, averaged, strict=True) if not getattr(p, "ds_pipe_replicated", False)]
        squares = torch.stack([g.pow(2).sum() for g in own]).sum()  # tensor-parallel Muon does not exist
        dist.all_reduce(squares, group=self.topology.groups.pp)
        norm = squares.sqrt()
        # Muon's update would be finite, and a step made, where only the norm is too large for float32.
        _poison_if_nonfinite(flat, norm)
        if self.clip:
            flat *= torch.clamp(self.clip / (norm + 1e-6), max=1.0)
        for gradient, new in zip(gradients, averaged, strict=True):
            gradient.copy_(new)
        return float(norm)

    def fragment(self, parameter: torch.nn.Parameter) -> Fragment | None:
        """Where this rank keeps master weights and optimizer states of a parameter; None if it has nothing of it."""
        if self.zero_stage < 3:
            found = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if found is None:
                return None
            own, where = found.lp_fragment_address, found.hp_fragment_address
            return Fragment(found.param_group_index, where.start, own.start, own.start + own.numel)
        partition, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)][:3]
        start = self.topology.dp_rank * size  # all ranks have as much; the last ones' is partly padding
        stop = min(start + size, parameter.ds_numel)  # type: ignore[attr-defined]  # DeepSpeed's
        return Fragment(partition, offset, start, stop) if start < stop else None

    def values(self, parameter: torch.nn.Parameter, fragment: Fragment) -> dict[str, tuple[int, torch.Tensor]]:
        """What this rank keeps of a parameter: `master` float32 and the optimizer's states by name.

        Each is a view [n] of a stretch of the flattened shard, with where that begins: the fragment, and of float32 Muon's
        momentum the whole matrix, which is the same on all ranks that have a part of the matrix.
        """
        partition = self._partitions()[fragment.partition]
        kinds = {name: value for name, value in self._state(partition).items() if _is_flat(value)}
        found = {}
        for name, value in {MASTER: partition.detach(), **kinds}.items():
            if name != MASTER and self._keeps_whole_matrices(fragment.partition):
                offset = self._offset_of_matrix(parameter, fragment.partition)
                found[name] = (0, value.narrow(0, offset, parameter.numel()))
            else:
                assert value.shape == partition.shape
                found[name] = (fragment.start, value.narrow(0, fragment.offset, fragment.size))
        return found

    def group_of(self, partition: int) -> int:
        """The optimizer's parameter group of a partition: stage 3 cuts large groups into several."""
        return self.zero.sub_group_to_group_id[partition] if self.zero_stage == 3 else partition

    def groups(self) -> list[dict]:
        """By parameter group: the names of the states that are as large as the weights, and the others, step counters.

        A counter is given as [value, whether the optimizer keeps it as a tensor].
        """
        found: list[dict] = [{"kinds": [], "scalars": {}} for _ in self._groups]
        for index, partition in enumerate(self._partitions()):
            state = self._state(partition)
            found[self.group_of(index)] = {
                "kinds": sorted(name for name, value in state.items() if _is_flat(value)),
                "scalars": {n: [float(v), torch.is_tensor(v)] for n, v in state.items() if not _is_flat(v)},
            }
        return found

    def restore_groups(self, groups: list[dict]) -> None:
        """Recreate the states listed in `groups`; tensors start at zero."""
        for index, partition in enumerate(self._partitions()):
            told, state = groups[self.group_of(index)], self._state(partition)
            state.clear()
            size = partition.numel()
            if self._keeps_whole_matrices(index):
                size = sum(parameter.numel() for parameter in self.zero.params_in_partition[index])
            for name in told["kinds"]:
                state[name] = partition.new_zeros(size)
            for name, (value, is_tensor) in told["scalars"].items():
                # On the device: a fused optimizer wants its counter there.
                state[name] = torch.tensor(value, device=partition.device) if is_tensor else int(value)
        if self.zero_stage < 3:  # DeepSpeed keeps views of the states, which have just been replaced
            self.zero._hp_optimizer_states_linked = False

    def adopt_masters(self) -> None:
        """Make the model's weights those of the master weights."""
        if self.zero_stage < 3:
            self.zero.update_lp_params()
            return
        for group in range(len(self._partitions())):  # DeepSpeed does this after every step
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def _partitions(self) -> list[torch.nn.Parameter]:
        if self.zero_stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.zero.optimizer.param_groups]

    def _keeps_whole_matrices(self, partition: int) -> bool:
        """DeepSpeed's float32 Muon keeps the momentum of all matrices of which a partition has a part, one by one."""
        return self._clip_here and self.zero.optimizer.param_groups[partition]["use_muon"]

    def _offset_of_matrix(self, parameter: torch.nn.Parameter, partition: int) -> int:
        offset = 0
        for other in self.zero.params_in_partition[partition]:
            if other is parameter:
                return offset
            offset += other.numel()
        raise AssertionError("a matrix of which there is a fragment is in the partition")

    def _state(self, partition: torch.nn.Parameter) -> dict:
        return self.zero.optimizer.state[partition]


def _is_flat(value: object) -> bool:
    """Whether an optimizer's state is as large as the weights, and not a counter."""
    return torch.is_tensor(value) and value.ndim == 1


def _poison_if_nonfinite(gradient: torch.Tensor, witness: torch.Tensor) -> None:
    """Make `gradient` NaN, in place, if the scalar `witness` is not finite; else add zero. Nobody waits for the device."""
    gradient += (witness * 0).to(gradient.dtype)
