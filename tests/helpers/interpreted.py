"""FLA's Triton kernels, interpreted on the CPU: a process of its own, started with TRITON_INTERPRET=1, that writes errors as JSON.

python -m tests.helpers.interpreted CASES OUT      CASES: names of test_kernels_interpreted.py, separated by |

The interpreter runs a kernel's program block by block in NumPy. It shows whether arguments, layouts, masks and gradients are
right; not tiles, TF32, races, or what a compiler makes of it. Triton 3.7.1's needs repairs, made below.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch


def repair_triton() -> None:
    """Before FLA is imported."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    tune = Autotuner.__init__

    def without_tuning(self, function, names, configs, *options, **further):
        """The first configuration: to compare several a driver is asked, and there is none."""
        tune(self, function, names, configs[:1], *options, **further)

    Autotuner.__init__ = without_tuning

    def is_bf16(handle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def wide(handle):
        """bfloat16 is kept as 16-bit integers: the interpreter computes with these where it should with their values."""
        return interpreter.TensorHandle(from_bf16(handle.data), tl.float32) if is_bf16(handle) else handle

    builder = interpreter.InterpreterBuilder
    dot, binary = builder.create_dot, builder.binary_op
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)

    def binary_op(self, left, right, operation):
        if not is_bf16(left):
            return binary(self, left, right, operation)
        found = operation(from_bf16(left.data), from_bf16(right.data))
        if found.dtype == np.float32:
            return interpreter.TensorHandle(to_bf16(found), tl.bfloat16)
        return interpreter.TensorHandle(found, left.dtype.scalar)  # a comparison

    builder.binary_op = binary_op
    builder.get_bf16 = lambda self, value: interpreter.TensorHandle(to_bf16(np.array([value])), tl.bfloat16)
    apply = interpreter.ReduceScanOpInterface.apply

    def reduce_or_scan(self, given):
        if isinstance(given, tuple) or given.dtype.scalar != tl.bfloat16:
            return apply(self, given)
        found = apply(self, self.to_tensor(from_bf16(given.handle.data), tl.float32))
        return self.to_tensor(to_bf16(found.handle.data), tl.bfloat16)

    interpreter.ReduceScanOpInterface.apply = reduce_or_scan
    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bf16(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(data.view(np.float32) if data.dtype != np.float32 else data)
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_float


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even, as a GPU rounds."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


class Counter(int):
    """A loop's variable, which compiled code may convert."""

    def to(self, dtype):
        return self


def repair_fla() -> None:
    for name in ("chunk_delta_h", "chunk_h"):
        module = importlib.import_module(f"fla.ops.common.{name}")
        module.range = lambda *bounds: map(Counter, range(*bounds))  # type: ignore[attr-defined]


def errors(rule, case, device: str = "cpu") -> dict[str, float]:
    """The largest difference of each output and gradient, relative to the largest value, from float64 token by token."""
    inputs = {name: t.to(device) for name, t in case.inputs().items()}
    generator = torch.Generator().manual_seed(7)
    along = {}

    def run(form, dtype):
        given = {name: t.detach().to(dtype(name)).requires_grad_() for name, t in inputs.items()}
        arguments = [given[name] for name in ("q", "k", "v", "g", "beta", "state")]
        if case.transposed:  # as a mixer gives them: tokens before the batch in memory
            arguments = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in arguments[:5]] + arguments[5:]
        output, state = form(*arguments)
        for name, found in (("o", output), ("S", state)):
            along.setdefault(name, torch.randn(found.shape, generator=generator, dtype=torch.float64).to(device))
        total = sum((found.double() * along[name]).sum() for name, found in (("o", output), ("S", state)))
        total.backward()
        return {"o": output, "S": state} | {f"d{name}": t.grad for name, t in given.items()}

    exact = run(rule.sequential, lambda name: torch.float64)
    found = run(rule.kernel, lambda name: case.dtype if name in "qkv" else torch.float32)
    return {
        name: float((found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-6))
        for name, value in exact.items()
    }


def mixer_errors(case, topology, device: str = "cpu") -> dict[str, float]:
    """As `errors`, of a whole mixer: its output, new state, gates, and the gradients of its inputs and parameters."""
    from powernap.model.window import Positions, Window
    from tests.helpers import tiny

    generator = torch.Generator().manual_seed(case.length)
    stage = tiny.build_stage(topology, case.model()).to(device, case.dtype).double()
    layer, batch = stage.decoder.layers[0].self_attention, 2
    shape = (case.length, batch, stage.model.hidden_size)
    hidden_states = torch.randn(shape, generator=generator).to(device, case.dtype).double()
    state = torch.randn(layer.first_state(batch, hidden_states).shape, generator=generator).to(device) / 4
    mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
    mask[: case.length // 2, 0] = False
    window = Window(Positions((0,), case.length), mask if case.pads else None)
    along = [torch.randn(t.shape, generator=generator).double().to(device) for t in (hidden_states, state)]

    def run(dtype, kernels):
        module = layer.to(dtype)
        module.zero_grad(set_to_none=True)
        wide = torch.promote_types(dtype, torch.float32)
        inputs = [t.to(into, copy=True).requires_grad_() for t, into in ((hidden_states, dtype), (state, wide))]
        with mock.patch("powernap.model.mixers.fla.kernels_compute", lambda x: kernels):
            module.gates = []  # as steps that are logged watch them
            output, after = module(*inputs, window)
            watched, module.gates = module.gates[0], None
            _, written = module(*inputs, window, need_output=False)
            sum((found.double() * by).sum() for found, by in zip((output, after), along, strict=True)).backward()
        found = {"o": output, "S": after, "S alone": written, "dhidden": inputs[0].grad, "dS": inputs[1].grad}
        return found | watched | {f"d{name}": p.grad for name, p in module.named_parameters()}

    exact, found = run(torch.float64, kernels=False), run(case.dtype, kernels=True)
    return {
        name: float((found[name].double() - value).detach().abs().max() / value.detach().abs().max().clamp(min=1e-6))
        for name, value in exact.items()
    }


def rotation_errors(case, device: str = "cpu") -> dict[str, float]:
    """As `errors`, of attention's projection taken apart and rotated, by tables that are of each sequence or of all."""
    from powernap.model.mixers.rotary import rotate
    from powernap.model.mixers.rotary_kernel import Norms, unpack

    generator = torch.Generator().manual_seed(case.length)
    weights = [1 + torch.rand(case.width, generator=generator).to(device, case.dtype) for _ in "qk"]
    rows, batch = case.queries + case.gates + 2, 2
    x = torch.randn(case.length, batch, case.groups, rows, case.width, generator=generator).to(device, case.dtype)
    shape = (case.length, batch if case.of_each else 1, 1, 1, case.rotated // 2)
    angles = (6 * torch.rand(shape, generator=generator)).to(device).repeat(1, 1, 1, 1, 2)
    tables = (angles.cos().to(case.dtype), angles.sin().to(case.dtype)) if case.rotated else None

    def in_torch(x, *weights):
        wide = [table.double() for table in tables or ()]
        query, gate, key, value = x.split([case.queries, case.gates, 1, 1], dim=-2)
        if weights:
            query, key = (
                torch.nn.functional.rms_norm(part, (case.width,), weight, 1e-6)
                for part, weight in zip((query, key), weights, strict=True)
            )
        if wide:
            query, key = (
                torch.cat([rotate(part[..., : case.rotated], *wide), part[..., case.rotated :]], dim=-1)
                for part in (query, key)
            )
        return [part.flatten(2, 3) for part in (query, gate, key, value)]

    def in_kernel(x, *weights):
        return unpack(x, tables, case.queries, case.gates, Norms(*weights, 1e-6) if weights else None)

    return function_errors(in_torch, in_kernel, x, *(weights if case.normed else ()))


def swiglu_errors(case, device: str = "cpu") -> dict[str, float]:
    from powernap.model import swiglu, swiglu_kernel

    generator = torch.Generator().manual_seed(case.width)
    x = torch.randn(3, 2, 2 * case.width, generator=generator).to(device, case.dtype)
    return function_errors(lambda x: [swiglu.gate_and_up(x)], lambda x: [swiglu_kernel.gate_and_up(x)], x)


def function_errors(in_torch, in_kernels, *inputs: torch.Tensor) -> dict[str, float]:
    """Of each output of a function of tensors, and of their gradients, relative to the largest value in float64."""
    generator, exact, found = torch.Generator(), {}, {}
    for form, dtype, results in ((in_torch, torch.float64, exact), (in_kernels, inputs[0].dtype, found)):
        given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        outputs = [part for part in form(*given) if part.numel()]
        along = [torch.randn(part.shape, generator=generator.manual_seed(7)).to(inputs[0]) for part in outputs]
        torch.autograd.backward(outputs, [by.to(part.dtype) for by, part in zip(along, outputs, strict=True)])
        results |= {f"output {number}": part for number, part in enumerate(outputs)}
        results |= {f"gradient {number}": x.grad for number, x in enumerate(given)}
    return {
        name: float((found[name].double() - value).detach().abs().max() / value.detach().abs().max())
        for name, value in exact.items()
    }


def with_fault(fault: tuple, case, topology) -> dict[str, float]:
    """`mixer_errors` where an argument of a function is what a third makes of it."""
    path, argument, change = fault
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    signature = inspect.signature(function)

    def wrong(*arguments):
        bound = signature.bind(*arguments).arguments
        return function(**(bound | {argument: change(bound[argument])}))

    with mock.patch(path, wrong):
        return mixer_errors(case, topology)


def state_errors(passes: int, length: int, device: str = "cpu") -> dict[str, float]:
    """The state's relative error in bfloat16 and float32 after 1, 2, 4, ... passes over one window, each from the state before."""
    from tests.model.mixers.test_kernels_interpreted import Case

    case, found = Case("G", length, decay=0.004, heads=1, d_k=32, d_v=32), {}
    inputs = {name: t.detach().to(device) for name, t in case.inputs().items()}
    arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    rule = case.rule()
    exact, states = inputs["state"].double(), {t: inputs["state"].float() for t in (torch.bfloat16, torch.float32)}
    for number in range(1, passes + 1):
        _, exact = rule.sequential(*(t.double() for t in arguments), exact)
        for dtype in states:
            narrow = [t.to(dtype) for t in arguments[:3]] + [t.float() for t in arguments[3:]]
            _, states[dtype] = rule.kernel(*narrow, states[dtype])
            error = float((states[dtype].double() - exact).norm() / exact.norm())
            found[f"{str(dtype).removeprefix('torch.')}, {number}"] = error
    return found


def planted() -> dict[str, float]:
    """Of a kernel that is called with decays a tenth too strong."""
    from powernap.model.mixers.recurrent import Recurrence
    from tests.model.mixers.test_kernels_interpreted import CASES

    case = CASES["G, short"]
    rule = case.rule()

    def wrong(q, k, v, g, beta, state):
        return rule.kernel(q, k, v, 1.1 * g, beta, state)

    return errors(Recurrence(rule.sequential, rule.chunked, wrong), case)


def main() -> None:
    repair_triton()
    from powernap.parallel.topology import init_distributed
    from tests.helpers import launches
    from tests.model.mixers import test_kernels_interpreted as tests

    repair_fla()
    topology = init_distributed(store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = {}
    for name in sys.argv[1].split("|"):
        if name in tests.CASES:
            found[name] = errors(tests.CASES[name].rule(), tests.CASES[name])
        elif name in tests.MIXERS_IN_KERNELS:
            found[name] = mixer_errors(tests.MIXERS_IN_KERNELS[name], topology)
        elif name in tests.ROTATIONS:
            found[name] = rotation_errors(tests.ROTATIONS[name])
        elif name in tests.GATED:
            found[name] = swiglu_errors(tests.GATED[name])
        elif name in tests.FAULTS:
            found[name] = with_fault(tests.FAULTS[name], tests.FAULTY, topology)
        else:
            further = {
                tests.STAGE: lambda: tests.stage_errors(topology),
                tests.PASSES: lambda: state_errors(passes=12, length=64),
                tests.PLANTED: planted,
                tests.LAUNCHES: lambda: launches.both_forms(topology),
            }
            found[name] = further[name]()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
