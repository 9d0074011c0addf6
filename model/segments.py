"""Segments: what a batch has to run, in which order. The same list drives one process and a pipeline.

A segment is (window, pass). Consolidation windows, which hold no loss token, are slept on: N passes, each writing the
fast weights. Prediction windows are read once and carry the loss (method: arXiv 2605.26099, algorithm 1, hard eviction).
"""

from dataclasses import dataclass

import torch

from powernap.model.config import GATED_DELTA_NET, ModelConfig, SleepConfig


class SegmentError(ValueError):
    """A batch that cannot be cut into segments, in one line."""


@dataclass(frozen=True)
class Segment:
    """One pass over one window."""

    window: int
    pass_number: int  # from 1
    tokens: tuple[int, int]  # [start, stop) in the inputs
    blocks: tuple[int, int]  # [start, stop) of the blocks this pass runs
    predicts: bool = False  # the window holds loss tokens: the output head runs
    write_only: bool = False  # nobody reads the hidden states: skip what follows the last write
    padded: bool = False  # some sequence of the batch has pads in this window
    with_grad: bool = True  # False: before the last k passes of truncated back-propagation


def plan_segments(
    tokens: torch.Tensor, loss_mask: torch.Tensor, model: ModelConfig, sleep: SleepConfig, passes: int
) -> list[Segment]:
    """Cut a batch into segments.

    Args:
        tokens, loss_mask: [B, T] on the CPU (nothing here may wait for a GPU); the inputs are tokens[:, :-1], the
            targets tokens[:, 1:] where loss_mask[:, 1:] is set.
        passes: N of this step.

    Raises:
        SegmentError: if the sequences of the batch disagree about which windows hold loss tokens. They would have to
            sleep on different windows; batch them apart.
    """
    assert passes >= 1 and tokens.shape == loss_mask.shape
    length = tokens.shape[1] - 1
    segments = []
    for window, start in enumerate(range(0, length, model.window)):
        stop = min(start + model.window, length)
        predicts = loss_mask[:, start + 1 : stop + 1].any(dim=1)
        if predicts.any() and not predicts.all():
            raise SegmentError(
                f"window {window} (tokens {start}..{stop - 1}) holds loss tokens in {int(predicts.sum())} of "
                f"{len(predicts)} sequences of a batch; all or none must"
            )
        padded = model.pad_token_id is not None and bool((tokens[:, start:stop] == model.pad_token_id).any())
        if predicts.any():
            segments.append(Segment(window, 1, (start, stop), (0, model.num_layers), predicts=True, padded=padded))
        else:
            segments += _sleep_on(window, (start, stop), padded, model, sleep, passes)
    return segments


def _sleep_on(
    window: int, tokens: tuple[int, int], padded: bool, model: ModelConfig, sleep: SleepConfig, passes: int
) -> list[Segment]:
    """N passes over a consolidation window. Blocks before the loop run in the first pass, those after in the last."""
    loop_start, loop_stop = sleep.loop_range or (0, model.num_layers)
    last_write = model.pattern.rfind(GATED_DELTA_NET)
    segments = []
    for number in range(1, passes + 1):
        last = number == passes
        segments.append(
            Segment(
                window,
                number,
                tokens,
                # The last pass ends with the last write: the window's hidden states are dropped after it.
                blocks=(0 if number == 1 else loop_start, last_write + 1 if last else loop_stop),
                write_only=last,
                padded=padded,
                with_grad=sleep.backprop_passes is None or number > passes - sleep.backprop_passes,
            )
        )
    return segments
