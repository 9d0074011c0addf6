"""The MLP that follows each block's mixer. Nothing here imports torch before a module is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from powernap.model.part import FP32, Device, Part, Weight

if TYPE_CHECKING:
    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.megatron import ModuleSpec


class SwiGLU(Part):
    """Megatron-core's MLP: gate and up in one matrix, SiLU (arXiv 2002.05202)."""

    section: ClassVar[str] = "mlp"

    ffn_hidden_size: int = Field(ge=1, description="width inside the SwiGLU MLP")

    def split_sizes(self) -> dict[str, int]:
        return {"ffn_hidden_size": self.ffn_hidden_size}

    def weights(self, model: ModelConfig) -> list[Weight]:
        return [
            Weight(
                "linear_fc1.weight",
                (2 * self.ffn_hidden_size, model.hidden_size),
                split=0,
                projections=(self.ffn_hidden_size, self.ffn_hidden_size),
            ),
            Weight("linear_fc2.weight", (model.hidden_size, self.ffn_hidden_size), split=1),
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        return 0 if state_only else 6 * model.hidden_size * self.ffn_hidden_size

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Gate and up, SiLU of the gate, and the product; in one kernel no SiLU."""
        in_kernel = device == "cuda" and number < FP32
        return 0 if state_only else (3 if in_kernel else 4) * self.ffn_hidden_size * number

    def transformer_config(self) -> dict[str, Any]:
        """Its fields of Megatron-core's TransformerConfig."""
        import torch.nn.functional as F

        return {
            "ffn_hidden_size": self.ffn_hidden_size,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "use_te_activation_func": True,  # a module of ours in the place of Transformer Engine's
        }

    def module_spec(self, model: ModelConfig, sleep: SleepConfig, block: int) -> ModuleSpec:
        from powernap.model.megatron import MLP, ColumnParallelLinear, MLPSubmodules, ModuleSpec, RowParallelLinear
        from powernap.model.swiglu import GateAndUp

        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, activation_func=GateAndUp, linear_fc2=RowParallelLinear)
        return ModuleSpec(module=MLP, submodules=parts)
