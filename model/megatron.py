"""The parts of Megatron-core that Powernap uses, imported in one place.

On import it builds its fused functions with torch.compile, which loads torch's whole compiler: seconds in every
process. Powernap uses none of them (`transformer_config` in stage.py), so torch.compile is a no-op during the import.
"""

from collections.abc import Callable
from typing import Any

import torch


def _unchanged(function: Callable | None = None, **_: Any) -> Callable:
    return _unchanged if function is None else function


_compile = torch.compile
torch.compile = _unchanged  # type: ignore[assignment]
try:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_pipelining_with_interleaving as interleaved_1f1b,
    )
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_pipelining_without_interleaving as one_f_one_b,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
finally:
    torch.compile = _compile

__all__ = [
    "MLP",
    "ColumnParallelLinear",
    "IdentityOp",
    "MLPSubmodules",
    "MegatronModule",
    "ModelType",
    "ModuleSpec",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "TransformerBlock",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "reduce_from_tensor_model_parallel_region",
    "interleaved_1f1b",
    "one_f_one_b",
    "parallel_state",
    "set_tensor_model_parallel_attributes",
    "tensor_parallel",
]
