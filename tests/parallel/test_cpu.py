"""Process groups without CUDA."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from powernap.parallel import cpu


def test_deepspeed_is_imported_without_mlflow(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with cpu.without_mlflow(), pytest.raises(ModuleNotFoundError):
        import mlflow
    import mlflow  # afterwards it can be  # noqa: F811

    with cpu.without_mlflow():  # nothing is taken from a process that has it
        assert sys.modules["mlflow"] is mlflow


def test_what_a_rank_imports_that_does_not_track():
    """4.4 CPU seconds of torch, Megatron-core and DeepSpeed; docs/sizes.md says why no more can be left out."""
    code = (
        "import sys\n"
        "from powernap.parallel.topology import alone, shutdown_distributed\n"
        "import powernap.train.trainer\n"
        "alone(); shutdown_distributed()\n"
        "heavy = 'mlflow pandas sklearn matplotlib pyarrow transformers tensorboard fla torch._dynamo torch._inductor'\n"
        "print([name for name in heavy.split() if sys.modules.get(name)])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]"


def test_groups_of_the_same_ranks_are_one_and_no_others(monkeypatch):
    monkeypatch.setattr(dist, "new_group", lambda ranks, **_: object())
    with cpu.one_group_for_each_set_of_ranks():
        pair = dist.new_group([0, 1], backend="gloo")
        assert dist.new_group(ranks=[0, 1]) is pair
        assert dist.new_group([0]) is not pair
    assert dist.new_group([0, 1]) is not pair


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL's groups are one for each kind of parallelism")
def test_a_world_of_one_has_one_group(topology):
    groups = topology.groups
    assert groups.tp is groups.pp is groups.dp is groups.embd
