"""Segments: what a batch has to run, in which order. The same list drives one process and a pipeline.

A segment is (window, pass). Consolidation windows, which hold no loss token, are slept on: N passes, each writing the
fast weights. Prediction windows are read once and carry the loss (method: arXiv 2605.26099, algorithm 1); with
sleep.every_window they are then slept on too, except the last: in text every token bears loss. With sleep.carry the last
one is as well, for the next sequence of the document. Under sliding eviction a window also leaves keys and values: of each
attention block those of its last pass.

With sleep.write=last a block's fast weights change in its last pass over a window only: every pass, reading included,
begins with the state of the window's start, reads and updates a copy of its own, and all but the last drop it.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.errors import PowernapError


class SegmentError(PowernapError):
    """A batch that cannot be cut into segments, in one line."""


@dataclass(frozen=True)
class Segment:
    """One pass over one window."""

    window: int
    pass_number: int  # from 1; 0 where a window that is slept on is read before
    tokens: tuple[int, int]  # [start, stop) in the inputs
    blocks: tuple[int, int]  # [start, stop) of the blocks this pass runs
    final_blocks: tuple[int, int]  # [start, stop) of those that no later pass over this window runs
    from_embeddings: bool = True  # False: from the hidden states of the pass before
    predicts: bool = False  # the window holds loss tokens: the output head runs
    write_only: bool = False  # nobody reads the hidden states: skip what follows the last write
    padded: bool = False  # some sequence of the batch has pads in this window, or among the cached tokens before it
    with_grad: bool = True  # False: before the last k passes of truncated back-propagation, and after the last loss


def plan_segments(
    tokens: torch.Tensor, loss_mask: torch.Tensor, model: ModelConfig, sleep: SleepConfig, passes: int
) -> list[Segment]:
    """Cut a batch into segments.

    Args:
        tokens, loss_mask: [B, T] on the CPU (nothing here may wait for a GPU); the inputs are tokens[:, :-1], the
            targets tokens[:, 1:] where loss_mask[:, 1:] is set.
        passes: N of this step.

    A sequence whose loss tokens are all behind it, or that has none, goes along with the others: what becomes of it has
    no effect.

    Raises:
        SegmentError: if the sequences of the batch disagree about which windows hold loss tokens. They would have to
            sleep on different windows; batch them apart.
    """
    assert passes >= 1 and tokens.shape == loss_mask.shape
    length = tokens.shape[1] - 1
    segments = []
    for window, start in enumerate(range(0, length, model.window)):
        stop = min(start + model.window, length)
        ahead = loss_mask[:, start + 1 :].any(dim=1)
        predicts = loss_mask[ahead, start + 1 : stop + 1].any(dim=1)
        if predicts.any() and not predicts.all():
            raise SegmentError(
                f"window {window} (tokens {start}..{stop - 1}) holds loss tokens in {int(predicts.sum())} of "
                f"{len(predicts)} sequences of a batch; all or none must"
            )
        cached = cached_tokens(start, model, sleep)
        padded = model.pad_token_id is not None and bool((tokens[:, start - cached : stop] == model.pad_token_id).any())
        reads = bool(predicts.any()) or (sleep.every_window and not ahead.any())
        sleeps = not reads or (sleep.every_window and (stop < length or sleep.carry))
        if reads:
            every = (0, model.num_layers)
            number, final = (0, (0, 0)) if sleeps else (1, every)
            segments.append(Segment(window, number, (start, stop), every, final, predicts=True, padded=padded))
        if sleeps:
            segments += sleep_on(window, (start, stop), padded, model, sleep, passes)
    # What follows the last loss is there for the next sequence only, where its fast weights arrive detached.
    last_loss = max((index for index, segment in enumerate(segments) if segment.predicts), default=0)
    if sleep.carry:
        segments[last_loss + 1 :] = [replace(segment, with_grad=False) for segment in segments[last_loss + 1 :]]
    return segments


def cached_tokens(start: int, model: ModelConfig, sleep: SleepConfig) -> int:
    """n, tokens whose keys and values a window that begins at `start` finds in the cache."""
    return min(model.window - 1, start) if sleep.eviction == "sliding" else 0


def sleep_on(
    window: int, tokens: tuple[int, int], padded: bool, model: ModelConfig, sleep: SleepConfig, passes: int
) -> list[Segment]:
    """N passes over a consolidation window."""
    loop_start = sleep.loop_range[0] if sleep.loop_range else 0
    return [
        Segment(
            window,
            number,
            tokens,
            blocks=(blocks.start, blocks.stop),
            final_blocks=(blocks.start, blocks.stop if number == passes else loop_start),
            from_embeddings=number == 1 or sleep.pass_input == "embeddings",
            write_only=sleep.only_writes(number, passes),
            padded=padded,
            with_grad=sleep.backprop_passes is None or number > passes - sleep.backprop_passes,
        )
        for number, blocks in enumerate(sleep.pass_blocks(model, passes), start=1)
    ]


def pad_end(
    tokens: torch.Tensor, loss_mask: torch.Tensor, multiple: int, pad_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengthen [B, T] so that the last window's inputs are a multiple too, as sequence parallelism splits them.

    What is added comes after everything else in a causal model and bears no loss.
    """
    missing = -(tokens.shape[1] - 1) % multiple
    pad = 0 if pad_token_id is None else pad_token_id
    return F.pad(tokens, (0, missing), value=pad), F.pad(loss_mask, (0, missing), value=False)
