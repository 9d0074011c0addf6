"""The slot: how a block's sequence mixer and MLP describe themselves, and how a mixer computes.

A part is a section of the recipe (`model.attention`, `model.mlp`). It lists its parameters once: the module is built from
that list (module.py), and memory, optimizer, checkpoints and `powernap plan` read it. Nothing else in Powernap knows a
mixer's letter or its fields.

Importing this file or a mixer's imports no torch: recipes are checked and planned without it. The methods that compute
import what they need.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from powernap.model.section import Section

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.megatron import ModuleSpec
    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window

FP32 = 4  # bytes; fast weights are fp32 in every precision

Device = Literal["cuda", "cpu"]  # cuda: NCCL, fused norms, FLA in bf16; cpu: gloo and torch's own operations
Cache = dict[str, "torch.Tensor"]  # tensors a block keeps between decoded tokens; the first dimension is the batch


class Weight(NamedTuple):
    """One parameter, before tensor ranks split it.

    Its name tells MixerModule what to build: "x.weight" with two dimensions is a projection, column-parallel if its
    rows are split, row-parallel if its columns are, with a bias if there is an "x.bias" of as many numbers; with one
    dimension an RMSNorm, over each head if all ranks share it, over all heads together if it is split; a name without a
    dot is a plain parameter, whose unsplit value `draw` returns.

    `float32`: a plain parameter whose mixer reads it unrounded in every precision, through `MixerModule.in_float32`. dt_bias
    is about -8: in bfloat16 its neighbours are 0.03 apart, steps of 3 % in dt.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None  # the dimension that tensor ranks split
    draw: Callable[[tuple[int, ...]], torch.Tensor] | None = None
    # Rows of each projection that it joins, in a head if heads follow each other; (): it is one.
    projections: tuple[int, ...] = ()
    float32: bool = False

    def size(self, tensor: int = 1) -> int:
        """Number of elements on one of `tensor` ranks, with the pads of a vocabulary that they do not divide."""
        share = math.prod(self.shape)
        return share if self.split is None else share // self.shape[self.split] * -(-self.shape[self.split] // tensor)

    @property
    def is_matrix(self) -> bool:
        """Whether optimizers treat it as a matrix: a product's weight, no embedding, norm, convolution or gate."""
        return len(self.shape) == 2 and self.name.endswith(".weight") and not self.name.startswith("embedding.")


class Part(Section):
    """A mixer or an MLP. FLOPs of matrix products and convolutions, 2 per multiply-add; bytes over all tensor ranks."""

    section: ClassVar[str]  # its fields are model.<section>.<field>

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError, in one line, if its fields do not fit the model."""

    @abstractmethod
    def split_sizes(self) -> dict[str, int]:
        """Field -> its size, which parallel.tensor must divide."""

    @abstractmethod
    def weights(self, model: ModelConfig) -> list[Weight]:
        """Its parameters, in the order in which they are drawn."""

    @abstractmethod
    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Forward FLOPs per token; `state_only`: of a pass whose output is unused."""

    @abstractmethod
    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Bytes per token that autograd saves in forward, without the block's norms; `number`: bytes per number."""

    @abstractmethod
    def module_spec(self, model: ModelConfig, sleep: SleepConfig, block: int) -> ModuleSpec:
        """How Megatron-core builds its module."""


class Mixer(Part):
    """A sequence mixer. By default one with fast weights: a matrix state per head, handed from window to window.

    `layer`, in the methods that compute, is the module with this rank's parameters.
    """

    letter: ClassVar[str]  # in model.pattern
    title: ClassVar[str]
    has_fast_weights: ClassVar[bool] = True
    norms_follow_the_model: ClassVar[bool] = False  # model.zero_centred_norms says how its norms keep their weights
    gathered: ClassVar[tuple[str, ...]] = ()  # column-parallel weights whose products go through MixerModule.whole

    norms: Literal["pre", "post", "sandwich"] = Field(
        "pre",
        description="where its blocks have RMSNorms: before mixer and MLP, after them (arXiv 2501.00656), or both",
    )

    def norm_epsilon(self, model: ModelConfig) -> float:
        """Of the norms inside the mixer."""
        return model.norm_eps

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, rows and columns of one sequence's fast weights; tensor ranks split the heads."""
        raise NotImplementedError

    def has_state(self, sleep: SleepConfig) -> bool:
        """Whether it hands a tensor from window to window: fast weights, or a cache."""
        return self.has_fast_weights

    def state_bytes(self, model: ModelConfig, number: int, cached: int) -> int:
        """Bytes of one sequence's state; `number`: bytes per number, `cached`: tokens in a cache."""
        return FP32 * math.prod(self.state_shape)

    def kept_bytes(self, model: ModelConfig, number: int) -> float:
        """Bytes per token that train.recompute=selective keeps besides what projections return."""
        return 0

    def flops_again(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Of `flops`, those that train.recompute=selective computes again: all but the projections'."""
        projections = sum(
            2 * w.size() for w in self.weights(model) if w.is_matrix and not (state_only and w.split == 1)
        )
        return self.flops(model, sleep, state_only) - projections

    def check_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        """Raise KernelError if training on `device` needs kernels that are missing or would fail."""

    def module_spec(self, model: ModelConfig, sleep: SleepConfig, block: int) -> ModuleSpec:
        from powernap.model.megatron import ModuleSpec
        from powernap.model.mixers.module import MixerModule

        return ModuleSpec(module=MixerModule, params={"mixer": self, "model": model, "sleep": sleep, "block": block})

    def first_state(self, layer: MixerModule, batch: int, like: torch.Tensor) -> torch.Tensor:
        """The state at the start of `batch` sequences: its first dimension is the batch, its second the heads."""
        from powernap.model.fast_weights import zero_state

        heads, rows, columns = self.state_shape
        return zero_state(batch, heads // layer.tp_size, rows, columns, like)

    def flops_less(self, model: ModelConfig, sleep: SleepConfig, keys: float) -> int:
        """By how much `flops` is less where a token sees `keys` keys on average, as in a short window."""
        return 0

    @abstractmethod
    def forward(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [L, B, D] and the state at the window's start -> (output [L, B, D] or None, new state)."""

    def init_cache(self, layer: MixerModule, batch: int, slots: int, like: torch.Tensor) -> Cache:
        """The cache that `decode` starts from; `slots`: tokens that attention sees, in the window and before it."""
        return {"state": self.first_state(layer, batch, like)}

    @abstractmethod
    def decode(self, layer: MixerModule, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        """`forward` for a chunk of a window: [n, B, D] -> [n, B, D]; updates `cache` for the next chunk."""

    def state_of(self, cache: Cache, rows: list[int], before: int) -> torch.Tensor:
        """The state from which a window's sleep starts; `before`: slots of the tokens before the window."""
        return cache["state"][rows]

    def begin_window(self, cache: Cache, rows: list[int], before: int, state: torch.Tensor) -> None:
        """Start the next window from the `state` after sleep."""
        for name, tensor in cache.items():
            tensor[rows] = state if name == "state" else 0


def even_chunk(length: int, longest: int) -> int:
    """Tokens per chunk: 75 in chunks of at most 32 are 3 x 25, not 32 + 32 + 11 and padding."""
    return -(-length // -(-length // longest))
