"""DeepSpeed ZeRO as the optimizer: splits its states over data-parallel ranks, averages gradients, clips, steps.

The model runs outside DeepSpeed's engine (engine.module), because a schedule calls backward once per segment and
micro-batch, and every weight takes part in each. Two settings make that legal: at stage 1
`managed_gradient_accumulation: false`, so that DeepSpeed's hooks only accumulate and all communication happens in
step(); at stages 2 and 3 `coalesce_grad_reduction` around all backward passes of a step.

ZeRO 2 shards the wrong thing here: every segment adds to every weight's gradient, so whole gradients are alive in
every backward pass. Peak live tensor bytes of a step, without parameters and optimizer, in full sets of float32
gradients (d=192, AGAG, two data-parallel ranks, four micro-batches of five segments, buckets of 50,000 elements):

                                               one pipeline stage   two
    stage 1                                                  2.58   2.69
    stage 2                                                  2.58   2.69
    stage 2, reduced after each micro-batch                  3.13   3.50
    stage 2, reduced after each segment                      3.18   3.56

So stage 2 is rejected with a pipeline, and no better than stage 1 elsewhere.
"""

import contextlib
import gc
import io
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.distributed as dist

from powernap.model.stage import HybridStage
from powernap.parallel.muon import MOMENTUM, orthogonalised
from powernap.parallel.schedule import sum_shared_gradients
from powernap.parallel.topology import Topology
from powernap.parallel.zero.engine import ModelParallelUnit, engine_config, registered
from powernap.parallel.zero.fragment import EMA, MASTER, Fragment
from powernap.parallel.zero.gradients import Gradients, matrices_of_blocks, poison_if_nonfinite, sum_of_squares
from powernap.parallel.zero.unrounded import Unrounded, keep_unrounded, mixers_of


class ZeroOptimizer:
    """One ZeRO engine around a stage.

    Args:
        stage: the module; its trained parameters become views into DeepSpeed's flat buffers; all are bf16 with that precision.
        optimizer: over the stage's trained parameters, updating one flat float32 partition per parameter group. Every rank must
            have the same number of groups, none of them empty: the gradient norm is summed group by group. A parameter that
            is not the stage's is a placeholder in a group that would be.
        precision: "bf16" keeps float32 master weights and accumulates gradients in float32.
        clip: largest global gradient norm, 0 for no clipping.
        zero_stage: 1 splits optimizer states over data-parallel ranks, 2 gradients too, 3 parameters too.
        offload: keep the optimizer's states in host memory and step there.
        ema: keep a running mean of the master weights among the optimizer's states: m = ema m + (1 - ema) w after each step,
            from w after the first. None: none.
        compare_ranks: compute `mean_square_norm` in every step.
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
        ema: float | None = None,
        compare_ranks: bool = False,
    ):
        gc.freeze()  # DeepSpeed collects garbage dozens of times at startup: skip all that is imported by now
        self.topology = topology
        self.stage = stage
        self.clip = clip
        self.zero_stage = zero_stage
        self.ema = ema
        self.compare_ranks = compare_ranks
        self.mean_square_norm: float | None = None  # of the data ranks' gradients of the last step, before averaging
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._unused: dict[torch.nn.Parameter, None] = {}  # so far in this step, in order
        self._loss: torch.Tensor | None = None
        # [trained parameters of the stage], on the device, float32: norms of what this rank alone accumulated in the last step.
        self.gradient_norms: torch.Tensor | None = None
        self._trained = [p for p in stage.parameters() if p.requires_grad]
        self._placeholders = [p for group in self._groups for p in group if all(p is not own for own in self._trained)]
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(lambda parameter: self._unused.pop(parameter, None))
        if stage.holds_tied_copy:
            assert stage.embedding is not None
            stage.embedding.weight.ds_pipe_replicated = True  # the first stage counts it in the gradient norm
        # Muon's update is that of the averaged, clipped gradient, and ZeRO is given the update: we average and clip first.
        self._has_muon = any(group.get("muon") for group in optimizer.param_groups)
        config = engine_config(
            self._updated,
            topology.device,
            precision,
            0.0 if self._has_muon else clip,
            micro_batch_size,
            zero_stage,
            offload,
        )
        if precision == "bf16":
            keep_unrounded(stage)
        import deepspeed  # late: it reads the environment that init_distributed prepares

        deepspeed.logger.setLevel(logging.ERROR)
        with (
            contextlib.redirect_stdout(io.StringIO()),  # its bf16 optimizer prints memory tables
            registered(stage, self._placeholders),
        ):
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=stage,
                optimizer=optimizer,
                config=config,
                mpu=ModelParallelUnit(topology.groups) if topology.tp_size * topology.pp_size > 1 else None,
            )
        if precision == "bf16":
            adds_itself = hasattr(self.zero, "_update_hp_grad")  # BF16_Optimizer: stage 1 without offloading
            added_as_they_are = matrices_of_blocks(stage) if adds_itself else set()
            for parameter in self._updated:
                if parameter not in added_as_they_are:
                    parameter.grad_dtype = torch.float32  # autograd sums several uses in a segment
            if adds_itself:
                self.zero._update_hp_grad = self._add_gradient
        has_unrounded = precision == "bf16" and any(mixer.unrounded for mixer in mixers_of(stage))
        self._unrounded = Unrounded(stage, self) if has_unrounded else None
        if self._unrounded:
            self._unrounded.to_masters()
        self._gradients = Gradients(self.zero) if precision == "fp32" and zero_stage == 1 else None
        self._alone = self._gradients is not None and topology.dp_size == 1 and not (offload or self._has_muon)
        if self._gradients and not offload:
            self._make_weights_their_masters()
        if zero_stage == 3 and stage.model.tie_embeddings:
            assert stage.embedding is not None
            deepspeed.zero.register_external_parameter(stage.output_layer, stage.embedding.weight)
        self._holders = self._count_holders() if self._has_muon else {}
        self._norm: float | None = None  # before clipping, if it is computed here

    @property
    def param_groups(self) -> list[dict]:
        return self.zero.param_groups

    @property
    def parameter_groups(self) -> list[list[torch.nn.Parameter]]:
        """The stage's trained parameters by optimizer group."""
        return self._groups

    @property
    def _updated(self) -> list[torch.nn.Parameter]:
        """All that the optimizer updates."""
        return [*self._trained, *self._placeholders]

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Wraps all backward passes of a step; after it every rank's gradients are complete except for averaging."""
        self._unused = dict.fromkeys(self._updated)
        if self._gradients:
            self._gradients.attach()
        with self.engine.coalesce_grad_reduction() if self.zero_stage > 1 else contextlib.nullcontext():
            yield
            self._complete()
            with torch.no_grad():
                gradients = [self._accumulated(parameter) for parameter in self._updated]
                self.gradient_norms = torch.stack(torch._foreach_norm(gradients))[: len(self._trained)]
                if self._loss is not None:
                    poison_if_nonfinite(gradients[0].view(-1)[:1], self._loss)
                    self._loss = None
            sum_shared_gradients(self.stage, self.topology, self._accumulated)
            if self.compare_ranks:
                squares = self._squares({p: self._accumulated(p) for p in self._updated}).sum()
                dist.all_reduce(squares)
                self.mean_square_norm = float(squares) / self.topology.dp_size
            if self._has_muon and self.zero_stage == 2:  # gradients are reduced as soon as this context ends
                self._norm = self._update_matrices()

    def skip_step_if_nonfinite(self, loss: torch.Tensor) -> None:
        """Call in `accumulation`: all ranks skip the step if this rank's `loss` is not finite."""
        self._loss = loss.detach()

    def step(self) -> float:
        """Average gradients over data-parallel ranks, clip, update, clear. Returns the norm before clipping.

        If that is not finite the step is skipped: no weight and no optimizer state changes, on any rank. The norm
        covers all ranks' gradients, so all decide alike without further communication. DeepSpeed does that in every
        optimizer we use: it checks the norm before it updates anything, as for float16's overflows. (0.19.8: `overflow`
        in stage_1_and_2.py step, stage3.py step, bf16_optimizer.py step.)
        """
        if self._alone:
            self._norm = self._step_alone()
        else:
            if self._has_muon and self.zero_stage == 1:
                self._norm = self._update_matrices()
            self.engine.step()
        if self._unrounded:
            self._unrounded.from_masters()
        norm = self._norm if self._norm is not None else float(self.engine.get_global_grad_norm())
        if self.ema is not None and math.isfinite(norm):
            self._average_weights(1 - self.ema)
        return norm

    @torch.no_grad()
    def _average_weights(self, share: float) -> None:
        for partition in self._partitions():
            state = self._state(partition)
            if EMA in state:
                state[EMA].lerp_(partition, share)
            else:
                state[EMA] = partition.detach().clone()

    def gathered_parameters(self, parameters: list[torch.nn.Parameter] | None = None) -> AbstractContextManager:
        """Inside, these parameters, by default all of this stage, are gathered; all ranks call it together."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters or list(self.stage.parameters()))

    def _complete(self) -> None:
        """Give parameters without a part in this step, such as the pass norm with N = 1, zero gradients.

        DeepSpeed skips parameters without a gradient. If other ranks have one (an output head, but no loss token here),
        messages no longer match at stages 1 and 2, nor norms in bf16; stage 3 takes the previous step's gradient.
        """
        unused = list(self._unused)
        if unused:
            with self.gathered_parameters(unused):
                torch.autograd.backward(unused, [torch.zeros_like(parameter) for parameter in unused])

    @torch.no_grad()
    def _add_gradient(self, parameter: torch.nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """In place of DeepSpeed's, to the same bits: without a float32 copy of a bfloat16 gradient, which every segment has.

        A gradient is written, read and added to a sum that is read and written: 12 bytes a parameter, where it was 20.
        """
        if parameter.grad is None:
            return
        total = self.zero.fp32_groups_gradients[group][index]
        assert not clear_lp_grads  # whoever adds immediately drops it
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total  # type: ignore[attr-defined]  # DeepSpeed's
        self.zero.fp32_groups_has_gradients[group][index] = True

    def _accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The tensor in which DeepSpeed accumulates this parameter's gradient, in float32."""
        for name in ("_hp_grad", "grad_accum", "grad"):
            gradient = getattr(parameter, name, None)
            if gradient is not None:
                return gradient
        raise AssertionError("every parameter has a gradient by now")

    def _step_alone(self) -> float:
        """Stage 1 in float32 where one data-parallel rank has everything, with the same results as DeepSpeed's step, which
        copies all gradients four times on their way to the optimizer and converts them to float64 as wholes."""
        assert self._gradients
        norm = self._norm_of(self._gradients.attached())
        if finite := bool(norm.isfinite()):
            self.zero.unscale_and_clip_grads(self._gradients.flat, norm)
            for partition, gradient in zip(self._partitions(), self._gradients.flat, strict=True):
                partition.grad = gradient
            self.zero.optimizer.step()
            self.zero.optimizer.zero_grad()
        self.zero.zero_grad()
        return float(norm) if finite else float("inf")

    def _norm_of(self, gradients: dict[torch.nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """The norm of whole gradients over tensor and pipeline ranks, with DeepSpeed's rounding."""
        squares = self._squares(gradients)
        dist.all_reduce(squares, group=self.topology.groups.mp)
        return torch.linalg.vector_norm(squares.sqrt())

    def _squares(self, gradients: dict[torch.nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """[groups], float32: this rank's squared norms, summed in float64; what several ranks of a model hold counts once."""
        return torch.stack(
            [
                sum_of_squares([gradients[p] for p in group if self._counts(p)], self.topology.device)
                for group in self._groups
            ]
        )

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return self.topology.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)

    def _average_and_clip(self) -> float:
        parameters = [p for group in self._groups for p in group]
        gradients = [self._accumulated(p) for p in parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        self.topology.all_reduce_over_data(flat).div_(self.topology.dp_size)
        averaged = torch._utils._unflatten_dense_tensors(flat, gradients)
        norm = self._norm_of(dict(zip(parameters, averaged, strict=True)))
        # If only the norm overflows float32, Muon's update would still be finite and the step would run.
        poison_if_nonfinite(flat, norm)
        if self.clip:
            flat *= torch.clamp(self.clip / (norm + 1e-6), max=1.0)
        for gradient, new in zip(gradients, averaged, strict=True):
            gradient.copy_(new)
        return float(norm)

    def _make_weights_their_masters(self) -> None:
        """DeepSpeed would step a copy of weights that are float32 already."""
        for weights, partition in zip(self.zero.parallel_partitioned_bit16_groups, self._partitions(), strict=True):
            partition.data = weights[self.topology.dp_rank].data
        self.zero._link_all_hp_params()

    @torch.no_grad()
    def _update_matrices(self) -> float:
        """Average and clip all gradients; in place of those of Muon's matrices put their updates. Returns the norm before clipping.

        A matrix is orthogonalised by the data ranks that step a part of it, alike by all its tensor ranks; the others give
        zeros, so that ZeRO's average over data ranks is the update.
        """
        norm = self._average_and_clip()
        if not math.isfinite(norm):
            return norm
        for index, group in enumerate(self.zero.optimizer.param_groups):
            if not group.get("muon"):
                continue
            state, partition = self._state(group["params"][0]), group["params"][0]
            own = self._own_matrices(index)
            if MOMENTUM not in state:
                state[MOMENTUM] = partition.new_zeros(sum(parameter.numel() for parameter in own))
            moments = dict(zip(own, state[MOMENTUM].split([parameter.numel() for parameter in own]), strict=True))
            for parameter in self._groups[index]:
                gradient = self._accumulated(parameter).view(parameter.shape)  # flat in DeepSpeed's bf16 optimizer
                if parameter not in moments:
                    gradient.zero_()
                    continue
                kept = moments[parameter].view_as(gradient)
                momentum = kept.to(gradient.device)
                update = orthogonalised(gradient, momentum, group["momentum"], parameter, self.topology)
                kept.copy_(momentum)
                gradient.copy_(update).mul_(self.topology.dp_size / self._holders[parameter])
        return norm

    def _own_matrices(self, group: int) -> list[torch.nn.Parameter]:
        """Those of a group of which this rank steps a part."""
        return [parameter for parameter in self._groups[group] if self.fragment(parameter) is not None]

    def _count_holders(self) -> dict[torch.nn.Parameter, int]:
        """Data ranks that step a part of each parameter."""
        parameters = [p for group in self._groups for p in group]
        held = self.topology.all_gather_over_data([self.fragment(p) is not None for p in parameters])
        return {p: sum(flags) for p, *flags in zip(parameters, *held, strict=True)}

    def fragment(self, parameter: torch.nn.Parameter) -> Fragment | None:
        """Location of this rank's master weights and optimizer states of a parameter; None if it has none.

        Of a frozen parameter, without either, the part that this rank writes into a checkpoint: it may be empty.
        """
        if not parameter.requires_grad:
            return self._frozen_part(parameter)
        if self.zero_stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if mapping is None:
                return None
            in_shard, in_partition = mapping.lp_fragment_address, mapping.hp_fragment_address
            return Fragment(
                mapping.param_group_index, in_partition.start, in_shard.start, in_shard.start + in_shard.numel
            )
        partition, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)][:3]
        start = self.topology.dp_rank * size  # the same size on all ranks; the last ones' is partly padding
        stop = min(start + size, parameter.ds_numel)  # type: ignore[attr-defined]  # DeepSpeed's
        return Fragment(partition, offset, start, stop) if start < stop else None

    def values(self, parameter: torch.nn.Parameter, fragment: Fragment) -> dict[str, tuple[int, torch.Tensor]]:
        """This rank's values of a parameter by name: float32 `master` and the optimizer's states.

        Each is (start, view [n]) of a range of the flattened shard: the fragment, or for Muon's momentum the whole matrix,
        which is the same on all ranks that have a part of the matrix. The `master` of a frozen parameter is the parameter
        itself: what this rank holds of it.
        """
        if not parameter.requires_grad:
            held = getattr(parameter, "ds_tensor", None)
            if held is None:
                return {MASTER: (0, parameter.detach().view(-1))}
            return {MASTER: (fragment.start, held.detach().view(-1)[: fragment.size])}
        partition = self._partitions()[fragment.partition]
        states = {name: value for name, value in self._state(partition).items() if _is_flat(value)}
        views = {}
        for name, value in {MASTER: partition.detach(), **states}.items():
            if name not in (MASTER, EMA) and self._keeps_whole_matrices(fragment.partition):
                offset = self._offset_of_matrix(parameter, fragment.partition)
                views[name] = (0, value.narrow(0, offset, parameter.numel()))
            else:
                assert value.shape == partition.shape
                views[name] = (fragment.start, value.narrow(0, fragment.offset, fragment.size))
        return views

    def group_of(self, partition: int) -> int:
        """The optimizer's parameter group of a partition: stage 3 splits large groups into several."""
        return self.zero.sub_group_to_group_id[partition] if self.zero_stage == 3 else partition

    def groups(self) -> list[dict]:
        """Per parameter group: the names of the states as large as the weights, and the others, step counters.

        A counter is [value, whether the optimizer keeps it as a tensor].
        """
        groups: list[dict] = [{"kinds": [], "scalars": {}} for _ in self._groups]
        for index, partition in enumerate(self._partitions()):
            state = self._state(partition)
            groups[self.group_of(index)] = {
                "kinds": sorted(name for name, value in state.items() if _is_flat(value)),
                "scalars": {n: [float(v), torch.is_tensor(v)] for n, v in state.items() if not _is_flat(v)},
            }
        return groups

    def restore_groups(self, groups: list[dict]) -> None:
        """Recreate the states listed in `groups`; tensors start at zero."""
        for index, partition in enumerate(self._partitions()):
            saved, state = groups[self.group_of(index)], self._state(partition)
            state.clear()
            for name in saved["kinds"]:
                if name == EMA and self.ema is None:
                    continue
                size = partition.numel()
                if name != EMA and self._keeps_whole_matrices(index):
                    size = sum(parameter.numel() for parameter in self._own_matrices(index))
                state[name] = partition.new_zeros(size)
            for name, (value, is_tensor) in saved["scalars"].items():
                # On the device: a fused optimizer expects its counter there.
                state[name] = torch.tensor(value, device=partition.device) if is_tensor else int(value)
        if self.zero_stage < 3:  # DeepSpeed keeps views of the states, which have just been replaced
            self.zero._hp_optimizer_states_linked = False

    def adopt_masters(self) -> None:
        """Set the model's weights from the master weights."""
        if self.zero_stage < 3:
            self.zero.update_lp_params()
        else:
            for group in range(len(self._partitions())):  # DeepSpeed does this after every step
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._unrounded:
            self._unrounded.from_masters()

    def _frozen_part(self, parameter: torch.nn.Parameter) -> Fragment:
        count, held = getattr(parameter, "ds_numel", parameter.numel()), getattr(parameter, "ds_tensor", None)
        share = -(-count // self.topology.dp_size) if held is None else held.numel()
        start = min(self.topology.dp_rank * share, count)
        return Fragment(-1, 0, start, min(start + share, count))

    def _partitions(self) -> list[torch.nn.Parameter]:
        if self.zero_stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.zero.optimizer.param_groups]

    def _keeps_whole_matrices(self, partition: int) -> bool:
        """Muon keeps the whole momentum of each matrix with a part in a partition, one by one."""
        return self._has_muon and self.zero.optimizer.param_groups[partition]["muon"]

    def _offset_of_matrix(self, parameter: torch.nn.Parameter, partition: int) -> int:
        offset = 0
        for other in self._own_matrices(partition):
            if other is parameter:
                return offset
            offset += other.numel()
        raise AssertionError("a matrix of which there is a fragment is in the partition")

    def _state(self, partition: torch.nn.Parameter) -> dict:
        return self.zero.optimizer.state[partition]


def _is_flat(value: object) -> bool:
    """Whether an optimizer's state is as large as the weights, and not a counter."""
    return torch.is_tensor(value) and value.ndim == 1
