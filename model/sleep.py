"""Sleep: read a batch window by window, write each into the fast weights, answer from them.

The loop below is the algorithm of arXiv 2605.26099 as one process runs it, with hard eviction or sliding windows. Every
parallel schedule runs the same segments and is tested against it.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from powernap.model.fast_weights import LayerStates
from powernap.model.health import FastWeightHealth
from powernap.model.recompute import Recompute, keeps_logits, run_segment
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
    document_starts: torch.Tensor | None = None,
    recompute: Recompute = "segment",
    predict: bool = False,
    health: FastWeightHealth | None = None,
) -> SleepOutput:
    """Run the segments of one micro-batch in order.

    Args:
        tokens, loss_mask: [B, T]; inputs are tokens[:, :-1], targets tokens[:, 1:].
        layer_states: the sequences' initial states; None: zero fast weights.
        document_starts: bool [B, T], True at tokens that know nothing of those before; see HybridStage.forward.
        recompute: what is kept of each segment; the rest is computed again in the backward pass.
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
        with (
            nullcontext() if segment.with_grad else torch.no_grad(),
            health.watch(segment) if health else nullcontext(),
        ):
            hidden_states, layer_states = run_segment(
                stage, segment, inputs, hidden_states, layer_states, recompute, document_starts
            )
        if health:
            health.record(segment, layer_states)
        if not segment.predicts:
            continue
        assert hidden_states is not None
        where = segment.where
        again = not keeps_logits(recompute, segment, pipeline=False)
        losses = stage.token_losses(hidden_states, targets[:, where], loss_mask[:, where], recompute=again)
        loss = loss + losses.sum()
        if predictions is not None and token_losses is not None:
            predictions[:, 1:][:, where] = stage.predictions(hidden_states)
            token_losses[:, 1:][:, where] = losses.detach()
    return SleepOutput(loss, predictions, token_losses, layer_states)
