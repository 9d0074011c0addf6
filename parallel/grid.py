"""Where a rank is among data, pipeline and tensor ranks. Megatron-core counts tensor ranks first, then data ranks, then stages."""

from collections.abc import Iterable
from typing import NamedTuple


class Grid(NamedTuple):
    """Sizes of the three kinds of parallelism."""

    tensor: int
    data: int
    pipeline: int

    def describe_rank(self, rank: int) -> str:
        data, stage, tensor = self._place(rank)
        return f"rank {rank} (data {data}, stage {stage}, tensor {tensor})"

    def describe_group(self, ranks: list[int]) -> str:
        """What the ranks of a process group are to each other, such as `the tensor ranks of data 0, stage 1`."""
        data, stages, tensors = (sorted(set(numbers)) for numbers in zip(*map(self._place, ranks), strict=True))
        inside = {
            "data ranks": (data, self.data, f"stage {stages[0]}, tensor {tensors[0]}"),
            "stages": (stages, self.pipeline, f"data {data[0]}, tensor {tensors[0]}"),
            "tensor ranks": (tensors, self.tensor, f"data {data[0]}, stage {stages[0]}"),
        }
        varied = [name for name, (numbers, _, _) in inside.items() if len(numbers) > 1]
        is_whole = all(len(numbers) in (1, size) for numbers, size, _ in inside.values())
        if len(varied) == 1 and is_whole:
            return f"the {varied[0]} of {inside[varied[0]][2]}"
        if len(ranks) == self.tensor * self.data * self.pipeline:
            return "all ranks"
        if varied == ["stages", "tensor ranks"] and is_whole:
            return f"the stages and tensor ranks of data {data[0]}"
        return f"ranks {first_three(ranks)}"

    def _place(self, rank: int) -> tuple[int, int, int]:
        """(data, stage, tensor)"""
        return rank // self.tensor % self.data, rank // (self.tensor * self.data), rank % self.tensor


def first_three(names: Iterable[object]) -> str:
    texts = [str(name) for name in names]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
