"""Runs in which something goes wrong on the last rank at certain steps."""

import contextlib
import io
import os
import uuid
from pathlib import Path
from unittest import mock

import torch

from powernap.launch import cli
from powernap.parallel.schedule import forward_backward
from powernap.parallel.topology import shutdown_distributed
from tests.helpers.processes import in_processes

BLOCK = 1  # the gated-delta-net block of runs.RECIPE, the last
PARAMETER = f"decoder.layers.{BLOCK}.self_attention.in_proj.weight"


def train_badly(folder: Path, processes: int, cases: dict[str, tuple[dict[int, str], list[str]]]) -> dict[str, list]:
    """Train folder/tiny.yaml once for each case; name -> each rank's (exit code, stderr).

    A case is (step -> fault, arguments). Faults:
        nan: a gradient. large: the same gradient, a thousand times. forward: a weight, before the step. backward: the
        gradient of a module's output. state: the fast weights of the rank's first sequence.
    """
    arguments = [(bad, [f"run.name={name}", *further]) for name, (bad, further) in cases.items()]
    rendezvous_names = [uuid.uuid4().hex for _ in cases]
    per_rank = in_processes(_train, processes, processes, folder, arguments, rendezvous_names)
    return dict(zip(cases, zip(*per_rank, strict=True), strict=True))


def _train(rank, store, processes, folder, cases, rendezvous_names):
    os.chdir(folder)
    results = []
    for (bad, arguments), name in zip(cases, rendezvous_names, strict=True):
        os.environ.pop("MASTER_PORT", None)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "POWERNAP_RENDEZVOUS": name, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "",
        }  # fmt: skip
        stderr = io.StringIO()
        with mock.patch("powernap.train.trainer.forward_backward", _spoiled(bad)), contextlib.redirect_stderr(stderr):
            code = cli.main(["train", "tiny.yaml", *arguments])
        results.append((code, stderr.getvalue()))
        if (
            code and processes == 1
        ):  # leave, so that the next run can join; with other ranks a failed run must be the last
            shutdown_distributed()
    return results


def _spoiled(bad: dict[int, str]):
    def run(stage, micro_batches, scale, topology, **options):
        kind = bad.get(topology.progress.step) if topology.rank == topology.world_size - 1 else None
        mixer = stage.decoder.layers[BLOCK - stage.blocks.start].self_attention if kind else None
        # As an attribute, ZeRO-3 would gather it here, on this rank alone.
        parameter = next((p for n, p in stage.named_parameters() if stage.global_name(n) == PARAMETER), None)
        hooks = []
        if kind in ("nan", "large"):
            factor = float("nan") if kind == "nan" else 1000.0
            hooks.append(parameter.register_hook(lambda gradient: gradient * factor))
        elif kind == "forward":
            with torch.no_grad():
                parameter[0, 0] = float("inf")
        elif kind == "state":
            hooks.append(
                mixer.register_forward_hook(lambda module, inputs, output: (output[0], _first_broken(output[1])))
            )
        elif kind == "backward":
            mixer.out_proj.register_forward_hook(lambda module, inputs, output: (_Broken.apply(output[0]), output[1]))
        loss = forward_backward(stage, micro_batches, scale, topology, **options)
        for hook in hooks:
            hook.remove()
        return loss

    return run


def _first_broken(state: torch.Tensor) -> torch.Tensor:
    return torch.cat([state[:1] * float("inf"), state[1:]])


class _Broken(torch.autograd.Function):
    """The tensor itself, without a finite gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")
