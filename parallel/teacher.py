"""A frozen model beside the one that is trained, whose logits are a second target: the loss term of train/distillation.py.

It runs before the step's schedule, with the stages of the trained model's pipeline one after the other, and leaves hidden states at the loss
tokens on the last one. Its logits are computed from them a chunk at a time where the trained model's are. The vocabulary of both stays
split over tensor ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from powernap.model.loss_terms import Rows
from powernap.model.megatron import tensor_parallel
from powernap.model.segments import Segment, SegmentError
from powernap.model.stage import HybridStage
from powernap.parallel.schedule import MicroBatch, Ring
from powernap.parallel.topology import Topology


class Teacher:
    """The term temperature^2 KL(teacher || model) of each loss token, in nats.

    Args:
        stage: this rank's part of the teacher.
        weight: by step.
        whole_sequence: it reads the sequence up to a token; False: the token's window, without anything before.
        described: for the log.
    """

    name = "distillation"

    def __init__(
        self,
        stage: HybridStage,
        topology: Topology,
        *,
        weight: Callable[[int], float],
        temperature: float,
        whole_sequence: bool,
        described: str = "",
    ):
        self.stage, self.topology, self.weight_at = stage, topology, weight
        self.temperature, self.whole_sequence, self.described = temperature, whole_sequence, described

    @torch.no_grad()
    def teach(self, batch: MicroBatch) -> list[torch.Tensor | None]:
        """For each segment of `batch` that predicts the teacher's `loss_rows`, on the last stage; None elsewhere.

        Raises:
            SegmentError: if it should read a sequence with probes, which are not part of what follows them.
        """
        if self.whole_sequence and any(segment.probe for segment in batch.segments):
            raise SegmentError(
                "distillation.context=sequence: the sequences have probes: write distillation.context=window"
            )
        inputs = batch.tokens[:, :-1]
        taught: list[torch.Tensor | None] = [None] * len(batch.segments)
        read = range(0)
        hidden_states = None
        for index, segment in enumerate(batch.segments):
            if not segment.predicts:
                continue
            wanted = range(inputs.shape[1]) if self.whole_sequence else segment.tokens
            if wanted != read:
                padded = any(one.padded for one in batch.segments) if self.whole_sequence else segment.padded
                hidden_states, read = self._read(inputs, wanted, padded), wanted
            if self.stage.is_last:
                where = batch.loss_tokens[index]
                assert hidden_states is not None and where is not None
                taught[index] = self.stage.loss_rows(
                    hidden_states, where + (segment.tokens.start - read.start) * len(inputs)
                )
        return taught

    def _read(self, inputs: torch.Tensor, tokens: range, padded: bool) -> torch.Tensor | None:
        """One pass over these tokens from nothing; hidden states on the last stage."""
        stage, whole = self.stage, range(self.stage.model.num_layers)
        segment = Segment(0, 1, tokens, blocks=whole, final_blocks=whole, predicts=True, padded=padded)
        ring = Ring(stage, self.topology, len(tokens), len(inputs))
        received = None if stage.is_first else ring.receive(segment)
        hidden_states, _ = stage(segment, inputs, received, stage.empty_layer_states(len(inputs)))
        if not stage.is_last:
            ring.send(hidden_states)
            return None
        return hidden_states

    def values(self, rows: Rows) -> torch.Tensor:
        """See model/loss_terms.py. KL(p || q) = sum p (log p - log q), with log q = z - log(sum exp z)."""
        assert rows.taught is not None
        with torch.no_grad():
            taught = self.stage.row_logits(rows.taught).to(rows.logits.dtype)
            theirs, log_sum = _shifted(taught / self.temperature, rows.group)
            theirs = theirs - log_sum.unsqueeze(1)
        ours, log_sum = _shifted(rows.logits / self.temperature, rows.group)
        # The sum of p is 1 over all ranks, so log_sum is added once, where every rank has it.
        theirs, ours = theirs[:, : self.stage.own_vocabulary], ours[:, : self.stage.own_vocabulary]
        parts = (theirs.exp() * (theirs - ours)).sum(-1)
        return self.temperature**2 * (
            tensor_parallel.reduce_from_tensor_model_parallel_region(parts, rows.group) + log_sum
        )


def _shifted(logits: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, vocabulary/TP] -> logits less their maximum over all ranks, and the log of the sum of their exponentials [n]."""
    largest = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits = logits - largest
    total = tensor_parallel.reduce_from_tensor_model_parallel_region(logits.exp().sum(-1), group)
    return logits, total.log()
