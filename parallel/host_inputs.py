"""Inputs of live segments in host memory: `train.offload_inputs`.

What a segment's recomputation starts from, hidden states and layer states, is copied to the host when the segment runs, and
back while the backward pass before its own runs. On CUDA both copies run on a stream of their own, from and to pinned
memory: not run on a device yet. Elsewhere the same code copies at once.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch

Place = tuple[int, int]  # micro-batch and segment


class HostInputs:
    """The inputs of one step's segments on one stage.

    Args:
        order: of the stage's backward passes.
    """

    def __init__(self, device: torch.device, order: list[Place]):
        self._stream = _copy_stream(device)
        self._following = dict(pairwise(order))
        self._saved: dict[Place, list[_Saved]] = defaultdict(list)
        # A state that no segment changes is an input of several: one copy, as long as one of them lives.
        self._copies: WeakKeyDictionary[torch.UntypedStorage, dict[tuple, torch.Tensor]] = WeakKeyDictionary()

    @contextmanager
    def keeping(self, place: Place) -> Iterator[None]:
        """Inside, tensors that autograd saves are copied to the host."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._save(place, tensor), _Saved.load):
            yield

    def begin_backward(self, place: Place) -> None:
        """Begin to copy back what the backward pass after this one needs."""
        self._saved.pop(place, None)
        for saved in self._saved.pop(self._following.get(place, place), []):
            saved.fetch()

    def _save(self, place: Place, tensor: torch.Tensor) -> "_Saved":
        tensor = tensor.detach()
        copies = self._copies.setdefault(tensor.untyped_storage(), {})
        key = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
        if key not in copies:
            copies[key] = self._copied(tensor)
        saved = _Saved(copies[key], tensor.device, self._stream)
        self._saved[place].append(saved)
        return saved

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        with _on(self._stream):
            host.copy_(tensor, non_blocking=True)
        if self._stream:  # the allocator gives its memory to nobody before the copy is done
            tensor.record_stream(self._stream)
        return host


class _Saved:
    """One saved tensor: on the host, and before its use on the device again."""

    def __init__(self, host: torch.Tensor, device: torch.device, stream: torch.cuda.Stream | None):
        self._host, self._device, self._stream = host, device, stream
        self._fetched: torch.Tensor | None = None
        self._is_there: torch.cuda.Event | None = None

    def fetch(self) -> None:
        with _on(self._stream):
            self._fetched = self._host.to(self._device, non_blocking=True, copy=True)
            self._is_there = self._stream.record_event() if self._stream else None

    def load(self) -> torch.Tensor:
        if self._fetched is None:
            self.fetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        if self._is_there:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._is_there)  # not for the stream: it copies the next segment's by now
            fetched.record_stream(current)
        return fetched


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One for all steps: the allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Inside, work is queued on `stream`, behind what is queued by now; None: nothing changes."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def release(*tensors: torch.Tensor | None) -> None:
    """Free the memory of leaves and outputs of which autograd needs shape and gradient alone."""
    for tensor in tensors:
        if tensor is not None:
            tensor.data = tensor.new_zeros(()).expand(tensor.shape)
