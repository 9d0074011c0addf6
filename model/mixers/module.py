"""A mixer's parameters on one tensor rank, built from its section's list."""

import torch

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.megatron import (
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from powernap.model.norm import RMSNorm
from powernap.model.part import Cache, Mixer, Weight
from powernap.model.window import Window


class MixerModule(MegatronModule):
    """A mixer in the place of a Megatron-core layer's attention.

    Args:
        block: its index in the whole model, to recognise its last pass over a window.

    Attributes:
        gates: the mean of each named gate over the tokens of a pass, one entry per pass (model/health.py); None: off.
        unrounded: by name, the float32 values of parameters listed with `float32` that are held in bfloat16; filled and
            renewed after each step by parallel/zero/unrounded.py.
    """

    def __init__(
        self, config, layer_number, pg_collection, mixer: Mixer, model: ModelConfig, sleep: SleepConfig, block
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.mixer = mixer
        self.block = block
        self.tp_group = pg_collection.tp
        self.tp_size = self.tp_group.size()
        self.gates: list[dict[str, torch.Tensor]] | None = None
        self.unrounded: dict[str, torch.Tensor] = {}
        self.adopt(model, sleep)
        for weight in mixer.weights(model):
            self._add(weight)

    def adopt(self, model: ModelConfig, sleep: SleepConfig) -> None:
        """As HybridStage.adopt."""
        self.model = model
        self.has_state = self.mixer.has_state(sleep)
        self._keeps_early_writes = not self.mixer.has_fast_weights or sleep.write == "every"

    def forward(
        self, hidden_states: torch.Tensor, state: torch.Tensor | None, window: Window, need_output: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [L, B, D], the mixer's state -> (output [L, B, D] or None, state).

        With sleep.write=last the fast weights change in the block's last pass over a window only.
        """
        output, written = self.mixer.forward(self, hidden_states, state, window, need_output)
        return output, written if self._keeps_early_writes or self.block in window.final_blocks else state

    def first_state(self, batch: int, like: torch.Tensor) -> torch.Tensor:
        return self.mixer.first_state(self, batch, like)

    def init_cache(self, batch: int, slots: int, like: torch.Tensor) -> Cache:
        return self.mixer.init_cache(self, batch, slots, like)

    def decode(self, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        return self.mixer.decode(self, hidden_states, cache, window)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's part of the last dimension, for each rank to use in its own way: gradients are summed.
        The mixer names the weight whose product goes through here in `gathered`."""
        gathered = gather_from_tensor_model_parallel_region(x, self.tp_group)
        return copy_to_tensor_model_parallel_region(gathered, self.tp_group)

    def in_float32(self, name: str) -> torch.Tensor:
        """A parameter listed with `float32`, not rounded to the precision of the others; its gradient is float32, too."""
        parameter = getattr(self, name)
        return _Unrounded.apply(parameter, self.unrounded[name]) if name in self.unrounded else parameter

    def float32_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {weight.name: getattr(self, weight.name) for weight in self.mixer.weights(self.model) if weight.float32}

    def keep_unrounded(self) -> None:
        """Call before the module is cast to bfloat16."""
        for name, parameter in self.float32_parameters().items():
            self.unrounded[name] = parameter.detach().clone()

    def watch_gates(self, window: Window, log_alpha: torch.Tensor, beta: torch.Tensor) -> None:
        """Record the means, without pads, of alpha, the share of the old state that a token keeps, and beta, its write
        strength; each is [L, B, numbers/TP]."""
        if self.gates is not None:
            gates = {"alpha": log_alpha.detach().exp(), "beta": beta.detach()}
            self.gates.append({name: _mean_of_tokens(gate, window.padding_mask) for name, gate in gates.items()})

    def _add(self, weight: Weight) -> None:
        name, dot, kind = weight.name.partition(".")
        if not dot:
            self.register_parameter(name, self._parameter(weight))
        elif kind == "bias":
            assert getattr(self, name).bias is not None  # built with the projection
        elif len(weight.shape) == 1:
            zero_centred = self.model.zero_centred_norms and self.mixer.norms_follow_the_model
            norm = HeadNorm if weight.split is None else WidthNorm
            eps = self.mixer.norm_epsilon(self.model)
            self.add_module(name, norm(self.config, weight.shape[0], eps, self.tp_group, zero_centred))
        else:
            self.add_module(name, self._projection(weight))

    def _projection(self, weight: Weight) -> torch.nn.Module:
        rows, columns = weight.shape
        bias = weight.name.removesuffix("weight") + "bias"
        has_bias = any(other.name == bias for other in self.mixer.weights(self.model))
        assert not has_bias or weight.split == 0
        common = dict(config=self.config, bias=has_bias, tp_group=self.tp_group)
        # Hidden states are whole between mixers: only the inner dimension is split.
        assert weight.split in (0, 1) and weight.shape[1 - weight.split] == self.config.hidden_size
        if weight.split == 0:
            return ColumnParallelLinear(
                columns, rows, init_method=self.config.init_method, gather_output=False, **common
            )
        return RowParallelLinear(
            columns,
            rows,
            init_method=self.config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **common,
        )

    def _parameter(self, weight: Weight) -> torch.nn.Parameter:
        assert weight.split == 0 and weight.draw is not None
        # Drawn whole and sliced, as Megatron's layers do on the CPU: every shard draws the same numbers.
        whole = weight.draw(weight.shape)
        device = next(self.parameters()).device  # Megatron's layers come first
        parameter = torch.nn.Parameter(whole.chunk(self.tp_size)[self.tp_group.rank()].clone().to(device))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter


class _Unrounded(torch.autograd.Function):
    """The value of one tensor, the gradient for the other."""

    @staticmethod
    def forward(ctx, parameter: torch.Tensor, unrounded: torch.Tensor) -> torch.Tensor:
        return unrounded.view_as(unrounded)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class HeadNorm(RMSNorm):
    """RMSNorm within each head; all heads on all shards share one weight."""

    def __init__(self, config, head_dim, eps, tp_group, zero_centred):
        super().__init__(config, head_dim, eps=eps, zero_centred=zero_centred)
        self.tp_group = tp_group
        # Heads are split, not tokens.
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]  # Megatron's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x, self._shared_weight)

    def gated(self, x: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
        """In a kernel: the norm of x times `activation` of the gate, both [B, L, H, d_v] -> [L, B, H * d_v]."""
        from powernap.model.mixers.gated_norm_kernel import gated_norm

        assert not self.zero_centred
        return gated_norm(x, gate, self._shared_weight, self.eps, activation)

    def multiplier(self) -> torch.Tensor:
        """What a normed head is multiplied by, [width of a head]; for kernels."""
        return 1 + self._shared_weight.float() if self.zero_centred else self._shared_weight

    @property
    def _shared_weight(self) -> torch.Tensor:
        # Each shard sees its own heads, so its gradient of this shared weight is a partial sum.
        return copy_to_tensor_model_parallel_region(self.weight, self.tp_group)


class WidthNorm(RMSNorm):
    """RMSNorm over all heads together, of which each tensor rank has a part, and that part of the weight."""

    def __init__(self, config, width, eps, tp_group, zero_centred):
        super().__init__(config, width // tp_group.size(), eps=eps, zero_centred=zero_centred)
        self.width, self.tp_group = width, tp_group
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]  # Megatron's
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [L, B, groups/TP, heads in a group, width of a head]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        # Contiguous: Megatron-core reduces a copy of what is not, and returns the original.
        squares = wide.square().sum((-3, -2, -1), keepdim=True).contiguous()
        # The sum over ranks, and in backward again: each rank's output depends on the whole sum.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        weight = self.weight.to(dtype).view(x.shape[-3:])
        weight = 1 + weight if self.zero_centred else weight
        return (wide * torch.rsqrt(squares / self.width + self.eps) * weight).to(x.dtype)


def _mean_of_tokens(x: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of x [L, B, H] without pads."""
    return (
        x.mean()
        if padding_mask is None
        else (x * padding_mask.unsqueeze(-1)).sum() / (padding_mask.sum() * x.shape[-1])
    )
