"""The block stack on Megatron-core: layers whose fast weights and caches go in and come out."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from powernap.model.config import GATED_DELTA_NET, ModelConfig, SleepConfig
from powernap.model.fast_weights import Memory, empty_cache, zero_state
from powernap.model.init import drawn_as
from powernap.model.mixers.attention import SlidingAttention, WindowAttention
from powernap.model.mixers.gated_delta_net import GatedDeltaNet
from powernap.model.norm import RMSNorm
from powernap.model.window import Reading, Window


class HybridLayer(TransformerLayer):
    """Megatron-core's layer (construction, numbering, checkpoint names) around a mixer that may carry a state."""

    def __init__(self, *args, block: int, **kwargs):
        """`block` counts from 0 over the whole model; Megatron's layer_number counts over this stage."""
        with drawn_as(f"block {block}"):
            super().__init__(*args, **kwargs)

    @property
    def has_state(self) -> bool:
        """Whether something crosses from segment to segment: fast weights, or keys and values."""
        return isinstance(self.self_attention, (GatedDeltaNet, SlidingAttention))

    def first_state(self, batch: int, like: torch.Tensor) -> torch.Tensor:
        """The state at the start of `batch` sequences."""
        mixer = self.self_attention
        if isinstance(mixer, GatedDeltaNet):
            return zero_state(batch, mixer.local_heads, mixer.key_dim, mixer.value_dim, like)
        return empty_cache(batch, mixer.local_heads, mixer.head_dim, like)

    def forward(self, hidden_states: torch.Tensor, state: torch.Tensor | None, window: Window):
        """norm -> mixer -> residual, norm -> MLP -> residual.

        Args:
            hidden_states: [L, B, D].
            state: [B, heads/TP, d_k, d_v] for a gated-delta-net layer, [2, B, heads/TP, n, head_dim] for sliding
                attention, else None.

        Returns:
            (hidden_states, state) after the window.
        """
        normed = self.input_layernorm(hidden_states)
        if self.has_state:
            mixed, state = self.self_attention(normed, state, window)
        else:
            mixed = self.self_attention(normed, window)
        return self._add(hidden_states, mixed), state

    def first_reading(self, batch: int, slots: int, like: torch.Tensor) -> Reading:
        """What `extend` starts from; `slots`: tokens that attention sees, those of the window and those before."""
        mixer = self.self_attention
        if isinstance(mixer, GatedDeltaNet):
            return mixer.first_reading(batch, like)
        return mixer.first_reading(batch, slots, like)

    def extend(self, hidden_states: torch.Tensor, reading: Reading, window: Window) -> torch.Tensor:
        """`forward` for a piece of a window: [n, B, D] -> [n, B, D], what the block must keep goes into `reading`."""
        return self._add(
            hidden_states, self.self_attention.extend(self.input_layernorm(hidden_states), reading, window)
        )

    def _add(self, hidden_states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + mixed
        output, _ = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + output

    def write(self, hidden_states: torch.Tensor, state: torch.Tensor, window: Window) -> torch.Tensor:
        """Only the new state: what a layer must still do when nobody reads its output."""
        _, state = self.self_attention(self.input_layernorm(hidden_states), state, window, need_output=False)
        return state


class HybridBlock(TransformerBlock):
    """The layers of one stage; builds, numbers and saves them as Megatron-core does, runs any range of them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: Memory,
        window: Window,
        layers: range,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, Memory]:
        """Run `layers` (indices into this stage) once.

        Args:
            hidden_states: [L, B, D].
            memory: one state for each layer of this stage that has one, in order.
            write_only: the hidden states are not needed: stop inside the last layer with a state of `layers`.

        Returns:
            (hidden_states or None if write_only, memory of the whole stage)
        """
        states = dict(zip(self.layers_with_state, memory, strict=True))
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

    def extend(self, hidden_states: torch.Tensor, readings: list[Reading], window: Window) -> torch.Tensor:
        """Read a piece of a window with all layers, one reading a layer: [n, B, D] -> [n, B, D]."""
        for layer, reading in zip(self.layers, readings, strict=True):
            hidden_states = layer.extend(hidden_states, reading, window)
        return hidden_states

    @property
    def layers_with_state(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.has_state]


def block_submodules(model: ModelConfig, sleep: SleepConfig, blocks: range) -> TransformerBlockSubmodules:
    """Megatron-core's description of the layers `blocks` of `model`."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(block, _mixer_spec(model, sleep, block)) for block in blocks], layer_norm=RMSNorm
    )


def _mixer_spec(model: ModelConfig, sleep: SleepConfig, block: int) -> ModuleSpec:
    if model.pattern[block] == GATED_DELTA_NET:
        return ModuleSpec(module=GatedDeltaNet, params={"block": block, "every_pass_writes": sleep.write == "every"})
    if sleep.eviction == "sliding":
        return ModuleSpec(module=SlidingAttention, params={"block": block, "reach": model.window})
    return ModuleSpec(module=WindowAttention)


def _layer_spec(block: int, mixer: ModuleSpec) -> ModuleSpec:
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=HybridLayer,
        params={"block": block},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=mixer,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
        ),
    )
