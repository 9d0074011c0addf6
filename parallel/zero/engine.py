"""What DeepSpeed's engine is given: its config, the process grid, and parameters of the tied head and the like."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from powernap.model.megatron import ProcessGroupCollection
from powernap.parallel.planning.memory import REDUCE_BUCKET


def engine_config(
    trained: list[torch.nn.Parameter],
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    clip: float,
    micro_batch_size: int,
    zero_stage: int,
    offload: bool,
) -> dict[str, Any]:
    """DeepSpeed's config."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False, "reduce_bucket_size": _bucket_size(trained)}
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
        # Its buffer for gradient reduction: in float32 a second full set, alive in all backward passes; at bf16 stage 2
        # it would be bf16.
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


def _bucket_size(trained: list[torch.nn.Parameter]) -> int:
    """No more than the model needs: DeepSpeed allocates a whole bucket in every step, 2 GB to page in for a tiny model."""
    return min(REDUCE_BUCKET, sum(getattr(p, "ds_numel", p.numel()) for p in trained))


class ModelParallelUnit:
    """The process grid under the names that DeepSpeed expects.

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


@contextlib.contextmanager
def registered(stage: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the stage owns these parameters too: DeepSpeed converts and names what its module owns."""
    names = [f"placeholder_{number}" for number in range(len(parameters))]
    for name, parameter in zip(names, parameters, strict=True):
        stage.register_parameter(name, parameter)
    yield
    for name in names:
        delattr(stage, name)
