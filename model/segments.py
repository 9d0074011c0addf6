"""Segments: the passes of a batch over its windows, in order. The same list drives one process and a pipeline.

A segment is (window, pass). Consolidation windows, which hold no loss token, are slept on: N passes, each writing the
fast weights. Prediction windows are read once and carry the loss (method: arXiv 2605.26099, algorithm 1); with
sleep.every_window they are then slept on too, except the last: in text every token bears loss. With sleep.carry the last
one is as well, for the next sequence of the document. Under sliding eviction a window also leaves the keys and values
of each attention block's last pass.

A probe window is read for its answers and forgotten: fast weights, caches and positions after it are those before it. It
lies between two windows and counts as none of the sequence's.

With sleep.write=last a block's fast weights change in its last pass over a window only: every pass, the awake one
included, starts from the state at the window's start and updates its own copy; all but the last discard it.

Nothing here imports torch: `powernap plan` cuts a recipe as training cuts a batch (model/batch.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.errors import PowernapError

HEAD_NUMBERS = 2**26  # logits that are computed at once: 256 MB in float32
Probe = tuple[int, int]  # the first token of a probe, and the first after it


class SegmentError(PowernapError):
    """A batch that cannot be cut into segments, in one line."""


@dataclass(frozen=True)
class TokenWindow:
    """The inputs that a window reads."""

    tokens: range
    position: int  # tokens of the sequence before it, without probes
    cached: tuple[range, ...] = ()  # the tokens before it that attention's cache holds
    probe: bool = False


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
    position: int = 0  # of the window's first token in the sequence
    cached: tuple[range, ...] = ()  # the tokens before the window that attention's cache holds
    probe: bool = False  # the states that the window leaves are forgotten
    last_loss: bool = False  # no later segment predicts: its backward pass is the sequence's first
    is_last: bool = False  # of the sequence
    with_grad: bool = True  # False: before the last k passes of truncated back-propagation, and after the last loss
    dropout_seeds: tuple[int, ...] = ()  # of each sequence (model/dropout.py); (): no dropout

    @property
    def where(self) -> slice:
        """Its tokens, to index the inputs with."""
        return slice(self.tokens.start, self.tokens.stop)

    def mean_keys(self, window: int) -> float:
        """Keys that a token sees in attention, itself among them and at most `window`: the mean over the tokens."""
        cached, length = sum(map(len, self.cached)), len(self.tokens)
        rising = min(length, window - cached)  # tokens that see more than the one before
        return (rising * cached + rising * (rising + 1) / 2 + (length - rising) * window) / length

    @property
    def label(self) -> str:
        """Two characters: the window as a letter, the pass as a digit, "?" where it predicts."""
        window = chr(ord("a") + self.window % 26)
        return window + ("?" if self.predicts else str(self.pass_number % 10))


def windows_of(
    length: int, model: ModelConfig, sleep: SleepConfig, probes: Sequence[Probe] = (), multiple: int = 1
) -> list[TokenWindow]:
    """Split `length` inputs into windows; the last one may be short.

    Args:
        probes: in rising order. The last token of each is a target only, so its window ends before.
        multiple: lengths of probe windows are multiples of it if possible: sequence parallelism splits them.
    """
    windows: list[TokenWindow] = []
    read: list[range] = []  # by windows that are no probes
    position = 0
    for start, stop, probe in spans(length, model.window, probes):
        if probe:
            stop = start + min(math.ceil((stop - 1 - start) / multiple) * multiple, stop - start)
        tokens = range(start, min(stop, length))
        windows.append(TokenWindow(tokens, position, _cached(read, model, sleep), probe))
        if not probe:
            read.append(tokens)
            position += len(tokens)
    return windows


def spans(length: int, window: int, probes: Sequence[Probe]) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it is a probe) of each of `probes` and of the windows between them."""
    end = 0
    for start, stop in [*probes, (length, length)]:
        yield from ((first, min(first + window, start), False) for first in range(end, start, window))
        if start < length:
            yield start, stop, True
        end = stop


def check_probes(windows: Sequence[TokenWindow], model: ModelConfig, sleep: SleepConfig, multiple: int = 1) -> None:
    """Raise SegmentError if a probe would change the other windows, or is none that can be read."""
    # Where the end of a window changes nothing, a probe may lie anywhere.
    anywhere = sleep.eviction == "sliding" and not model.fast_weight_blocks and max(sleep.pass_choices) == 1
    for window in windows:
        if not window.probe:
            continue
        probe = f"the probe at token {window.tokens.start}"
        if window.position % model.window and not anywhere:
            raise SegmentError(
                f"{probe} comes after {window.position} tokens, within a window of model.window={model.window}: write probes "
                "between windows"
            )
        if len(window.tokens) > model.window:
            raise SegmentError(
                f"{probe} reads {len(window.tokens)} tokens, a window has model.window={model.window}: write a shorter one"
            )
        if len(window.tokens) % multiple:
            raise SegmentError(
                f"{probe} reads {len(window.tokens)} tokens, which parallel.tensor={multiple} ranks cannot split: pad it, or "
                "write parallel.sequence=false"
            )


def _cached(read: list[range], model: ModelConfig, sleep: SleepConfig) -> tuple[range, ...]:
    """The newest L-1 tokens of the windows in `read`, which sliding eviction keeps."""
    missing = model.window - 1 if sleep.eviction == "sliding" else 0
    cached: list[range] = []
    for before in reversed(read):
        if missing <= 0:
            break
        cached.insert(0, before[-missing:])
        missing -= len(before)
    return tuple(cached)


def cut(
    windows: Sequence[TokenWindow],
    reads: Sequence[bool],
    padded: Sequence[bool],
    model: ModelConfig,
    sleep: SleepConfig,
    passes: int,
) -> list[Segment]:
    """Cut a sequence into segments.

    Args:
        windows: as `windows_of` splits the inputs.
        reads: whether each window is read for its loss tokens; a probe always is.
        padded: whether each window, or the cached tokens before it, contain pads.
        passes: N.
    """
    assert passes >= 1
    segments: list[Segment] = []
    every, nothing = range(model.num_layers), range(0)
    last = max((number for number, window in enumerate(windows) if not window.probe), default=0)
    for number, (window, read, pads) in enumerate(zip(windows, reads, padded, strict=True)):
        sleeps = not window.probe and (not read or (sleep.every_window and (number != last or sleep.carry)))
        of_window = []
        if read or window.probe:
            first, final = (0, nothing) if sleeps else (1, every)
            of_window.append(Segment(number, first, window.tokens, every, final, predicts=True, padded=pads))
        if sleeps:
            of_window += sleep_on(number, window.tokens, pads, model, sleep, passes)
        segments += [
            replace(segment, position=window.position, cached=window.cached, probe=window.probe)
            for segment in of_window
        ]
    # Segments after the last loss only serve the next sequence, which gets their fast weights detached.
    last_loss = max((index for index, segment in enumerate(segments) if segment.predicts), default=0)
    if sleep.carry:
        segments[last_loss + 1 :] = [replace(segment, with_grad=False) for segment in segments[last_loss + 1 :]]
    segments[last_loss] = replace(segments[last_loss], last_loss=segments[last_loss].predicts)
    segments[-1] = replace(segments[-1], is_last=True)
    return segments


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
