"""HybridStage: the part of the model one pipeline stage owns. Embedding first, blocks, output head last."""

import math

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from powernap.model.attention import causal_mask_without, rotary_tables
from powernap.model.block import HybridBlock, block_submodules
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.fast_weights import FastWeights, zero_fast_weights
from powernap.model.norm import RMSNorm
from powernap.model.segments import Segment
from powernap.model.window import Window


class HybridStage(MegatronModule):
    """All blocks, while there is one pipeline stage; knows how to run one segment, not in which order they come."""

    def __init__(
        self, model: ModelConfig, sleep: SleepConfig, groups: ProcessGroupCollection, dtype: torch.dtype = torch.float32
    ):
        config = transformer_config(model, groups.tp.size(), dtype)
        super().__init__(config)
        self.model = model
        self.tp_group = groups.tp
        self.reinject_embeddings = sleep.reinject_embeddings
        self.embedding = VocabParallelEmbedding(
            model.vocab_size,
            model.hidden_size,
            init_method=lambda weight: torch.nn.init.normal_(weight, 0.0, model.embedding_std),
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
            tp_group=groups.tp,
        )
        self.pass_norm = RMSNorm(config, model.hidden_size, eps=model.norm_eps) if sleep.pass_norm else None
        self.decoder = HybridBlock(config, block_submodules(model.pattern), pg_collection=groups)
        self.output_layer = ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=model.tie_embeddings,
            tp_group=groups.tp,
        )
        self._rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def gdn_mixers(self) -> dict[int, torch.nn.Module]:
        """The gated-delta-net mixers of this stage by block index (from 0, over the whole model)."""
        return {layer.layer_number - 1: layer.self_attention for layer in self.decoder.layers if layer.has_state}

    def zero_fast_weights(self, batch: int) -> FastWeights:
        """Fast weights at the start of `batch` sequences."""
        model = self.model
        return zero_fast_weights(
            len(self.decoder.layers_with_state),
            batch,
            model.gdn_heads // self.tp_group.size(),
            model.gdn_key_dim,
            model.gdn_value_dim,
            like=self.embedding.weight,
        )

    def forward(
        self, segment: Segment, tokens: torch.Tensor, hidden_states: torch.Tensor | None, fast_weights: FastWeights
    ) -> tuple[torch.Tensor | None, FastWeights]:
        """Run one segment.

        Args:
            tokens: [B, L] of the segment's window.
            hidden_states: [L, B, D] of the pass before; None in a window's first pass.
            fast_weights: state left by the segment before.

        Returns:
            (hidden_states [L, B, D], None where the segment only writes; fast_weights)
        """
        hidden_states = self._pass_input(segment, tokens, hidden_states)
        layers = range(*segment.blocks)
        return self.decoder(hidden_states, fast_weights, self._window(segment, tokens), layers, segment.write_only)

    def loss(self, hidden_states: torch.Tensor, targets: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropy over the tokens in `loss_mask`; hidden_states [L, B, D], the others [B, L]."""
        logits = self._logits(hidden_states)
        targets = targets.t()
        if self.tp_group.size() == 1:  # Megatron's is float32 only
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        else:
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.contiguous())
        return (losses * loss_mask.t()).sum()

    def predictions(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest next token at every position: hidden_states [L, B, D] -> [B, L]."""
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(self._logits(hidden_states), self.tp_group)
        return logits.argmax(dim=-1).t()

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.embedding.weight if self.model.tie_embeddings else None
        logits, _ = self.output_layer(self.decoder.final_layernorm(hidden_states), weight=weight)
        return logits

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens).transpose(0, 1).contiguous()  # Megatron's layout, [L, B, D]

    def _pass_input(self, segment: Segment, tokens: torch.Tensor, hidden_states: torch.Tensor | None) -> torch.Tensor:
        """Pass 1 sees the embeddings, pass n the final hidden states of pass n-1 (normed, re-injected if asked)."""
        if segment.pass_number == 1:
            return self._embed(tokens)
        if self.pass_norm is not None:
            hidden_states = self.pass_norm(hidden_states)
        if self.reinject_embeddings:
            hidden_states = hidden_states + self._embed(tokens)
        return hidden_states

    def _window(self, segment: Segment, tokens: torch.Tensor) -> Window:
        length = tokens.shape[1]
        rotary = self._rotary.get(length)
        if rotary is None or rotary[0].device != tokens.device or rotary[0].dtype != self.embedding.weight.dtype:
            head_dim = self.model.hidden_size // self.model.num_attention_heads
            rotary = rotary_tables(length, head_dim, self.model.rope_base, like=self.embedding.weight)
            self._rotary[length] = rotary
        if not segment.padded:
            return Window(rotary)
        valid = tokens != self.model.pad_token_id
        return Window(rotary, valid.t().to(rotary[0].dtype), causal_mask_without(valid))


def transformer_config(model: ModelConfig, tensor_parallel_size: int, dtype: torch.dtype) -> TransformerConfig:
    """The same sizes in Megatron-core's terms."""

    def fan_in(weight: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return torch.nn.init.normal_(weight, 0.0, gain / math.sqrt(weight.shape[1]))

    def residual_branch(weight: torch.Tensor) -> torch.Tensor:  # two branches a block add up in the residual stream
        return fan_in(weight, 1 / math.sqrt(2 * model.num_layers))

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        linear_attention_freq=2,  # unused, but Megatron wants one beside the linear_* sizes
        linear_num_key_heads=model.gdn_heads,
        linear_num_value_heads=model.gdn_heads,
        linear_key_head_dim=model.gdn_key_dim,
        linear_value_head_dim=model.gdn_value_dim,
        linear_conv_kernel_dim=model.conv_kernel,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method=fan_in,
        output_layer_init_method=residual_branch,
        tensor_model_parallel_size=tensor_parallel_size,
        params_dtype=dtype,
        # Weights are drawn whole on the CPU and sliced: the same model for every degree of tensor parallelism.
        use_cpu_initialization=True,
        # Megatron's fused kernels need CUDA extensions that Powernap does not ask for.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
