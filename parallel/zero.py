"""DeepSpeed ZeRO as the optimizer: splits optimizer states over data-parallel ranks, averages gradients, clips, steps.

The model runs outside DeepSpeed's engine (engine.module), because a schedule calls backward once per segment and
micro-batch. `managed_gradient_accumulation: false` makes that legal: DeepSpeed's hooks only accumulate, all
communication happens in step().
"""

import contextlib
import io
import logging
from typing import Literal

import torch

from powernap.parallel.topology import Topology

# Elements that gradients travel in at a time: DeepSpeed's default.
REDUCE_BUCKET = 500_000_000


def _bucket_size(stage: torch.nn.Module) -> int:
    """No more than the model needs: DeepSpeed allocates a whole bucket in every step, 2 GB to page in for a tiny model."""
    return min(REDUCE_BUCKET, sum(p.numel() for p in stage.parameters()))


class ZeroOptimizer:
    """One ZeRO-1 engine around a stage.

    Args:
        stage: the module; its parameters become views into DeepSpeed's flat buffers, bf16 if asked.
        optimizer: over the stage's parameters, stepping one flat float32 partition per parameter group.
        precision: "bf16" keeps float32 master weights and accumulates gradients in float32.
        clip: largest global gradient norm, 0 for no clipping.
    """

    def __init__(
        self,
        stage: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        topology: Topology,
        *,
        precision: Literal["fp32", "bf16"],
        clip: float,
        micro_batch_size: int,
    ):
        self.topology = topology
        self.clip = clip
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        # DeepSpeed's float32 ZeRO-1 turns a matrix's gradient into Muon's update before it takes the norm: the norm and
        # the clipping would be of updates. So there we average and clip ourselves first. Its bf16 optimizer has the
        # right order. (0.19.8: stage_1_and_2.py get_flat_partition, bf16_optimizer.py step.)
        self._clip_here = precision == "fp32" and any(group.get("use_muon") for group in optimizer.param_groups)
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if self._clip_here else clip,
            "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": _bucket_size(stage)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if precision == "bf16":
            config["bf16"] = {"enabled": True, "immediate_grad_update": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        import deepspeed  # late: it looks at the environment that topology.initialize prepares

        deepspeed.logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self.engine, self.zero, _, _ = deepspeed.initialize(model=stage, optimizer=optimizer, config=config)

    @property
    def param_groups(self) -> list[dict]:
        return self.zero.param_groups

    def step(self) -> float:
        """Average gradients over data-parallel ranks, clip, update, clear. Returns the norm before clipping."""
        norm = self._average_and_clip() if self._clip_here else None
        self.engine.step()
        return norm if norm is not None else float(self.engine.get_global_grad_norm())

    def _average_and_clip(self) -> float:
        gradients = [p.grad for group in self._groups for p in group if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(gradients)
        self.topology.sum_over_data(flat).div_(self.topology.data_size)
        norm = flat.norm()
        if self.clip:
            flat *= torch.clamp(self.clip / (norm + 1e-6), max=1.0)
        for gradient, averaged in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(averaged)
        return float(norm)

    def state_dict(self) -> dict:
        """This rank's share: float32 master partitions and the optimizer's state for each parameter group."""
        return {"partitions": [p.detach().clone() for p in self._partitions()], "state": self._base_state()}

    def load_state_dict(self, saved: dict) -> None:
        """Take up what `state_dict` gave on the same rank of the same number of ranks."""
        for group, (partition, values) in enumerate(zip(self._partitions(), saved["partitions"], strict=True)):
            partition.data.copy_(values)
            # A copy, on the device, except for step counters, which stay where the optimizer keeps them.
            self.zero.optimizer.state[partition] = {
                key: value.clone() if torch.is_tensor(value) else value for key, value in saved["state"][group].items()
            }
        self.zero.update_lp_params()

    def _partitions(self) -> list[torch.nn.Parameter]:
        return [group["params"][0] for group in self.zero.optimizer.param_groups]

    def _base_state(self) -> list[dict]:
        return [dict(self.zero.optimizer.state.get(partition, {})) for partition in self._partitions()]
