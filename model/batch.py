"""A batch as segments: finds the windows with loss tokens and pads; model/segments.py cuts."""

import torch
import torch.nn.functional as F

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.errors import PowernapError
from powernap.model.segments import Segment, cached_tokens, cut, windows_of


class SegmentError(PowernapError):
    """A batch that cannot be cut into segments, in one line."""


def plan_segments(
    tokens: torch.Tensor, loss_mask: torch.Tensor, model: ModelConfig, sleep: SleepConfig, passes: int
) -> list[Segment]:
    """Cut a batch into segments.

    Args:
        tokens, loss_mask: [B, T] on the CPU (nothing here may wait for a GPU); the inputs are tokens[:, :-1], the
            targets tokens[:, 1:] where loss_mask[:, 1:] is set.
        passes: N of this step.

    A sequence with no loss tokens left follows the others: its results have no effect.

    Raises:
        SegmentError: if the sequences of the batch disagree about which windows hold loss tokens. They would have to
            sleep on different windows; put them in separate batches.
    """
    assert tokens.shape == loss_mask.shape
    windows = windows_of(tokens.shape[1] - 1, model)
    reads, padded = [], []
    for number, window in enumerate(windows):
        ahead = loss_mask[:, window.start + 1 :].any(dim=1)
        predicts = loss_mask[ahead, window.start + 1 : window.stop + 1].any(dim=1)
        if predicts.any() and not predicts.all():
            raise SegmentError(
                f"window {number} (tokens {window.start}..{window.stop - 1}) holds loss tokens in {int(predicts.sum())} "
                f"of {len(predicts)} sequences of a batch; all or none must"
            )
        reads.append(bool(predicts.any()) or (sleep.every_window and not ahead.any()))
        seen = tokens[:, window.start - cached_tokens(window.start, model, sleep) : window.stop]
        padded.append(model.pad_token_id is not None and bool((seen == model.pad_token_id).any()))
    return cut(windows, reads, padded, model, sleep, passes)


def pad_end(
    tokens: torch.Tensor, loss_mask: torch.Tensor, multiple: int, pad_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad [B, T] so that the last window's length is a `multiple`, too: sequence parallelism splits it.

    The model is causal, so pads without loss after the last token change nothing.
    """
    missing = -(tokens.shape[1] - 1) % multiple
    pad = 0 if pad_token_id is None else pad_token_id
    return F.pad(tokens, (0, missing), value=pad), F.pad(loss_mask, (0, missing), value=False)
