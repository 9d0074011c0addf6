"""The block stack on Megatron-core: layers whose fast weights go in and come out."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from powernap.model.attention import WindowAttention
from powernap.model.config import GATED_DELTA_NET
from powernap.model.fast_weights import FastWeights
from powernap.model.gated_delta_net import GatedDeltaNet
from powernap.model.norm import RMSNorm
from powernap.model.window import Window


class HybridLayer(TransformerLayer):
    """Megatron-core's layer (construction, numbering, checkpoint names) around a mixer that may own fast weights."""

    @property
    def has_state(self) -> bool:
        return isinstance(self.self_attention, GatedDeltaNet)

    def forward(self, hidden_states: torch.Tensor, state: torch.Tensor | None, window: Window):
        """norm -> mixer -> residual, norm -> MLP -> residual.

        Args:
            hidden_states: [L, B, D].
            state: [B, heads/TP, d_k, d_v] for a gated-delta-net layer, else None.

        Returns:
            (hidden_states, state), both new.
        """
        normed = self.input_layernorm(hidden_states)
        if self.has_state:
            mixed, state = self.self_attention(normed, state, window)
        else:
            mixed = self.self_attention(normed, window)
        hidden_states = hidden_states + mixed
        output, _ = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + output, state

    def write(self, hidden_states: torch.Tensor, state: torch.Tensor, window: Window) -> torch.Tensor:
        """Only the new state: what a layer must still do when nobody reads its output."""
        _, state = self.self_attention(self.input_layernorm(hidden_states), state, window, need_output=False)
        return state


class HybridBlock(TransformerBlock):
    """The layers of one stage; builds, numbers and saves them as Megatron-core does, runs any range of them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        fast_weights: FastWeights,
        window: Window,
        layers: range,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, FastWeights]:
        """Run `layers` (indices into this stage) once.

        Args:
            hidden_states: [L, B, D].
            fast_weights: one state for each gated-delta-net layer of this stage, in order.
            write_only: the hidden states are not needed: stop inside the last gated-delta-net layer of `layers`.

        Returns:
            (hidden_states or None if write_only, fast_weights of the whole stage)
        """
        states = dict(zip(self.layers_with_state, fast_weights, strict=True))
        last_write = max((i for i in layers if i in states), default=None) if write_only else None
        for index in layers:
            if index == last_write:
                states[index] = self.layers[index].write(hidden_states, states[index], window)
                hidden_states = None
                break
            hidden_states, state = self.layers[index](hidden_states, states.get(index), window)
            if state is not None:
                states[index] = state
        return hidden_states, tuple(states.values())

    @property
    def layers_with_state(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.has_state]


def block_submodules(pattern: str) -> TransformerBlockSubmodules:
    """Megatron-core's description of the layers in `pattern`."""
    return TransformerBlockSubmodules(layer_specs=[_layer_spec(kind) for kind in pattern], layer_norm=RMSNorm)


def _layer_spec(kind: str) -> ModuleSpec:
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=HybridLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=GatedDeltaNet if kind == GATED_DELTA_NET else WindowAttention),
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
        ),
    )
