"""powernap doctor: versions, devices, what would run where, and whether this machine computes what it should."""

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, and whether they compute right",
        description="Print versions and devices, how ranks would talk, and the largest error of a tiny model's loss and "
        "gradients against float64, for each mixer with fast weights in float32 and bfloat16. Exit code 1 if one is wrong or "
        "cannot be computed here.",
        epilog="Run it on a compute node, in the environment of your jobs, before you submit one.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from powernap.parallel.topology import alone
    from powernap.train.numerics.doctor import BOUNDS, examine
    from powernap.train.run.provenance import machine, versions

    found = versions()
    for package in ("triton", "fla-core", "mlflow", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    for name, installed in found.items():
        print(f"{name:16} {installed}")
    here = machine()
    print(f"{'processor':16} {here['cpu']}, {here['cores']} cores")
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    for number, gpu in enumerate(gpus):
        print(f"{f'GPU {number}':16} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}")
    if gpus:
        print(
            f"{'ranks':16} talk by NCCL, up to {len(gpus)} here, a GPU each; more of them would share GPUs and use gloo"
        )
        print(f"{'precision':16} train.precision=bf16: fp32 has no tensor core, no FLA kernel")
    else:
        print(f"{'GPU':16} none: ranks talk by gloo and compute on the CPU")
    print(f"\n{'mixer':6} {'precision':10} {'computed by':17} {'error':>8}  at most")
    wrong = 0
    for finding in examine(alone()):
        dtype = str(finding.dtype).removeprefix("torch.")
        error = "-" if finding.error is None else f"{finding.error:.1e}"
        verdict = "" if finding.is_right else f"  {finding.problem or 'WRONG'}"
        wrong += not finding.is_right
        print(f"{finding.letter:6} {dtype:10} {finding.how:17} {error:>8}  {BOUNDS[finding.dtype]:g}{verdict}")
    print(f"\n{'all is well' if not wrong else f'{wrong} of these would not train right here'}")
    return 1 if wrong else 0
