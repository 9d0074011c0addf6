"""Loss terms: what is added to the cross-entropy of each loss token, from the output head's logits there.

A term is a number for each token, so that it is the same in every layout: the head runs on some of a step's loss tokens at a
time, on the last pipeline stage, with the vocabulary split over tensor ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from powernap.model.errors import PowernapError
from powernap.model.megatron import tensor_parallel


class LossTermError(PowernapError):
    """A loss term that cannot be used, in one line."""


class Rows(NamedTuple):
    """Some of a step's loss tokens, as the head hands them to the terms."""

    logits: (
        torch.Tensor
    )  # float32 or float64 [n, vocabulary/TP], -inf at the pads of a vocabulary that the ranks do not divide
    targets: torch.Tensor  # [n]
    taught: torch.Tensor | None  # [n, D] of a teacher (parallel/teacher.py); None: there is none
    group: dist.ProcessGroup  # the tensor ranks
    vocab_size: int


class Term(Protocol):
    """What `LossTerms` adds up."""

    @property
    def name(self) -> str: ...

    def weight_at(self, step: int) -> float: ...

    def values(self, rows: Rows) -> torch.Tensor:
        """[n], the same on all tensor ranks."""


@dataclass(frozen=True)
class LossTerm:
    """A loss term of one's own.

    Args:
        name: of its metric, `loss/NAME`: the mean over a step's loss tokens, without the weight.
        function: (logits [n, vocabulary], float32, targets [n]) -> [n], differentiable in the logits. It gets some of the loss
            tokens at a time, in any order, and is called again in the backward pass: it must depend on its arguments alone.
        weight: what it is multiplied by; a number, or a function of the step, counted from 1. Where it is 0 the term is left out.
    """

    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weight: float | Callable[[int], float] = 1.0

    def weight_at(self, step: int) -> float:
        return self.weight(step) if callable(self.weight) else self.weight

    def values(self, rows: Rows) -> torch.Tensor:
        targets = rows.targets
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(rows.logits, rows.group)
        values = self.function(whole[:, : rows.vocab_size], targets)
        if not torch.is_tensor(values) or values.shape != targets.shape:
            found = list(values.shape) if torch.is_tensor(values) else type(values).__name__
            raise LossTermError(
                f"loss term {self.name} returned {found} for {len(targets)} tokens: return a number for each, [{len(targets)}]"
            )
        return values


class LossTerms:
    """The terms of a run, and their sums over the tokens of a step that this rank has seen."""

    def __init__(self, terms: Sequence[Term], device: torch.device):
        names = [term.name for term in terms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise LossTermError(f"two loss terms are named {twice}")
        self._terms, self._device = terms, device
        self.begin(1)

    def begin(self, step: int) -> None:
        """Take the weights of a step, and sum from zero."""
        weights = {term: weight for term in self._terms if (weight := term.weight_at(step))}
        self.active = list(weights)
        self._weights = torch.tensor(list(weights.values()), dtype=torch.float64, device=self._device)
        self.sums = torch.zeros_like(self._weights)

    @property
    def teacher(self) -> Any:
        """The active term that is one, parallel/teacher.py's, or None."""
        return next((term for term in self.active if hasattr(term, "teach")), None)

    @property
    def names(self) -> list[str]:
        """Of the metrics that `sums` are of."""
        return [f"loss/{term.name}" for term in self.active]

    def values(self, rows: Rows) -> torch.Tensor:
        """[n, terms]"""
        return torch.stack([term.values(rows) for term in self.active], dim=1)

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """[n, terms] -> [n]"""
        return values @ self._weights.to(values.dtype)

    def add(self, values: torch.Tensor) -> None:
        """Count the [n, terms] values of loss tokens."""
        self.sums += values.detach().sum(0)
