"""Token-by-token decoding with sleep: the computation of model/sleep.py, incrementally.

Windows begin at multiples of L from the start of a stream. The current window is *awake*: its tokens go once through
all blocks; attention caches their keys and values, at most L, a recurrent mixer its running state and the last inputs
of its convolution. When the window is full and another token arrives, it sleeps: N passes, the same segments as in
training, from the fast weights at the window's start; with sleep.every_window from those after its tokens were read,
unless only the last pass writes. Its keys and values are then evicted; under sliding eviction the newest L-1 of the
last pass stay.

So every next token has the distribution of the training-time forward pass that sleeps on all earlier windows and
predicts in the current one. Memory and time per awake token depend on L, not on N or the length of the stream so far.

A stream does not know which of its tokens would bear loss. Training without sleep.every_window reads consecutive
windows of answers once each; here all but the last of them sleep like any other window.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from powernap.model.fast_weights import LayerStates
from powernap.model.part import Mixer
from powernap.model.segments import sleep_on
from powernap.model.stage import HybridStage
from powernap.model.window import Positions, Window


class Decoder:
    """A batch of streams, each at its own position. For a whole model on one rank, without tensor parallelism.

    Args:
        passes: N of every sleep.
        batch: B, streams.

    Attributes:
        logits: [B, vocabulary], of the next token of each stream; zeros before the first token.
    """

    def __init__(self, stage: HybridStage, passes: int, batch: int):
        assert passes >= 1 and batch >= 1
        model, sleep = stage.model, stage.sleep
        self.stage = stage
        self.passes = passes
        self.batch = batch
        # Slots of attention's cache: the newest tokens of earlier windows, then the L of this one.
        self._before = model.window - 1 if sleep.eviction == "sliding" else 0
        self._caches = stage.init_caches(batch, self._before + model.window)
        # Sleep starts from the fast weights after the awake pass, or else from those before it.
        self._starts_after_reading = sleep.every_window and sleep.write == "every"
        self._at_start = {} if self._starts_after_reading else self._fast_weights()
        # Bookkeeping stays on the CPU: control flow depends on it.
        self._tokens = torch.full((batch, self._before + model.window), -1)  # by slot; -1: none yet
        self._start = torch.zeros(batch, dtype=torch.int64)  # of the current window, in the stream
        self._filled = torch.zeros(batch, dtype=torch.int64)  # tokens read of the current window
        self.logits = torch.zeros((batch, model.vocab_size), dtype=stage.dtype, device=stage.device)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens each stream has read."""
        return (self._start + self._filled).tolist()

    @torch.no_grad()
    def feed(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read tokens, any number for each stream; streams that get none stay as they are.

        Returns:
            `logits`, which the next call overwrites
        """
        for _ in self._feed(tokens, every_token=False):
            pass
        return self.logits

    @torch.no_grad()
    def feed_with_logits(self, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """`feed`, with the logits after every token: one [n, vocabulary] for each stream."""
        logits: list[list[torch.Tensor]] = [[] for _ in range(self.batch)]
        for rows, new in self._feed(tokens, every_token=True):
            for column, row in enumerate(rows):
                logits[row].append(new[:, column])
        return [torch.cat(parts) if parts else self.logits.new_zeros((0, self.logits.shape[1])) for parts in logits]

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget at the end what is read inside: a probe, whose answer leaves no trace.

        Full windows sleep first, as they would before any next token.
        """
        if full := [row for row in range(self.batch) if self._is_full(row)]:
            with torch.no_grad():
                self._sleep(full)
        before = {name: tensor.clone() for name, tensor in self._named().items()}
        try:
            yield
        finally:
            self.load_state(before)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, by name, of all that later logits depend on besides the weights and N."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._named().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from the `state` of a decoder with the same model and number of streams."""
        tensors = self._named()
        assert tensors.keys() == state.keys()
        for name, tensor in tensors.items():
            assert tensor.shape == state[name].shape and tensor.dtype == state[name].dtype, name
            tensor.copy_(state[name])

    def nbytes(self) -> int:
        """Bytes of all tensors held, excluding the model's."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._named().values())

    def _feed(self, tokens: Sequence[Sequence[int]], every_token: bool) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Read `tokens`, sleeping on full windows; yields each pass's rows and logits, of all n tokens or the last."""
        assert len(tokens) == self.batch
        window = self.stage.model.window
        coming = [torch.as_tensor(list(row), dtype=torch.int64) for row in tokens]
        # If no logits are requested, skip the awake pass over a window that is about to be consolidated, unless sleep
        # starts from the state after that pass.
        may_skip = not every_token and not self._starts_after_reading
        while rows := [row for row in range(self.batch) if len(coming[row])]:
            if full := [row for row in rows if self._is_full(row)]:
                self._sleep(full)
            room = {row: window - int(self._filled[row]) for row in rows}
            overfull = [row for row in rows if len(coming[row]) > room[row]]
            if may_skip and overfull:
                for row in overfull:
                    self._fill(row, coming[row][: room[row]])
                    coming[row] = coming[row][room[row] :]
                continue
            length = min(min(room[row], len(coming[row])) for row in rows)
            yield rows, self._read(rows, torch.stack([coming[row][:length] for row in rows]), every_token)
            for row in rows:
                coming[row] = coming[row][length:]

    def _is_full(self, row: int) -> bool:
        return int(self._filled[row]) == self.stage.model.window

    def _fill(self, row: int, tokens: torch.Tensor) -> None:
        """Complete the window of `row` without reading it."""
        self._tokens[row, self._before + int(self._filled[row]) :] = tokens
        self._filled[row] = self.stage.model.window

    def _read(self, rows: list[int], tokens: torch.Tensor, every_token: bool) -> torch.Tensor:
        """Read tokens [R, n] into windows with room for them, in one pass; the logits of all n, or of the last."""
        offsets = self._filled[rows, None] + torch.arange(tokens.shape[1])
        slots = self._before + offsets
        self._tokens[torch.tensor(rows)[:, None], slots] = tokens
        device = self.logits.device
        positions, mask = self._positions(rows, offsets.t()), self._mask(rows, offsets).to(device)
        window = Window(positions, self._padding_mask(tokens), mask, slots=slots.to(device))

        everyone = len(rows) == self.batch
        caches = self._caches
        if not everyone:
            caches = [{name: tensor[rows] for name, tensor in cache.items()} for cache in caches]
        hidden_states = self.stage.decode(tokens.to(device), caches, window)
        logits = self.stage.logits(hidden_states if every_token else hidden_states[-1:])
        if not everyone:
            for whole, cache in zip(self._caches, caches, strict=True):
                for name, tensor in cache.items():
                    whole[name][rows] = tensor
        self.logits[rows] = logits[-1]
        self._filled[rows] += tokens.shape[1]
        return logits

    def _sleep(self, rows: list[int]) -> None:
        """Run N passes over the full windows of `rows`; the next windows start from the resulting states."""
        model, sleep, before = self.stage.model, self.stage.sleep, self._before
        tokens = self._tokens[rows, before:]
        device = self.logits.device
        # No mask, plain causal attention, if all tokens are the window's own and none is a pad.
        padded = self._padding_mask(self._tokens[rows]) is not None
        mask = None
        if padded or before:
            mask = self._mask(rows, torch.arange(model.window).expand(len(rows), -1)).to(device)
        awake = Window(self._positions(rows), self._padding_mask(tokens), mask)

        layer_states, hidden_states, tokens = self._states_before_sleep(rows), None, tokens.to(device)
        for segment in sleep_on(0, range(model.window), padded, model, sleep, self.passes):
            window = replace(awake, final_blocks=segment.final_blocks)
            hidden_states, layer_states = self.stage.run_pass(segment, tokens, hidden_states, layer_states, window)

        for index, state in zip(self.stage.decoder.layers_with_state, layer_states, strict=True):
            self._mixer(index).begin_window(self._caches[index], rows, before, state)
            if index in self._at_start:
                self._at_start[index][rows] = state
        self._tokens[rows, :before] = self._tokens[rows, model.window :]
        self._start[rows] += model.window
        self._filled[rows] = 0

    def _states_before_sleep(self, rows: list[int]) -> LayerStates:
        """The states from which the sleep of the current windows starts."""
        return tuple(
            self._at_start[index][rows]
            if index in self._at_start
            else self._mixer(index).state_of(self._caches[index], rows, self._before)
            for index in self.stage.decoder.layers_with_state
        )

    def _mixer(self, block: int) -> Mixer:
        return self.stage.model.mixer(block)

    def _mask(self, rows: list[int], offsets: torch.Tensor) -> torch.Tensor:
        """Attention mask of tokens at `offsets` [R, n] of their windows over cache slots: [R, 1, n, slots to the last].

        A token sees itself and the L-1 tokens before it, as far as they are in the cache, but no pads.
        """
        queries = self._before + offsets
        slots = torch.arange(int(queries.max()) + 1)
        distance = queries[:, :, None] - slots
        first = self._before - self._start[rows].clamp(max=self._before)
        seen = (distance >= 0) & (distance < self.stage.model.window) & (slots >= first[:, None, None])
        pad = self.stage.model.pad_token_id
        if pad is not None:
            padding_mask = self._tokens[rows, : len(slots)] != pad
            seen &= padding_mask[:, None] | (distance == 0)  # a row that sees nothing would be NaN: a pad sees itself
        return seen[:, None]

    def _padding_mask(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """[n, R], False at pads of tokens [R, n]; None: no pads."""
        padding_mask = tokens != self.stage.model.pad_token_id if self.stage.model.pad_token_id is not None else None
        return None if padding_mask is None or padding_mask.all() else padding_mask.t().to(self.logits.device)

    def _positions(self, rows: Sequence[int], offsets: torch.Tensor | None = None) -> Positions:
        """Positions of the current windows, or of their tokens at `offsets` [n, R]."""
        # Under hard eviction positions restart in every window.
        starts = tuple(int(self._start[row]) if self._before else 0 for row in rows)
        return Positions(starts, self.stage.model.window, offsets)

    def _fast_weights(self) -> dict[int, torch.Tensor]:
        """Copies of the fast weights, by block."""
        return {block: self._caches[block]["state"].clone() for block in self.stage.model.fast_weight_blocks}

    def _named(self) -> dict[str, torch.Tensor]:
        named = {"tokens": self._tokens, "start": self._start, "filled": self._filled, "logits": self.logits}
        for index, cache in enumerate(self._caches):
            named |= {f"block_{index}.{name}": tensor for name, tensor in cache.items()}
        return named | {f"block_{index}.at_start": tensor for index, tensor in self._at_start.items()}
