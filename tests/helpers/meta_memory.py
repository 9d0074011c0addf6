"""Memory of a micro-batch on a GPU that is not here: a process of its own that writes peaks in bytes as JSON.

python -m tests.helpers.meta_memory CASES OUT      CASES: names of test_meta_memory.py, separated by |

The stage runs forward and back, segment by segment, on tensors of torch's `meta` device: with shapes, without memory, counted as
they come and go. FLA allocates what it allocates and launches nothing. Where CUDA has one kernel and `meta` takes several
steps, attention and RMSNorm, a stand-in saves what CUDA's saves. Tensors inside of kernels, and fragments, are not counted.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.helpers.compiled import CARDS, pretend
from tests.helpers.live_bytes import LiveBytes


class FusedRMSNorm(torch.autograd.Function):
    """CUDA's saves its input, and one number of each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def flash_attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
    assert attn_mask is None and is_causal and not enable_gqa
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]


def without_kernels() -> None:
    """Before FLA is imported."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from powernap.model.mixers import fla
    from powernap.model.mixers.recurrent import Recurrence

    pretend(CARDS["sm_90a"])
    JITFunction.run = Autotuner.run = lambda self, *args, **kwargs: None
    F.rms_norm = lambda x, shape, weight=None, eps=None: FusedRMSNorm.apply(x, weight)
    F.scaled_dot_product_attention = flash_attention
    fla.kernels_compute = lambda x: fla.fla_is_precise_enough_for(x.dtype)  # meta tensors are the GPU's
    Recurrence.__call__ = lambda self, q, k, v, g, beta, state, need_output=True: self.kernel(q, k, v, g, beta, state)


def peak_bytes(recipe) -> int:
    """Of one micro-batch, besides weights, their float32 gradients and the optimizer."""
    from powernap.model.batch import find_loss_tokens
    from powernap.model.stage import HybridStage
    from powernap.parallel.planning.work import segments_of
    from powernap.parallel.schedule import MicroBatch, StageStep, _loop
    from powernap.parallel.topology import init_distributed

    topology = init_distributed(store=dist.HashStore(), rank=0, world_size=1)
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups, dtype=torch.bfloat16, draw=False)
    for module in stage.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(parameter, device="meta", dtype=torch.bfloat16)
                )
                module._parameters[name].register_post_accumulate_grad_hook(_into_the_buffer)
    segments = segments_of(recipe)
    shape = (recipe.micro_batch_size, recipe.data.sequence_length)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for segment in segments:
        loss_mask[:, 1:][:, segment.where] |= segment.predicts
    where = [find_loss_tokens(loss_mask[:, 1:][:, s.where]).to("meta") if s.predicts else None for s in segments]
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
    batch = MicroBatch(segments, tokens, loss_mask.to("meta"), loss_tokens=where)
    step = StageStep(stage, [batch], 1.0, recipe.train.recompute, recipe.train.offload_inputs, None, topology)
    with LiveBytes([*stage.parameters()]) as live:
        _loop(step, 0)
    return live.peak


def _into_the_buffer(parameter: torch.nn.Parameter) -> None:
    """DeepSpeed adds a gradient to its float32 buffer, and frees it."""
    parameter.grad = None


def main() -> None:
    without_kernels()
    from tests.parallel.planning.test_meta_memory import CASES

    Path(sys.argv[2]).write_text(json.dumps({name: peak_bytes(CASES[name]) for name in sys.argv[1].split("|")}))


if __name__ == "__main__":
    main()
