"""Segments: the passes of a batch over its windows, in order. The same list drives one process and a pipeline.

A segment is (window, pass). Consolidation windows, which hold no loss token, are slept on: N passes, each writing the
fast weights. Prediction windows are read once and carry the loss (method: arXiv 2605.26099, algorithm 1); with
sleep.every_window they are then slept on too, except the last: in text every token bears loss. With sleep.carry the last
one is as well, for the next sequence of the document. Under sliding eviction a window also leaves the keys and values
of each attention block's last pass.

With sleep.write=last a block's fast weights change in its last pass over a window only: every pass, the awake one
included, starts from the state at the window's start and updates its own copy; all but the last discard it.

Nothing here imports torch: `powernap plan` cuts a recipe as training cuts a batch (model/batch.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from powernap.model.config import ModelConfig, SleepConfig


@dataclass(frozen=True)
class Segment:
    """One pass over one window."""

    window: int
    pass_number: int  # from 1; 0: the awake pass over a window that is slept on next
    tokens: range  # in the inputs
    blocks: range  # the blocks this pass runs
    final_blocks: range  # those that no later pass over this window runs
    from_embeddings: bool = True  # False: from the hidden states of the previous pass
    predicts: bool = False  # the window holds loss tokens: the output head runs
    state_only: bool = False  # the hidden states are unused: stop at the last write
    padded: bool = False  # some sequence of the batch has pads in this window, or among the cached tokens before it
    with_grad: bool = True  # False: before the last k passes of truncated back-propagation, and after the last loss

    @property
    def where(self) -> slice:
        """Its tokens, to index the inputs with."""
        return slice(self.tokens.start, self.tokens.stop)

    @property
    def label(self) -> str:
        """Two characters: the window as a letter, the pass as a digit, "?" where it predicts."""
        window = chr(ord("a") + self.window % 26)
        return window + ("?" if self.predicts else str(self.pass_number % 10))


def windows_of(length: int, model: ModelConfig) -> list[range]:
    """Split `length` inputs into windows; the last one may be short."""
    return [
        range(number * model.window, min((number + 1) * model.window, length))
        for number in range(math.ceil(length / model.window))
    ]


def cut(
    windows: Sequence[range],
    reads: Sequence[bool],
    padded: Sequence[bool],
    model: ModelConfig,
    sleep: SleepConfig,
    passes: int,
) -> list[Segment]:
    """Cut a sequence into segments.

    Args:
        windows: the token range of each.
        reads: whether each window is read for its loss tokens.
        padded: whether each window, or the cached tokens before it, contain pads.
        passes: N.
    """
    assert passes >= 1
    segments: list[Segment] = []
    every, nothing = range(model.num_layers), range(0)
    for number, (tokens, read, pads) in enumerate(zip(windows, reads, padded, strict=True)):
        last = number == len(windows) - 1
        sleeps = not read or (sleep.every_window and (not last or sleep.carry))
        if read:
            first, final = (0, nothing) if sleeps else (1, every)
            segments.append(Segment(number, first, tokens, every, final, predicts=True, padded=pads))
        if sleeps:
            segments += sleep_on(number, tokens, pads, model, sleep, passes)
    # Segments after the last loss only serve the next sequence, which gets their fast weights detached.
    last_loss = max((index for index, segment in enumerate(segments) if segment.predicts), default=0)
    if sleep.carry:
        segments[last_loss + 1 :] = [replace(segment, with_grad=False) for segment in segments[last_loss + 1 :]]
    return segments


def cached_tokens(start: int, model: ModelConfig, sleep: SleepConfig) -> int:
    """n, the number of cached tokens before a window that begins at `start`."""
    return min(model.window - 1, start) if sleep.eviction == "sliding" else 0


def sleep_on(
    window: int, tokens: range, padded: bool, model: ModelConfig, sleep: SleepConfig, passes: int
) -> list[Segment]:
    """N passes over a consolidation window."""
    loop_start = sleep.loop_range[0] if sleep.loop_range else 0
    return [
        Segment(
            window,
            number,
            tokens,
            blocks,
            final_blocks=range(blocks.start, blocks.stop if number == passes else loop_start),
            from_embeddings=number == 1 or sleep.pass_input == "embeddings",
            state_only=sleep.only_writes(number, passes),
            padded=padded,
            with_grad=sleep.backprop_passes is None or number > passes - sleep.backprop_passes,
        )
        for number, blocks in enumerate(sleep.pass_blocks(model, passes), start=1)
    ]
