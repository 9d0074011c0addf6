"""A batch as segments: finds the windows with loss tokens and pads; model/segments.py cuts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.segments import Probe, Segment, SegmentError, TokenWindow, check_probes, cut, windows_of


def plan_segments(
    tokens: torch.Tensor,
    loss_mask: torch.Tensor,
    model: ModelConfig,
    sleep: SleepConfig,
    passes: int,
    probes: Sequence[Probe] = (),
    sequence_shards: int = 1,
    separate: bool = False,
) -> list[Segment]:
    """Cut a batch into segments.

    Args:
        tokens, loss_mask: [B, T] on the CPU (nothing here may wait for a GPU); the inputs are tokens[:, :-1], the
            targets tokens[:, 1:] where loss_mask[:, 1:] is set.
        passes: N of this step.
        probes: (start, stop) of the tokens that are read, answered and forgotten, in every sequence.
        sequence_shards: ranks that split a window's tokens.
        separate: documents begin within the sequences: every window is read, so that each document is read as if it were alone.

    A sequence with no loss tokens left follows the others: its results have no effect.

    Raises:
        SegmentError: if the sequences of the batch disagree about which windows hold loss tokens. They would have to
            sleep on different windows; put them in separate batches. Or if a probe cannot be read: see `check_probes`.
    """
    assert tokens.shape == loss_mask.shape
    windows = windows_of(tokens.shape[1] - 1, model, sleep, probes, sequence_shards)
    check_probes(windows, model, sleep, sequence_shards)
    answers = loss_mask.clone() if probes else loss_mask  # outside probes
    for start, stop in probes:
        answers[:, start:stop] = False
    reads = []
    for number, (window, probe) in enumerate((window.tokens, window.probe) for window in windows):
        ahead = answers[:, window.start + 1 :].any(dim=1)
        predicts = answers[ahead, window.start + 1 : window.stop + 1].any(dim=1)
        if predicts.any() and not predicts.all() and not probe and not separate:
            raise SegmentError(
                f"window {number} (tokens {window.start}..{window.stop - 1}) holds loss tokens in {int(predicts.sum())} "
                f"of {len(predicts)} sequences of a batch; all or none must"
            )
        reads.append(separate or bool(predicts.any()) or (sleep.every_window and not ahead.any()))
    return cut(windows, reads, [_has_pads(tokens, window, model) for window in windows], model, sleep, passes)


def find_loss_tokens(loss_mask: torch.Tensor) -> torch.Tensor:
    """Where a window's loss tokens are among its L * B hidden states: [B, L] -> [n]. On a GPU it waits for it."""
    return loss_mask.t().flatten().nonzero().squeeze(1)


def window_tokens(tokens: torch.Tensor, window: TokenWindow | Segment) -> torch.Tensor:
    """The tokens that attention sees in a window: [B, T] -> [B, n + L], the cached ones first."""
    return torch.cat([tokens[:, part.start : part.stop] for part in (*window.cached, window.tokens)], dim=1)


def _has_pads(tokens: torch.Tensor, window: TokenWindow, model: ModelConfig) -> bool:
    return model.pad_token_id is not None and bool((window_tokens(tokens, window) == model.pad_token_id).any())


def pad_end(
    tokens: torch.Tensor, loss_mask: torch.Tensor, multiple: int, pad_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad [B, T] so that the last window's length is a `multiple`, too: sequence parallelism splits it.

    The model is causal, so pads without loss after the last token change nothing.
    """
    missing = -(tokens.shape[1] - 1) % multiple
    pad = 0 if pad_token_id is None else pad_token_id
    return F.pad(tokens, (0, missing), value=pad), F.pad(loss_mask, (0, missing), value=False)
