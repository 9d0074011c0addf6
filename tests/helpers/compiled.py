"""FLA's Triton kernels compiled for a card that is not here: a process of its own that writes what ptxas said as JSON.

python -m tests.helpers.compiled CARD CASES OUT      CARD: of CARDS; CASES: names of test_kernels_compiled.py, SINGLE or OWN, separated by |

A mixer's call runs forward and back on CPU tensors of a training step's shapes and types, up to each launch. There the kernel
is compiled to the card's machine code instead, in every configuration that FLA's autotuner would try on that card. It shows
compile errors, shared memory, registers and spills; not results, races or time. Benchmarks use it, too.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / ".venv" / "kernels"


@dataclass(frozen=True)
class Card:
    name: str
    arch: int  # ten times its compute capability
    shared: int  # bytes that a block may have (CUDA C++ Programming Guide, "Technical Specifications")
    processors: int


CARDS = {  # by the name that ptxas has for their machine code
    "sm_90a": Card("NVIDIA H100", 90, 227 * 1024, 132),
    "sm_100a": Card("NVIDIA B200", 100, 227 * 1024, 148),
}
TENSOR_MEMORY = 512  # columns of a Blackwell multiprocessor: Triton launches no kernel with more


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration."""

    kernel: str
    configuration: str
    shared: int = 0  # bytes of a block
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes that a thread stores because registers are out
    error: str | None = None  # why the card would not run it


def compile_cases(card: str, cases: list[str]) -> dict[str, list[Compiled]]:
    """Case -> what was compiled for it."""
    found = run_with_kernels("tests.helpers.compiled", card, "|".join(cases))
    return {case: [Compiled(**one) for one in ones] for case, ones in found.items()}


def run_with_kernels(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m MODULE ARGUMENTS OUT` writes to OUT as JSON, in a process that finds Triton and FLA."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(KERNELS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": folder,  # fresh: ptxas says nothing about what is cached
        }  # fmt: skip
        command = [sys.executable, "-m", module, *arguments, str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())


def pretend(card: Card, device: int = 0) -> None:
    """Before FLA is imported: it lists a kernel's configurations by the card."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {"max_shared_mem": card.shared, "multiprocessor_count": card.processors}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", card.arch, 32),
            get_current_device=lambda: device,
            get_current_stream=lambda device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: properties),
        )
    )
    torch.cuda.get_device_name = lambda device=None: card.name
    torch.cuda.get_device_capability = lambda device=None: divmod(card.arch, 10)
    torch.cuda.device_count = lambda: 1


class Compiler:
    """Compiles where Triton would launch, from its creation on.

    Attributes:
        every: compile all configurations of a kernel, not the first alone.
        found: what has been compiled.
    """

    def __init__(self, target: str):
        from triton.knobs import nvidia
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        self.target, self.limit, self.every, self.found = target, CARDS[target].shared, True, []
        self._compile = JITFunction.run
        nvidia.dump_ptxas_log = True

        def run(function, *args, grid, warmup, **kwargs):
            self._add(function, args, grid, kwargs)

        def run_configurations(tuner, *args, **kwargs):
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            configurations = tuner.prune_configs(kwargs)
            for one in configurations if self.every else configurations[:1]:
                settings = {**one.kwargs, "warps": one.num_warps, "stages": one.num_stages}
                self._configuration = " ".join(f"{name}={value}" for name, value in settings.items())
                tuner.fn.run(*args, **kwargs, **one.all_kwargs())
            self._configuration = "fixed"

        self._configuration = "fixed"
        JITFunction.run, Autotuner.run = run, run_configurations

    def _add(self, function, args: tuple, grid, kwargs: dict[str, Any]) -> None:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import PTXASError

        one = Compiled(function.__name__, self._configuration)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as log:
                kernel = self._compile(function, *args, grid=grid, warmup=True, **kwargs)
        except (CompilationError, PTXASError) as error:
            self.found.append(replace(one, error=in_a_line(error)))
            return
        if said := log.getvalue():  # nothing where the same kernel has been compiled before
            self.found.append(self._read(one, kernel, said))

    def _read(self, one: Compiled, kernel, log: str) -> Compiled:
        (target,) = re.findall(r"Compiling entry function .* for '(\w+)'", log)
        (registers,) = re.findall(r"Used (\d+) registers", log)
        (spilled,) = re.findall(r"(\d+) bytes spill stores", log)
        shared, columns = kernel.metadata.shared, kernel.metadata.tmem_size or 0
        wrong = {
            f"machine code for {target}, not {self.target}": target != self.target or not kernel.asm["cubin"],
            f"{shared:,} bytes of shared memory, {self.limit:,} are there": shared > self.limit,
            f"{columns} columns of tensor memory, {TENSOR_MEMORY} are there": columns > TENSOR_MEMORY,
        }
        error = next((why for why, is_so in wrong.items() if is_so), None)
        return replace(one, shared=shared, registers=int(registers), spilled=int(spilled), error=error)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run(case) -> None:
    """The mixer's call with a case's inputs, forward and back."""
    inputs = {name: t.to(case.dtype if name in "qkv" else torch.float32) for name, t in case.inputs().items()}
    output, state = case.rule().kernel(*(t.requires_grad_() for t in inputs.values()))
    torch.autograd.backward([output, state], [torch.zeros_like(output), torch.zeros_like(state)])


def output_kernel(stages: int, columns: int) -> None:
    """One forward kernel of a gated delta rule with a loop of `stages` tiles of `columns` keys."""
    from fla.ops.common import chunk_o
    from triton import Config

    chunk_o.chunk_fwd_kernel_o.fn.configs = [Config({"BK": columns, "BV": 128}, num_warps=8, num_stages=stages)]
    q, k, v = (torch.zeros(1, 64, 1, 256, dtype=torch.bfloat16) for _ in range(3))
    chunk_o.chunk_fwd_o(q, k, v, torch.zeros(1, 1, 1, 256, 256, dtype=torch.bfloat16), torch.zeros(1, 64, 1))


def another_card() -> None:
    """Machine code of an older card, as if the target were ignored."""
    from fla.ops.utils import chunk_local_cumsum

    pretend(replace(CARDS["sm_90a"], arch=80), device=1)
    chunk_local_cumsum(torch.zeros(1, 64, 1), 64)


SINGLE: dict[str, Callable[[], None]] = {
    "a kernel that fits": partial(output_kernel, 3, 128),
    "more shared memory than there is": partial(output_kernel, 9, 128),
    "a product over 8 columns": partial(output_kernel, 3, 8),  # tensor cores take 16 and more
    "another card": another_card,
}


def around_the_rule(keys: int, values: int, decays: int) -> None:
    """From a delta net's projection to the rule and from there to the output projection, forward and back."""
    from powernap.model.mixers.conv_kernel import unpack
    from powernap.model.mixers.gated_norm_kernel import gated_norm

    heads, rows = 14, 2 * keys + 2 * values + 1 + decays
    projected, taps, weight = bf16(1024, 4, heads, rows), bf16(heads, 2 * keys + values, 4), bf16(values)
    mask = torch.ones(1024, 4, dtype=torch.bool)
    parts = unpack(projected, taps, mask, keys, values, 0.0)
    output = gated_norm(parts.v, parts.z, weight, 1e-6, "silu")
    torch.autograd.backward([output, *parts], [torch.zeros_like(part) for part in (output, *parts)])


def around_attention(normed: bool) -> None:
    from powernap.model.mixers.rotary_kernel import Norms, unpack

    tables = (
        torch.zeros(1024, 1, 1, 1, 128, dtype=torch.bfloat16),
        torch.zeros(1024, 1, 1, 1, 128, dtype=torch.bfloat16),
    )
    norms = Norms(bf16(128), bf16(128), 1e-6) if normed else None
    parts = unpack(bf16(1024, 4, 4, 2 * 4 + 2, 128), tables, 4, 4, norms)
    torch.autograd.backward(parts, [torch.zeros_like(part) for part in parts])


def in_the_mlp() -> None:
    from powernap.model.swiglu_kernel import gate_and_up

    output = gate_and_up(bf16(1024, 4, 2 * 4864))
    output.backward(torch.zeros_like(output))


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


# Our own kernels, at the sizes of a 1B micro-batch, and how many of them no case before has compiled.
OWN: dict[str, tuple[Callable[[], None], int]] = {
    "around the rule, G": (partial(around_the_rule, 128, 128, 1), 5),
    "around the rule, K": (partial(around_the_rule, 128, 128, 128), 3),
    "around the rule, 96 x 192": (partial(around_the_rule, 96, 192, 1), 5),
    "around attention": (partial(around_attention, False), 2),
    "around attention, normed": (partial(around_attention, True), 2),
    "in the MLP": (in_the_mlp, 2),
}


def main() -> None:
    pretend(CARDS[sys.argv[1]])
    from tests.model.mixers.test_kernels_compiled import CASES, LARGE

    compiler, found = Compiler(sys.argv[1]), {}
    single = SINGLE | {name: call for name, (call, _) in OWN.items()}
    for name in sys.argv[2].split("|"):
        compiler.every, compiler.found = name in LARGE, []
        try:
            single[name]() if name in single else run(CASES[name])
        except (ValueError, AssertionError) as error:  # FLA's own refusal
            compiler.found.append(Compiled("", "", error=in_a_line(error)))
        found[name] = [asdict(one) for one in compiler.found]
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
