"""Shared by recurrent mixers: the short causal convolution before a recurrence, and the forms of the recurrence.

Nothing here imports torch before it computes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from powernap.model.part import Cache, Mixer

if TYPE_CHECKING:
    import torch

    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window


@dataclass(frozen=True)
class Recurrence:
    """Forms of one recurrence. Each takes an initial state, returns the final one; gradients pass through both."""

    sequential: Callable  # token by token: the reference for the others
    chunked: Callable  # matrix products, in torch
    kernel: Callable  # FLA's Triton kernel on CUDA; computes the output even if it is not needed

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run T tokens: a single one sequentially, more with the kernel where it is precise enough, else in chunks.

        Args:
            q, k: [B, T, H, K], used as they are: no norm, no 1/sqrt(K). Mamba-2 has one per group of heads.
            v: [B, T, H, V].
            g: [B, T, H] log of the decay, <= 0; [B, T, H, K] with one decay per channel.
            beta: [B, T, H] write strength.
            state: [B, H, K, V], float32 (float64 when the inputs are).
            need_output: False when only the final state matters; the output is then None.

        Returns:
            (o [B, T, H, V] in v's dtype, final state [B, H, K, V] in the state's dtype)
        """
        from powernap.model.mixers.fla import kernels_compute

        if q.shape[1] == 1:
            return self.sequential(q, k, v, g, beta, state, need_output)
        if kernels_compute(q):
            return self.kernel(q, k, v, g, beta, state)
        return self.chunked(q, k, v, g, beta, state, need_output)


class RecurrentMixer(Mixer):
    """Fast weights written after a causal convolution that sees its own window only."""

    conv_kernel: int = Field(4, ge=1, description="taps of the causal convolution before the recurrence")

    @property
    @abstractmethod
    def conv_shape(self) -> tuple[int, int]:
        """Number of heads or groups, which tensor ranks split, and channels of each."""

    @abstractmethod
    def mix(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool,
        conv_state: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """`forward` that takes the convolution's earlier inputs and also returns [conv_state, inputs]: see `convolve`."""

    def convolve(
        self, layer: MixerModule, inputs: torch.Tensor, window: Window, conv_state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs [L, B, *conv_shape/TP], conv_state [taps-1, B, ...] or None -> (convolved, [conv_state, inputs])."""
        import torch

        from powernap.model.mixers.conv import causal_conv

        if window.padding_mask is not None:  # the convolution must not carry a pad into the tokens after it
            inputs = inputs * window.padding_mask[..., None, None]
        seen = inputs if conv_state is None else torch.cat([conv_state, inputs])
        return causal_conv(seen, layer.conv_weight)[len(seen) - len(inputs) :], seen

    def forward(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        assert state is not None
        output, state, _ = self.mix(layer, hidden_states, state, window, need_output, None)
        return output, state

    def init_cache(self, layer: MixerModule, batch: int, slots: int, like: torch.Tensor) -> Cache:
        """Zero fast weights, and a zero conv_state: the convolution sees nothing before the window."""
        split, channels = self.conv_shape
        conv_state = like.new_zeros((batch, self.conv_kernel - 1, split // layer.tp_size, channels))
        return {**super().init_cache(layer, batch, slots, like), "conv_state": conv_state}

    def decode(self, layer: MixerModule, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        import torch

        conv_state = cache["conv_state"].transpose(0, 1)
        output, cache["state"], seen = self.mix(layer, hidden_states, cache["state"], window, True, conv_state)
        assert output is not None
        conv_state = seen[len(hidden_states) :].transpose(0, 1)
        # A copy: a view would keep the whole chunk alive.
        cache["conv_state"] = conv_state.clone(memory_format=torch.contiguous_format)
        return output


def draw_step(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    """Biases whose softplus, the initial step size, is log-uniform between `low` and `high`."""
    import torch

    step = torch.empty(shape).uniform_(math.log(low), math.log(high)).exp()
    return step + torch.log(-torch.expm1(-step))
