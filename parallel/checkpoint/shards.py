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


def whole_shape(parameter: torch.nn.Parameter, ranks: int) -> list[int]:
    """The whole parameter's shape, without pads, from the shard that one of `ranks` tensor ranks has."""
    shape, split = (
        list(getattr(parameter, "ds_shape", parameter.shape)),
        split_of(parameter),
    )  # ZeRO 3 empties the parameter
    if split:
        shape[split.dim] = getattr(parameter, "whole_rows", shape[split.dim] * ranks)
    return shape


def shard_shape(shape: list[int], split: Split | None, ranks: int) -> list[int]:
    """A shard's shape, from that of the whole parameter."""
    return [-(-size // ranks) if split and dim == split.dim else size for dim, size in enumerate(shape)]


def unshard(shards: list[torch.Tensor], split: Split | None, shape: list[int]) -> torch.Tensor:
    """The whole parameter of `shape` from all tensor ranks' shards, the last with pads; any one of them if it is not split."""
    if split is None or len(shards) == 1:
        return shards[0]
    pieces = [shard.chunk(split.stride, split.dim) for shard in shards]
    whole = torch.cat([piece[i] for i in range(split.stride) for piece in pieces], split.dim)
    return whole.narrow(split.dim, 0, shape[split.dim])


def shard(whole: torch.Tensor, split: Split | None, rank: int, ranks: int) -> torch.Tensor:
    """The shard of tensor rank `rank` of `ranks`; pads are zero."""
    if split is None or ranks == 1:
        return whole
    if pads := -whole.shape[split.dim] % ranks:
        assert split == Split(0, 1)  # a vocabulary
        whole = torch.cat([whole, whole.new_zeros(pads, *whole.shape[1:])])
    pieces = whole.chunk(split.stride * ranks, split.dim)
    return torch.cat(pieces[rank::ranks], split.dim)
