"""A mixer's parameters on one tensor rank, built from its section's list."""

import torch

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.megatron import (
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
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
    """

    def __init__(
        self, config, layer_number, pg_collection, mixer: Mixer, model: ModelConfig, sleep: SleepConfig, block
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.mixer = mixer
        self.model = model
        self.block = block
        self.tp_group = pg_collection.tp
        self.tp_size = self.tp_group.size()
        self.has_state = mixer.has_state(sleep)
        self.gates: list[dict[str, torch.Tensor]] | None = None
        self._keeps_early_writes = not mixer.has_fast_weights or sleep.write == "every"
        for weight in mixer.weights(model):
            self._add(weight)

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

    def watch_gates(self, window: Window, log_alpha: torch.Tensor, beta: torch.Tensor) -> None:
        """Record the means, without pads, of alpha, the share of the old state that a token keeps, and beta, its write
        strength; each is [L, B, numbers/TP]."""
        if self.gates is not None:
            gates = {"alpha": log_alpha.detach().exp(), "beta": beta.detach()}
            self.gates.append({name: _mean_of_tokens(gate, window.padding_mask) for name, gate in gates.items()})

    def _add(self, weight: Weight) -> None:
        name, dot, _ = weight.name.partition(".")
        if not dot:
            self.register_parameter(name, self._parameter(weight))
        elif len(weight.shape) == 1:
            assert weight.split is None
            zero_centred = self.model.zero_centred_norms and self.mixer.norms_follow_the_model
            self.add_module(name, HeadNorm(self.config, weight.shape[0], self.tp_group, zero_centred))
        else:
            self.add_module(name, self._projection(weight))

    def _projection(self, weight: Weight) -> torch.nn.Module:
        rows, columns = weight.shape
        common = dict(config=self.config, bias=False, tp_group=self.tp_group)
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


class HeadNorm(RMSNorm):
    """RMSNorm within each head; all heads on all shards share one weight."""

    def __init__(self, config, head_dim, tp_group, zero_centred):
        super().__init__(config, head_dim, eps=config.layernorm_epsilon, zero_centred=zero_centred)
        self.tp_group = tp_group
        # Heads are split, not tokens.
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]  # Megatron's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Each shard sees its own heads, so its gradient of this shared weight is a partial sum.
        return self.scaled(x, copy_to_tensor_model_parallel_region(self.weight, self.tp_group))


def _mean_of_tokens(x: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of x [L, B, H] without pads."""
    return (
        x.mean()
        if padding_mask is None
        else (x * padding_mask.unsqueeze(-1)).sum() / (padding_mask.sum() * x.shape[-1])
    )
