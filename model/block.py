"""The block stack on Megatron-core: layers that take and return fast weights and caches."""

from collections.abc import Callable

import torch

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.dropout import Dropout
from powernap.model.fast_weights import LayerStates
from powernap.model.init import seeded_init
from powernap.model.megatron import (
    IdentityOp,
    ModuleSpec,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from powernap.model.norm import RMSNorm
from powernap.model.part import Cache
from powernap.model.recompute import call
from powernap.model.window import Window


class HybridLayer(TransformerLayer):
    """Megatron-core's layer (construction, numbering, checkpoint names) around a mixer that may carry a state."""

    def __init__(self, config, *args, block: int, norms: tuple[str, ...], built: Callable[..., None], **kwargs):
        """`block` counts from 0 over the whole model; Megatron's layer_number counts over this stage. norms: as
        `ModelConfig.block_norms` names them; built: as in HybridStage."""
        with seeded_init(f"block {block}"):
            super().__init__(config, *args, **kwargs)
        self.block = block
        for name in ("post_mixer_layernorm", "post_mlp_layernorm"):
            norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon) if name in norms else None
            self.add_module(name, norm)
        built(f"decoder.layers.{block}", self)

    def forward(self, hidden_states: torch.Tensor, state: torch.Tensor | None, window: Window):
        """norm -> mixer -> residual, norm -> MLP -> residual; norms after mixer and MLP in place of these, or besides.

        Args:
            hidden_states: [L, B, D].
            state: the tensor that the mixer hands from window to window; None if it has none.

        Returns:
            (hidden_states, state) after the window.
        """
        mixed, state = self.self_attention(self.input_layernorm(hidden_states), state, window)
        return self._add(hidden_states, mixed, window.dropout), state

    def decode(self, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        """`forward` for a chunk of a window: [n, B, D] -> [n, B, D]; updates `cache` for the next chunk."""
        return self._add(hidden_states, self.self_attention.decode(self.input_layernorm(hidden_states), cache, window))

    def _add(self, hidden_states: torch.Tensor, mixed: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
        mixed = self.post_mixer_layernorm(mixed) if self.post_mixer_layernorm else mixed
        mixed = dropout(mixed, self.block, "mixer") if dropout else mixed
        if isinstance(self.mlp, IdentityOp):
            return hidden_states + mixed
        if isinstance(self.pre_mlp_layernorm, RMSNorm):
            normed, hidden_states = self.pre_mlp_layernorm.of_sum(mixed, hidden_states)
        else:
            normed = hidden_states = hidden_states + mixed
        output, _ = self.mlp(normed)
        output = self.post_mlp_layernorm(output) if self.post_mlp_layernorm else output
        return hidden_states + (dropout(output, self.block, "mlp") if dropout else output)

    def write(self, hidden_states: torch.Tensor, state: torch.Tensor, window: Window) -> torch.Tensor:
        """Compute only the new state, for a layer whose output is unused."""
        _, state = self.self_attention(self.input_layernorm(hidden_states), state, window, need_output=False)
        return state


class HybridBlock(TransformerBlock):
    """The layers of one stage; builds, numbers and saves them as Megatron-core does, runs any range of them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_states: LayerStates,
        window: Window,
        layers: range,
        state_only: bool = False,
        run_part: Callable = call,
    ) -> tuple[torch.Tensor | None, LayerStates]:
        """Run `layers` (indices into this stage) once.

        Args:
            hidden_states: [L, B, D].
            layer_states: one state for each layer of this stage that has one, in order.
            state_only: the hidden states are unused: stop inside the last of `layers` that has a state.
            run_part: called with each layer and its arguments (model/recompute.py).

        Returns:
            (hidden_states or None if state_only, layer states of the whole stage)
        """
        states = dict(zip(self.layers_with_state, layer_states, strict=True))
        last_write = max((i for i in layers if i in states), default=None) if state_only else None
        for index in layers:
            if index == last_write:
                states[index] = run_part(self.layers[index].write, hidden_states, states[index], window)
                return None, tuple(states.values())
            hidden_states, state = run_part(self.layers[index], hidden_states, states.get(index), window)
            if state is not None:
                states[index] = state
        return hidden_states, tuple(states.values())

    def decode(self, hidden_states: torch.Tensor, caches: list[Cache], window: Window) -> torch.Tensor:
        """Run all layers on a chunk of a window, one cache per layer: [n, B, D] -> [n, B, D]."""
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden_states = layer.decode(hidden_states, cache, window)
        return hidden_states

    @property
    def layers_with_state(self) -> list[int]:
        """Indices of the layers that hand a tensor from window to window."""
        return [i for i, layer in enumerate(self.layers) if layer.self_attention.has_state]


def block_submodules(
    model: ModelConfig, sleep: SleepConfig, blocks: range, built: Callable[..., None]
) -> TransformerBlockSubmodules:
    """Megatron-core's description of the layers `blocks` of `model`."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, sleep, block, built) for block in blocks], layer_norm=RMSNorm
    )


def _layer_spec(model: ModelConfig, sleep: SleepConfig, block: int, built: Callable[..., None]) -> ModuleSpec:
    norms = model.block_norms(block)
    before = {name: RMSNorm if name in norms else IdentityOp for name in ("input_layernorm", "pre_mlp_layernorm")}
    return ModuleSpec(
        module=HybridLayer,
        params={"block": block, "norms": norms, "built": built},
        submodules=TransformerLayerSubmodules(
            self_attention=model.mixer(block).module_spec(model, sleep, block),
            pre_cross_attn_layernorm=IdentityOp,
            mlp=model.mlp.module_spec(model, sleep, block) if model.has_mlp(block) else IdentityOp,
            **before,
        ),
    )
