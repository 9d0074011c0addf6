"""Jet-Nemotron's block (arXiv 2508.15884, section 3): a gated delta net whose convolution is on the values alone, with taps that
the input draws up for every token.

With x_t the block's input, per channel c of the values and tap i:

    K_t = W_2 SiLU(W_1 x_t) + b    v'_{t,c} = SiLU(sum_i K_{t,c,i} v_{t-taps+1+i,c})

b is an ordinary convolution's kernel. Queries and keys pass a SiLU and no convolution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from powernap.model.mixers.gated_delta_net import GatedDeltaNet, draw_taps
from powernap.model.part import Weight

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window


class JetBlock(GatedDeltaNet):
    """Projections, gates and recurrence of a gated delta net; the last inputs of the convolution are values alone."""

    letter: ClassVar[str] = "J"
    title: ClassVar[str] = "Jet-Nemotron's block"
    section: ClassVar[str] = "jet"
    gathered: ClassVar[tuple[str, ...]] = ("generator_in.weight",)
    has_kernels: ClassVar[bool] = False  # its convolution is another

    generator_dim: int = Field(
        ge=1, description="width between W_1 and W_2, which make the taps; Jet: heads * value_dim / 8"
    )

    @property
    def conv_shape(self) -> tuple[int, int]:
        return self.groups, self._values * self.value_dim

    def split_sizes(self) -> dict[str, int]:
        return super().split_sizes() | {"generator_dim": self.generator_dim}

    def weights(self, model: ModelConfig) -> list[Weight]:
        rows, columns = self._values * self.value_dim * self.conv_kernel, self.generator_dim
        generator = [
            Weight("generator_in.weight", (self.generator_dim, model.hidden_size), split=0),
            Weight("generator_out", (self.groups, rows, columns), split=0, draw=_draw_generator),
            Weight("generator_bias", (self.groups, rows), split=0, draw=self._draw_kernel),
        ]
        return [w for w in super().weights(model) if w.name != "conv_weight"] + generator

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """A gated delta net's, with a convolution of the values alone, and W_1 and W_2."""
        values = self.heads * self.value_dim
        convolution = 2 * self.conv_kernel * (values - self.groups * self._channels)
        generator = 2 * self.generator_dim * (model.hidden_size + values * self.conv_kernel)
        return super().flops(model, sleep, state_only) + convolution + generator

    def numbers_projected(self, model: ModelConfig) -> int:
        values = self.heads * self.value_dim
        rows = self.groups * self._channels + self.heads * (self.value_dim + 2)
        features = 2 * self.groups * self.key_dim + 2 * values  # q and k after SiLU; v before and after it
        return rows + features + values * self.conv_kernel + 2 * self.generator_dim

    def features(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        qkv: torch.Tensor,
        window: Window,
        conv_state: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        import torch
        import torch.nn.functional as F

        d_v, taps = self._values * self.value_dim, self.conv_kernel
        q, k, v = qkv.split([self.key_dim, self.key_dim, d_v], dim=-1)
        if window.padding_mask is not None:
            v = v * window.padding_mask[..., None, None]
        narrow, _ = layer.generator_in(hidden_states)
        kernels = torch.einsum("lbr,gcr->lbgc", layer.whole(F.silu(narrow)), layer.generator_out.to(v.dtype))
        kernels = (kernels + layer.generator_bias.to(v.dtype)).unflatten(-1, (d_v, taps))
        seen = v if conv_state is None else torch.cat([conv_state, v])
        padded = F.pad(seen, (0, 0) * 3 + (max(0, taps - 1 - (len(seen) - len(v))), 0))[-(len(v) + taps - 1) :]
        convolved = sum(padded[i : i + len(v)] * kernels[..., i] for i in range(taps))
        assert torch.is_tensor(convolved)
        return [F.silu(q), F.silu(k), F.silu(convolved)], seen

    def _draw_kernel(self, shape: tuple[int, ...]) -> torch.Tensor:
        """As a gated delta net's convolution begins."""
        return draw_taps((*shape[:-1], shape[-1] // self.conv_kernel, self.conv_kernel)).flatten(-2)


def _draw_generator(shape: tuple[int, ...]) -> torch.Tensor:
    """Small: at the start the taps are those of the bias, nearly."""
    import torch

    return torch.randn(shape) / (10 * math.sqrt(shape[-1]))
