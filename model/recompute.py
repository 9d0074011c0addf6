"""What autograd keeps of a segment from its forward to its backward pass, and what is computed again: `train.recompute`.

    none        everything is kept
    selective   each block's inputs, and what its projections and attention return; norms, activations, convolutions
                and recurrences are computed again
    blocks      each block's inputs; a block is computed again when its backward pass comes
    segment     the segment's inputs; all its blocks are computed again, then the backward pass begins
    nested      the segment's inputs; its blocks are computed again for their inputs, then each once more

Inputs are hidden states and layer states. Importing this file imports no torch: recipes are checked without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

    from powernap.model.fast_weights import LayerStates
    from powernap.model.segments import Segment
    from powernap.model.stage import HybridStage

Recompute = Literal["none", "selective", "blocks", "segment", "nested"]
Context = Callable[[], AbstractContextManager]


def keeps_activations(recompute: Recompute) -> bool:
    """Whether more than inputs is kept."""
    return recompute in ("none", "selective")


def keeps_logits(recompute: Recompute, segment: Segment, pipeline: bool) -> bool:
    """Whether the head's logits are kept for the backward pass, where they fit into one chunk.

    Those of the last loss are, whatever `recompute` says: the backward pass that needs them follows at once, so that nothing
    is freed by computing them again. In a pipeline it does if no segment follows, for then the last stage, which has the
    head, runs forward and backward in turn.
    """
    return keeps_activations(recompute) or (segment.last_loss and (segment.is_last or not pipeline))


def run_segment(
    stage: HybridStage,
    segment: Segment,
    tokens: torch.Tensor,
    hidden_states: torch.Tensor | None,
    layer_states: LayerStates,
    recompute: Recompute,
    document_starts: torch.Tensor | None = None,
    *,
    inside: Context = nullcontext,
    keeping: Context = nullcontext,
) -> tuple[torch.Tensor | None, LayerStates]:
    """`stage(segment, tokens, hidden_states, layer_states, document_starts)`, of which autograd keeps what `recompute` says.

    Args:
        inside: a context for all that is computed, and computed again.
        keeping: a context in which inputs are saved, for hooks on saved tensors.
    """
    import torch

    assert recompute in get_args(Recompute), recompute
    if not torch.is_grad_enabled():
        recompute = "none"
    run_part: Callable = call
    if recompute in ("blocks", "selective"):
        run_part = partial(_checkpointed, inside, keeping, recompute == "selective")
    elif recompute == "nested":
        run_part = partial(_checkpointed, inside, nullcontext, False)

    def run(hidden_states, *layer_states):
        hidden_states, layer_states = stage(segment, tokens, hidden_states, layer_states, document_starts, run_part)
        return hidden_states, *layer_states

    if recompute in ("segment", "nested"):
        hidden_states, *states = _checkpointed(inside, keeping, False, run, hidden_states, *layer_states)
    else:
        with inside():
            hidden_states, *states = run(hidden_states, *layer_states)
    return hidden_states, tuple(states)


def call(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


def _checkpointed(inside: Context, keeping: Context, selective: bool, function: Callable, *arguments: Any) -> Any:
    """function(*arguments), of which autograd keeps the arguments; `selective`: and what `_policy` names."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    def run(*arguments):
        with inside():
            return function(*arguments)

    # Dropout has generators of its own: no random state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        # To the end: what is kept of an all-reduce holds, through the request in C++, the graph that keeps it. Where it is
        # not used it would never be freed.
        options |= {"context_fn": partial(create_selective_checkpoint_contexts, _policy), "early_stop": False}
    with keeping():
        return checkpoint(run, *arguments, **options)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any):
    """Keep products with weights and attention's result.

    An all-reduce is kept, too: it works in place, on a product that is kept.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    return CheckpointPolicy.MUST_SAVE if _is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_kept(operation: Any) -> bool:
    name = str(operation)
    return "scaled_dot_product" in name or name in (
        "aten.mm.default",
        "aten.addmm.default",
        "c10d.allreduce_.default",
    )
