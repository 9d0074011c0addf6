"""ZeRO 3 while a model is built."""

from collections.abc import Callable
from typing import Literal

import torch

from powernap.parallel.topology import Topology
from powernap.parallel.zero.unrounded import keep_unrounded


class EarlyPartition:
    """ZeRO 3 from the start: of each module that is built, this rank keeps its part alone, on the device.

    DeepSpeed would split a whole model that every rank holds when its engine starts.
    """

    def __init__(self, topology: Topology, precision: Literal["fp32", "bf16"]):
        self._group, self._dtype = topology.groups.dp, torch.bfloat16 if precision == "bf16" else torch.float32
        self._convert: Callable[..., None] | None = None

    def __call__(self, module: torch.nn.Module) -> None:
        if self._dtype == torch.bfloat16:
            keep_unrounded(module)
        module.to(self._dtype)
        parameters = list(module.parameters())
        if not parameters:
            return
        if self._convert:
            self._convert(param_list=parameters)
            return
        import deepspeed

        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        deepspeed.zero.Init(module, data_parallel_group=self._group, config_dict_or_path=config, dtype=self._dtype)
        self._convert = parameters[0].convert_to_zero_parameters  # type: ignore[attr-defined]  # DeepSpeed's
