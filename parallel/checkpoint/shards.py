"""Whole parameters and their tensor-parallel shards, in the order of Megatron-core's splits."""

from typing import NamedTuple

import torch


class Split(NamedTuple):
    """How tensor ranks share a parameter: Megatron-core's partition_dim and partition_stride.

    Stride 2 is two matrices in one, such as SwiGLU's gate and up: each rank has its part of both.
    """

    dim: int
    stride: int


def split_of(parameter: torch.nn.Parameter) -> Split | None:
    """None: every tensor rank has the whole parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Split(parameter.partition_dim, parameter.partition_stride)  # type: ignore[attr-defined]  # Megatron's


def whole_shape(shape: torch.Size, split: Split | None, ranks: int) -> list[int]:
    """The whole parameter's shape, from that of a shard."""
    return [size * ranks if split and dim == split.dim else size for dim, size in enumerate(shape)]


def shard_shape(shape: list[int], split: Split | None, ranks: int) -> list[int]:
    """A shard's shape, from that of the whole parameter."""
    return [size // ranks if split and dim == split.dim else size for dim, size in enumerate(shape)]


def unshard(shards: list[torch.Tensor], split: Split | None) -> torch.Tensor:
    """The whole parameter from all tensor ranks' shards; any one of them if it is not split."""
    if split is None or len(shards) == 1:
        return shards[0]
    pieces = [shard.chunk(split.stride, split.dim) for shard in shards]
    return torch.cat([piece[i] for i in range(split.stride) for piece in pieces], split.dim)


def shard(whole: torch.Tensor, split: Split | None, rank: int, ranks: int) -> torch.Tensor:
    """The shard of tensor rank `rank` of `ranks`."""
    if split is None or ranks == 1:
        return whole
    pieces = whole.chunk(split.stride * ranks, split.dim)
    return torch.cat(pieces[rank::ranks], split.dim)
