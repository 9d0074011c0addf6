"""When Triton kernels, FLA's and our own, compute in the place of torch, and whether they can: one rule for all that have both forms."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

from powernap.model.errors import PowernapError

LARGEST_KEY_DIM = 256
# FLA 0.6.0 rejects its backward pass (chunk_bwd_dqkwg) on Hopper with Triton in [first, second): wrong gradients.
HOPPER = 9  # major compute capability
TRITON_WRONG_ON_HOPPER = ("3.4.0", "3.7.1")


class KernelError(PowernapError):
    """A model that the installed kernels cannot train on this device, in one line."""


def check_fla(dtype: torch.dtype, device: torch.device, field: str, key_dim: int) -> None:
    """Raise KernelError if training in `dtype` on `device` needs FLA's kernels and they would fail.

    Without this check the first segment would fail, after queueing and building the weights.

    Args:
        field, key_dim: the recipe field for the rows of a head's state, and their number.
    """
    if device.type != "cuda" or not fla_is_precise_enough_for(dtype):
        return
    if find_spec("fla") is None:
        raise KernelError(f"{_name(dtype)} on CUDA needs FLA's kernels: pip install 'powernap[cuda]'")
    if key_dim > LARGEST_KEY_DIM:
        raise KernelError(
            f"{field}={key_dim}: FLA's kernels on CUDA take at most {LARGEST_KEY_DIM}; "
            "use more heads, or train.precision=fp32, which needs no kernel of FLA's"
        )
    try:
        triton = TorchVersion(version("triton"))
    except PackageNotFoundError:
        raise KernelError("FLA's kernels need Triton: pip install 'powernap[cuda]'") from None
    first, fixed = TRITON_WRONG_ON_HOPPER
    if torch.cuda.get_device_capability(device)[0] == HOPPER and first <= triton < fixed:
        raise KernelError(
            f"Triton {triton} computes wrong gradients on Hopper GPUs and FLA refuses it: pip install 'triton>={fixed}', "
            "which torch 2.13 brings"
        )


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "train.precision=bf16", torch.float32: "train.precision=fp32 with TF32"}.get(
        dtype, str(dtype)
    )


def kernels_compute(x: torch.Tensor) -> bool:
    """Whether x, and what is made of it, goes through kernels; else through torch's own operations, the reference."""
    return x.is_cuda and fla_is_precise_enough_for(x.dtype)


def fla_is_precise_enough_for(dtype: torch.dtype) -> bool:
    """FLA takes float32 but multiplies in TF32 (10-bit mantissas), so float32 uses it only if torch's own matrix
    products may use TF32, too; it has no float64."""
    if dtype == torch.float32:
        return torch.get_float32_matmul_precision() != "highest"
    return dtype in (torch.bfloat16, torch.float16)
