"""How many kernels a GPU would be asked for, counted on the meta device, with FLA's own code around its kernels.

Torch's operations count as one each, views and empty tensors as none. A Triton kernel counts whenever it is launched, and
computes nothing. Attention and torch's RMSNorm, which meta tensors would take apart, are the single operations that they are on CUDA.
Interpreted kernels only: the process is started with TRITON_INTERPRET=1.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

RULE = {  # FLA's kernels of the gated delta rule, without gates
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel", "recompute_w_u_fwd_kernel", "chunk_fwd_kernel_o",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_local_cumsum_scalar_kernel", "chunk_bwd_kernel_dv_local",
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64", "chunk_bwd_kernel_dqkwg", "prepare_wy_repr_bwd_kernel",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts by name, inside."""

    counting_now: ClassVar["Launches"]

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        self._inside = False  # of what counts as one

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not _is_free(func):
            self._count(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str) -> None:
        if not self._inside:
            self.found[name] += 1

    @contextmanager
    def rule_as_one(self) -> Iterator[None]:
        """FLA's gated delta rule counts as one each way, as speed.md and the issue's 2,832 count it."""
        from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction as Rule

        def one(way):
            def called(*arguments):
                self._count(f"rule, {way.__name__}")
                with self._being_inside(True):
                    return way(*arguments)

            return staticmethod(called)

        with ExitStack() as stack:
            for way in (Rule.forward, Rule.backward):
                stack.enter_context(mock.patch.object(Rule, way.__name__, one(way)))
            yield

    def recomputing(self) -> AbstractContextManager[None]:
        """The first backward to ask for what it saved makes torch recompute the segment, which is not its own."""
        return self._being_inside(False)

    @contextmanager
    def _being_inside(self, inside: bool) -> Iterator[None]:
        before, self._inside = self._inside, inside
        try:
            yield
        finally:
            self._inside = before

    @contextmanager
    def counting(self) -> Iterator[Counter]:
        from triton.runtime.interpreter import InterpretedFunction

        def launched(function, *_, **__):
            self._count(function.fn.__name__)

        def attention(query, key, value, **_):
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]

        def rms_norm(x, shape, weight=None, eps=None):
            return _Norm.apply(x, weight)

        Launches.counting_now = self
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", launched))
            stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
            stack.enter_context(mock.patch("torch.nn.functional.rms_norm", rms_norm))
            stack.enter_context(self)
            yield self.found


class _Norm(torch.autograd.Function):
    """Torch's RMSNorm on CUDA: a kernel forward, one for each gradient back."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        Launches.counting_now.found["rms_norm"] += 1
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        Launches.counting_now.found["rms_norm_backward"] += 2
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


def _is_free(func: torch._ops.OpOverload) -> bool:
    """A view, or memory without content."""
    name = func.overloadpacket.__name__
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "_reshape_alias"))


def to_meta(module: torch.nn.Module, dtype: torch.dtype) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"))


def of_mixer(topology, kernels: bool, batch: int = 2) -> dict[str, dict[str, int]]:
    """Forward and backward of a gated delta net in bfloat16, of a batch and a window without pads."""
    from powernap.model.window import Positions, Window
    from tests.helpers import tiny

    stage = tiny.build_stage(topology, tiny.model_config(pattern="G", window=130))
    to_meta(stage, torch.bfloat16)
    mixer = stage.decoder.layers[0].self_attention
    inputs = torch.empty(130, batch, stage.model.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    state = mixer.first_state(batch, inputs).requires_grad_()
    found = {}
    with mock.patch("powernap.model.mixers.fla.kernels_compute", lambda x: kernels), _fla_alone():
        with Launches().counting() as found["forward"]:
            output, after = mixer(inputs, state, Window(Positions((0,), 130)))
        with Launches().counting() as found["backward"]:
            torch.autograd.backward([output, after], [torch.empty_like(output), torch.empty_like(after)])
    return {way: dict(counts) for way, counts in found.items()}


def of_segment(topology, kernels: bool, blocks: int = 24, batch: int = 2, rule_as_one: bool = False) -> dict[str, int]:
    """A segment of alternating attention and gated delta nets: forward, recompute and backward, without the head."""
    from powernap.model.batch import plan_segments
    from powernap.model.config import SleepConfig
    from tests.helpers import tiny

    model = tiny.model_config(pattern="AG" * (blocks // 2), window=130, gdn={"conv_kernel": 4})
    stage = tiny.build_stage(topology, model)
    to_meta(stage, torch.bfloat16)
    tokens, mask = torch.ones(batch, 2 * 130 + 1, dtype=torch.long), torch.zeros(batch, 2 * 130 + 1, dtype=torch.bool)
    mask[:, -20:] = True
    segment = plan_segments(tokens, mask, model, SleepConfig(), 1)[0]
    states = [state.requires_grad_() for state in stage.empty_layer_states(batch)]
    tokens = tokens.to("meta")

    def run(*states):
        hidden, after = stage(segment, tokens, None, states)
        return *([] if hidden is None else [hidden]), *after

    with mock.patch("powernap.model.mixers.fla.kernels_compute", lambda x: kernels), _fla_alone():
        launches = Launches()
        with launches.counting() as found, launches.rule_as_one() if rule_as_one else nullcontext():
            outputs = checkpoint(
                run, *states, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), launches.recomputing()),
            )  # fmt: skip
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return dict(found)


@contextmanager
def _fla_alone() -> Iterator[None]:
    """The recurrence in FLA's kernel in both forms: what is around it is compared."""
    from powernap.model.mixers.recurrent import Recurrence

    def kernel(self, q, k, v, g, beta, state, need_output=True):
        return self.kernel(q, k, v, g, beta, state)

    with mock.patch.object(Recurrence, "__call__", kernel):
        yield


def both_forms(topology) -> dict[str, dict[str, int]]:
    found = {}
    for form, kernels in (("plain", False), ("kernels", True)):
        mixer = {f"mixer, {way}": sum(n.values()) for way, n in of_mixer(topology, kernels).items()}
        short, long = (sum(of_segment(topology, kernels, blocks).values()) for blocks in (2, 4))
        found[form] = mixer | {"pair of blocks": long - short}
    found["kernels"]["segment, FLA's rule as one"] = sum(of_segment(topology, True, rule_as_one=True).values())
    return found
