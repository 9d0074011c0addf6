"""Sleep: read a batch window by window, write each into the fast weights, answer from them.

The loop below is the algorithm of arXiv 2605.26099 as one process runs it, with hard eviction or sliding windows. Every
parallel schedule runs the same segments and is tested against it.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from powernap.model.fast_weights import LayerStates
from powernap.model.health import FastWeightHealth
from powernap.model.segments import Segment
from powernap.model.stage import HybridStage


@dataclass
class SleepOutput:
    loss: torch.Tensor  # sum over the loss tokens
    predictions: (
        torch.Tensor | None
    )  # [B, T], the most likely token at each position of a prediction window, -1 elsewhere
    token_losses: torch.Tensor | None  # [B, T], in nats; 0 where the loss mask is unset
    layer_states: LayerStates  # after the last window


def sleep_and_predict(
    stage: HybridStage,
    segments: list[Segment],
    tokens: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    layer_states: LayerStates | None = None,
    recompute: bool = True,
    predict: bool = False,
    health: FastWeightHealth | None = None,
) -> SleepOutput:
    """Run the segments of one micro-batch in order.

    Args:
        tokens, loss_mask: [B, T]; inputs are tokens[:, :-1], targets tokens[:, 1:].
        layer_states: the sequences' initial states; None: zero fast weights.
        recompute: keep only each segment's inputs and recompute the rest in the backward pass.
        predict: also return the predictions and the loss of each token.
        health: watches norms and gates of the fast weights.
    """
    inputs, targets, loss_mask = tokens[:, :-1], tokens[:, 1:], loss_mask[:, 1:]
    layer_states = stage.empty_layer_states(len(tokens)) if layer_states is None else layer_states
    hidden_states = None
    loss = layer_states[0].new_zeros(()) if layer_states else torch.zeros((), device=tokens.device)
    predictions = torch.full_like(tokens, -1) if predict else None
    token_losses = torch.zeros_like(tokens, dtype=loss.dtype) if predict else None
    for segment in segments:
        run = partial(_run, stage, segment, inputs)
        with (
            nullcontext() if segment.with_grad else torch.no_grad(),
            health.watch(segment) if health else nullcontext(),
        ):
            if recompute and torch.is_grad_enabled():  # no dropout anywhere: no random state to restore
                results = checkpoint(run, hidden_states, *layer_states, use_reentrant=False, preserve_rng_state=False)
            else:
                results = run(hidden_states, *layer_states)
        hidden_states, *states = results
        layer_states = tuple(states)
        if health:
            health.record(segment, layer_states)
        if not segment.predicts:
            continue
        where = segment.where
        losses = stage.token_losses(hidden_states, targets[:, where], loss_mask[:, where], recompute=recompute)
        loss = loss + losses.sum()
        if predictions is not None and token_losses is not None:
            predictions[:, 1:][:, where] = stage.predictions(hidden_states)
            token_losses[:, 1:][:, where] = losses.detach()
    return SleepOutput(loss, predictions, token_losses, layer_states)


def _run(
    stage: HybridStage,
    segment: Segment,
    inputs: torch.Tensor,
    hidden_states: torch.Tensor | None,
    *layer_states: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Run one segment; return its hidden states, and each block's new state."""
    hidden_states, states = stage(segment, inputs, hidden_states, layer_states)
    return hidden_states, *states
