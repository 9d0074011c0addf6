"""HybridStage: the part of the model one pipeline stage owns. Embedding first, blocks, output head last."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from powernap.model.batch import find_loss_tokens, window_tokens
from powernap.model.block import HybridBlock, block_submodules
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.dropout import Dropout
from powernap.model.fast_weights import LayerStates, begin_anew
from powernap.model.init import seeded_init
from powernap.model.loss_terms import LossTerms, Rows
from powernap.model.megatron import (
    ColumnParallelLinear,
    MegatronModule,
    ProcessGroupCollection,
    TransformerConfig,
    VocabParallelEmbedding,
    tensor_parallel,
)
from powernap.model.mixers.module import MixerModule
from powernap.model.norm import RMSNorm
from powernap.model.part import Cache
from powernap.model.recompute import call
from powernap.model.segments import HEAD_NUMBERS, Segment
from powernap.model.window import Positions, Window, mask_padding, sliding_mask


class HybridStage(MegatronModule):
    """The blocks of one pipeline stage, or all; knows how to run one segment, not their order.

    Args:
        blocks: the blocks of this stage, counted over the whole model; None: all. The stage with the first one holds
            the embedding, the stage with the last one final norm and output head.
        sequence_parallel: hidden states [L/TP, B, D] in place of [L, B, D] outside the mixers and MLPs (arXiv
            2205.05198).
        draw: False: matrices are left as memory has them, for weights from elsewhere.
        built: called with the name, in the whole model, and module of each part as soon as it is there: embedding, each block,
            norms, head. What it frees is never held together.
    """

    def __init__(
        self,
        model: ModelConfig,
        sleep: SleepConfig,
        groups: ProcessGroupCollection,
        dtype: torch.dtype = torch.float32,
        blocks: range | None = None,
        sequence_parallel: bool = False,
        draw: bool = True,
        built: Callable[[str, torch.nn.Module], None] = lambda name, module: None,
    ):
        config = transformer_config(model, groups.tp.size(), dtype, sequence_parallel, draw)
        super().__init__(config)
        self.model = model
        self.sleep = sleep
        self.tp_group = groups.tp
        self.blocks = range(model.num_layers) if blocks is None else blocks
        self.is_first = self.blocks.start == 0
        self.is_last = self.blocks.stop == model.num_layers
        self.reinject_embeddings = sleep.reinject_embeddings
        self._vocabulary_rows = model.vocabulary_rows(groups.tp.size())
        padded_vocabulary = self._vocabulary_rows * groups.tp.size()
        self.embedding: VocabParallelEmbedding | None = None
        self.pass_norm: RMSNorm | None = None
        self.output_layer: ColumnParallelLinear | None = None
        if self.is_first or (self.is_last and model.tie_embeddings):
            with seeded_init("embedding"):
                self.embedding = VocabParallelEmbedding(
                    padded_vocabulary,
                    model.hidden_size,
                    init_method=lambda weight: self._draw_vocabulary(
                        weight, lambda rows: draw_normal(rows, model.initial_embedding_std, draw)
                    ),
                    config=config,
                    reduce_scatter_embeddings=sequence_parallel,
                    tp_group=groups.tp,
                )
            self.embedding.weight.whole_rows = model.vocab_size
            built("embedding", self.embedding)
        if self.is_first and sleep.pass_norm:
            self.pass_norm = RMSNorm(config, model.hidden_size, eps=model.norm_eps)
            built("pass_norm", self.pass_norm)
        submodules = block_submodules(model, sleep, self.blocks, built)
        self.decoder = HybridBlock(config, submodules, post_process=self.is_last, pg_collection=groups)
        if self.is_last:
            built("decoder.final_layernorm", self.decoder.final_layernorm)
        if self.is_last:
            with seeded_init("output_layer"):
                self.output_layer = ColumnParallelLinear(
                    model.hidden_size,
                    padded_vocabulary,
                    config=_without_sequence_parallel(config),  # it gets some tokens of the whole window
                    init_method=lambda weight: self._draw_vocabulary(weight, config.init_method),
                    bias=False,
                    gather_output=False,
                    skip_weight_param_allocation=model.tie_embeddings,
                    tp_group=groups.tp,
                )
            if not model.tie_embeddings:
                self.output_layer.weight.whole_rows = model.vocab_size
            built("output_layer", self.output_layer)
        self.z_loss = 0.0  # times log(Z)^2, in the gradient of `token_losses`
        self.loss_terms: LossTerms | None = None  # likewise
        self.dropout = 0.0  # rate, in segments with `dropout_seeds`
        self._masks: dict[tuple[int, int], torch.Tensor] = {}  # by length and cached tokens

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the dtype and device of the weights, for new_zeros and the like."""
        return next(self.decoder.layers[0].parameters()).data

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; DeepSpeed may have changed it."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def sequence_shards(self) -> int:
        """Number of ranks that split a window's tokens between blocks."""
        return self.tp_group.size() if self.config.sequence_parallel else 1

    @property
    def own_vocabulary(self) -> int:
        """Tokens whose rows of embedding and head this tensor rank has; its other rows are pads."""
        left = self.model.vocab_size - self.tp_group.rank() * self._vocabulary_rows
        return max(0, min(left, self._vocabulary_rows))

    @property
    def holds_tied_copy(self) -> bool:
        """Whether the embedding here is the output head's copy of the first stage's."""
        return self.embedding is not None and not self.is_first

    def global_name(self, name: str) -> str:
        """A parameter's or module's name in the whole model, from its name in this stage."""
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        index, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(index) + self.blocks.start}{dot}{rest}"

    @property
    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that are not frozen, by name in the whole model."""
        return {self.global_name(name): p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def fast_weight_mixers(self) -> dict[int, MixerModule]:
        """The mixers of this stage that have fast weights, by block (from 0, over the whole model)."""
        layers = zip(self.blocks, self.decoder.layers, strict=True)
        return {block: layer.self_attention for block, layer in layers if block in self.model.fast_weight_blocks}

    def adopt(self, model: ModelConfig, sleep: SleepConfig) -> None:
        """Continue with another window length, or another way to sleep: fields that change no parameter."""
        self.model, self.sleep = model, sleep
        self._masks.clear()
        for layer in self.decoder.layers:
            layer.self_attention.adopt(model, sleep)

    def empty_layer_states(self, batch: int) -> LayerStates:
        """The initial states of `batch` sequences: zero fast weights, empty caches."""
        mixers = [self.decoder.layers[index].self_attention for index in self.decoder.layers_with_state]
        return tuple(mixer.first_state(batch, self.like) for mixer in mixers)

    def forward(
        self,
        segment: Segment,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor | None,
        layer_states: LayerStates,
        document_starts: torch.Tensor | None = None,
        run_part: Callable = call,
    ) -> tuple[torch.Tensor | None, LayerStates]:
        """Run one segment.

        Args:
            tokens: [B, T], the whole sequences' inputs.
            hidden_states: [L, B, D] of the previous stage, or on the first stage of the previous pass; None on the
                first stage if the segment starts from the embeddings.
            layer_states: fast weights and caches after the previous segment.
            document_starts: bool [B, T or more], True at first tokens of windows at which a row begins anew: with zero fast weights,
                its attention seeing nothing before. Every window is read then: its first segment is the one that predicts.
            run_part: called with each block, and what comes before the first, and its arguments (model/recompute.py).

        Returns:
            (hidden_states [L, B, D], None on the stage where a state_only segment ends; layer states)
        """
        if document_starts is not None and segment.predicts:
            layer_states = begin_anew(layer_states, document_starts[:, segment.tokens.start])
        window = self._window(segment, tokens, document_starts)
        return self.run_pass(segment, tokens[:, segment.where], hidden_states, layer_states, window, run_part)

    def run_pass(
        self,
        segment: Segment,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor | None,
        layer_states: LayerStates,
        window: Window,
        run_part: Callable = call,
    ) -> tuple[torch.Tensor | None, LayerStates]:
        """`forward` for the window's tokens [B, L] alone, given its positions, mask and pads."""
        if self.is_first and segment.from_embeddings:
            hidden_states = self._embed(tokens)
        elif self.is_first and (self.pass_norm is not None or self.reinject_embeddings):
            hidden_states = run_part(partial(self._pass_input, tokens), hidden_states)
        layers = range(max(segment.blocks.start, self.blocks.start), min(segment.blocks.stop, self.blocks.stop))
        layers = range(layers.start - self.blocks.start, layers.stop - self.blocks.start)
        state_only = segment.state_only and segment.blocks.stop - 1 in self.blocks  # the last write is here
        hidden_states, left = self.decoder(hidden_states, layer_states, window, layers, state_only, run_part)
        return hidden_states, layer_states if segment.probe else left

    def init_caches(self, batch: int, slots: int) -> list[Cache]:
        """Caches for `decode`, one per block; `slots`: tokens that attention sees, in the window and before."""
        return [layer.self_attention.init_cache(batch, slots, self.like) for layer in self.decoder.layers]

    def decode(self, tokens: torch.Tensor, caches: list[Cache], window: Window) -> torch.Tensor:
        """Read a chunk of a window, awake: tokens [B, n] -> hidden states [n, B, D]. The whole model on one rank only."""
        assert self.is_first and self.is_last and self.tp_group.size() == 1
        return self.decoder.decode(self._embed(tokens), caches, window)

    def token_losses(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        loss_mask: torch.Tensor,
        loss_tokens: torch.Tensor | None = None,
        recompute: bool = False,
        taught: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy in nats of the tokens in `loss_mask`, elsewhere 0. Its gradient is that of the cross-entropy,
        `z_loss` log(Z)^2, with Z the softmax's sum (arXiv 2204.02311), and `loss_terms`.

        The head runs on these tokens alone, in chunks of at most HEAD_NUMBERS logits.

        Args:
            hidden_states: [L, B, D], or [L/TP, B, D] with sequence parallelism.
            targets, loss_mask: [B, L].
            loss_tokens: of `find_loss_tokens`, on this device; None: found here, where a GPU has to be waited for.
            recompute: keep no logits, compute them again in the backward pass. So it is with several chunks, too.
            taught: of a teacher, its `loss_rows` of the same tokens.

        Returns:
            [B, L]
        """
        length, batch = targets.shape[1], targets.shape[0]
        if loss_tokens is None:
            loss_tokens = find_loss_tokens(loss_mask)
        rows = self.loss_rows(hidden_states, loss_tokens)
        some = len(loss_tokens) > 0
        loss_tokens = loss_tokens if some else loss_tokens.new_zeros(1)
        row_targets = targets.t().flatten().index_select(0, loss_tokens)
        # Not from the number of loss tokens: under ZeRO-3 all data ranks run the head as often.
        chunks = math.ceil(length * batch * self._vocabulary_rows / HEAD_NUMBERS)
        run = self._row_losses
        if torch.is_grad_enabled() and (recompute or chunks > 1):
            run = partial(checkpoint, self._row_losses, use_reentrant=False, preserve_rng_state=False)
        parts = [part.tensor_split(chunks) for part in (rows, row_targets) + (() if taught is None else (taught,))]
        losses, *values = (
            torch.cat(part) for part in zip(*(run(*of_chunk) for of_chunk in zip(*parts, strict=True)), strict=True)
        )
        if values and some:
            assert self.loss_terms
            self.loss_terms.add(values[0])
        placed = losses.new_zeros(length * batch).index_copy(0, loss_tokens, losses)
        return placed.view(length, batch).t() * loss_mask

    def loss_rows(self, hidden_states: torch.Tensor, loss_tokens: torch.Tensor) -> torch.Tensor:
        """Of a window's hidden states those that `_row_losses` takes, [n, D]; loss_tokens [n].

        Where nothing bears loss it is the first token's: the head runs all the same, as on the other ranks.
        """
        loss_tokens = loss_tokens if len(loss_tokens) else loss_tokens.new_zeros(1)
        return self._rows(hidden_states).index_select(0, loss_tokens)

    def _rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states of all tokens of the window, [L * B, D]; with sequence parallelism normed."""
        if self.config.sequence_parallel:  # the norm's gradient is a sum over tensor ranks
            hidden_states = self._gathered(self.decoder.final_layernorm(hidden_states))
        return hidden_states.flatten(0, 1)

    def _row_losses(
        self, rows: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """rows [n, D] of `loss_rows`, targets [n] -> cross-entropy [n], and with `loss_terms` their values [n, terms]."""
        logits = self.row_logits(rows).unsqueeze(1)
        training, values = torch.is_grad_enabled(), None
        of_targets = self._target_logits(logits.squeeze(1), targets) if self.z_loss and training else None
        if self.loss_terms and self.loss_terms.active and training:
            exact = logits if logits.dtype == torch.float64 else logits.float()
            values = self.loss_terms.values(
                Rows(exact.squeeze(1), targets, taught, self.tp_group, self.model.vocab_size)
            )
        if self.tp_group.size() == 1:  # Megatron's is float32 only
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(logits.squeeze(1), targets, reduction="none")
        else:
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.unsqueeze(1)).squeeze(1)
        more = []
        if of_targets is not None:
            more.append(self.z_loss * (losses + of_targets).square())  # cross-entropy is log(Z) less the target's logit
        if values is not None:
            assert self.loss_terms
            more.append(self.loss_terms.weighted(values))
        for one in more:
            losses = losses + (one - one.detach())
        return (losses,) if values is None else (losses, values.detach())

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, D] of `loss_rows` -> [n, vocabulary/TP], -inf at pads."""
        if not self.config.sequence_parallel:
            rows = self.decoder.final_layernorm(rows)
        return self._head(rows.unsqueeze(1)).squeeze(1)

    def _target_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits [n, vocabulary/TP], targets [n] -> [n]."""
        own = logits.shape[1]
        within = targets - self.tp_group.rank() * own
        # Not gather, which keeps the logits for its backward pass: Megatron's cross-entropy changes them in place.
        found = logits[torch.arange(len(targets), device=targets.device), within.clamp(0, own - 1)]
        found = found if found.dtype == torch.float64 else found.float()
        found = found.masked_fill((within < 0) | (within >= own), 0)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(found, self.tp_group)

    def predictions(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The most likely next token at every position: hidden_states [L, B, D] -> [B, L]."""
        return self.logits(hidden_states).argmax(dim=-1).t()

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the next token at every position, over the whole vocabulary: [L, B, D] -> [L, B, vocabulary]."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(self._logits(hidden_states), self.tp_group)
        return whole[..., : self.model.vocab_size]

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.decoder.final_layernorm(hidden_states)
        return self._head(self._gathered(normed) if self.config.sequence_parallel else normed)

    def _gathered(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[L/TP, B, D] -> [L, B, D]; what comes back for it is whole on every tensor rank."""
        return tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
        )

    def _head(self, normed: torch.Tensor) -> torch.Tensor:
        """[n, B, D] -> logits [n, B, vocabulary/TP], -inf at pads."""
        assert self.output_layer is not None
        weight = None
        if self.model.tie_embeddings:
            assert self.embedding is not None
            weight = self.embedding.weight
        logits, _ = self.output_layer(normed, weight=weight)
        if self.own_vocabulary < self._vocabulary_rows:
            with torch.no_grad():  # what comes back for them is zero, like their share of the softmax
                logits[..., self.own_vocabulary :] = -torch.inf
        return logits

    def _draw_vocabulary(self, weight: torch.Tensor, draw: Callable[[torch.Tensor], object]) -> None:
        """The rows of all tensor ranks: tokens' as without pads, pads zero."""
        draw(weight[: self.model.vocab_size])
        weight[self.model.vocab_size :] = 0

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.embedding is not None
        embedded = self.embedding(tokens)
        if self.config.sequence_parallel:  # [L/TP, B, D] already
            return embedded
        return embedded.transpose(0, 1).contiguous()  # Megatron's layout, [L, B, D]

    def _pass_input(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of pass n the final hidden states of pass n-1, normed, with embeddings, if configured."""
        if self.pass_norm is not None:
            hidden_states = self.pass_norm(hidden_states)
        if self.reinject_embeddings:
            hidden_states = hidden_states + self._embed(tokens)
        return hidden_states

    def _window(self, segment: Segment, tokens: torch.Tensor, document_starts: torch.Tensor | None = None) -> Window:
        """The segment's window; tokens [B, T] are the whole sequences' inputs.

        Reads no parameter: ZeRO-3 gathers one on access and expects the same order in every segment.
        """
        length, cached = len(segment.tokens), sum(map(len, segment.cached))
        positions = Positions((segment.position if self.sleep.eviction == "sliding" else 0,), length)
        documents = None
        if document_starts is not None and cached:
            documents = window_tokens(document_starts.long().cumsum(1), segment)
        if not segment.padded and documents is None:
            mask = self._mask(length, cached, tokens.device) if cached else None
            return Window(positions, None, mask, segment.final_blocks, dropout=self._dropout(segment))
        assert self.model.pad_token_id is not None
        padding_mask = window_tokens(tokens, segment) != self.model.pad_token_id
        own_padding = padding_mask[:, cached:].t() if segment.padded else None
        if documents is not None:
            padding_mask &= documents == documents[:, cached, None]
        mask = mask_padding(self._mask(length, cached, tokens.device), padding_mask)
        return Window(positions, own_padding, mask, segment.final_blocks, dropout=self._dropout(segment))

    def _dropout(self, segment: Segment) -> Dropout | None:
        if not (self.dropout and segment.dropout_seeds):
            return None
        shard = self.tp_group.rank() if self.sequence_shards > 1 else 0
        which = segment.window, segment.pass_number
        return Dropout(self.dropout, segment.dropout_seeds, which, len(segment.tokens), shard)

    def _mask(self, length: int, cached: int, device: torch.device) -> torch.Tensor:
        mask = self._masks.get((length, cached))
        if mask is None or mask.device != device:
            mask = self._masks[length, cached] = sliding_mask(length, cached, self.model.window, device)
        return mask


def transformer_config(
    model: ModelConfig,
    tensor_parallel_size: int,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
    draw: bool = True,
) -> TransformerConfig:
    """Megatron-core's config for `model`."""

    def fan_in(weight: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return draw_normal(weight, gain / math.sqrt(weight.shape[1]), draw)

    def residual_branch(weight: torch.Tensor) -> torch.Tensor:  # two branches a block add up in the residual stream
        return fan_in(weight, 1 / math.sqrt(2 * model.num_layers))

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=tensor_parallel_size,  # required by Megatron; mixers have their own
        **model.mlp.transformer_config(),
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.zero_centred_norms,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method=fan_in,
        output_layer_init_method=residual_branch,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        # Weights are drawn whole on the CPU and sliced: the same model for every degree of tensor parallelism.
        use_cpu_initialization=True,
        # Megatron's fused kernels need CUDA extensions that Powernap does not require.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def _without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    config = copy.copy(config)
    config.sequence_parallel = False
    return config


def draw_normal(weight: torch.Tensor, std: float, draw: bool) -> torch.Tensor:
    """In place; not `draw`: nothing. Without any initialisation Megatron-core would not mark the weight as split."""
    return torch.nn.init.normal_(weight, 0.0, std) if draw else weight
