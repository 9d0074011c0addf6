"""Checkpoints on disks that fill, lie and lose files: what is there stays, what is wrong is named and passed over."""

import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powernap.model.config import SleepConfig
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint import manifest, writer
from powernap.parallel.checkpoint.manifest import CheckpointError, checkpoints, newest_valid, read_manifest, verify
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.writer import Writer, _group_of_all
from powernap.parallel.zero.optimizer import ZeroOptimizer
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer
from tests.helpers import tiny
from tests.helpers.disks import small_disk
from tests.helpers.processes import in_processes

ABOUT = {"versions": {"powernap": "1"}, "config": {}}


@pytest.fixture(scope="module")
def trained(topology):
    """A stage and its optimizer."""
    torch.manual_seed(0)
    stage = HybridStage(tiny.model_config(), SleepConfig(), topology.groups)
    zero = ZeroOptimizer(
        stage, build_optimizer(stage, OptimizerConfig()), topology, precision="fp32", clip=1.0, micro_batch_size=1
    )
    yield stage, zero
    zero.engine.destroy()


@pytest.fixture
def save(trained, topology, tmp_path):
    """save(step, ...) writes a checkpoint into tmp_path and tells how it ended."""

    def save(step, folder=tmp_path, **options):
        one = Writer(folder, topology, ABOUT, **options)
        one.save(step, *trained, {"data": step})
        one._join()
        return one.news()

    return save


def newest(folder):
    return newest_valid(checkpoints(folder))


def test_a_checkpoint_says_what_it_is_and_nothing_is_pickled(save, trained, tmp_path):
    outcome = save(7)
    assert outcome.error is None and outcome.nbytes > 0
    (folder,) = checkpoints(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    content = verify(folder)
    assert content["step"] == 7 and content["state"] == {"data": 7} and content["versions"] == {"powernap": "1"}
    assert content["layout"] == {"parallel.data": 1, "parallel.tensor": 1, "parallel.pipeline": 1, "zero.stage": 1}
    found = Checkpoint.open(folder)
    for name, parameter in trained[0].named_parameters():
        assert torch.equal(found.whole(name), parameter.detach())


def damaged(folder):
    """Every file of a checkpoint, truncated at some places, with flipped bits at some, and missing."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for keep in (0, 1, len(data) // 2, len(data) - 1):
            yield file, f"cut to {keep}", data[:keep]
        for place in (0, 8, 40, len(data) // 3, len(data) // 2, len(data) - 70, len(data) - 1):
            for bit in (0, 6):
                yield (
                    file,
                    f"bit {bit} of byte {place}",
                    data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :],
                )
        yield file, "missing", None


def test_every_file_damaged_in_turn_is_named_and_the_checkpoint_before_is_used(save, tmp_path):
    save(1), save(2)
    older, newer = checkpoints(tmp_path)
    tried = 0
    for file, how, data in list(damaged(newer)):
        original = file.read_bytes()
        file.unlink() if data is None else file.write_bytes(data)
        found, _, passed_over = newest(tmp_path)
        assert found == older, how
        assert len(passed_over) == 1 and str(file) in passed_over[0], (how, passed_over)
        file.write_bytes(original)
        tried += 1
    assert tried == 2 * (4 + 14 + 1)
    assert newest(tmp_path)[0] == newer  # the control


def test_none_is_whole(save, tmp_path):
    save(1)
    (tmp_path / "step_00000001" / "rank-00000.safetensors").unlink()
    found, _, passed_over = newest(tmp_path)
    assert found is None and "rank-00000.safetensors: missing" in passed_over[0]


def test_folders_that_are_no_checkpoints_are_not_looked_at(save, tmp_path):
    save(1)
    for name in ("step_00000002.tmp", "step_00000003.deleted", "step_x", "other"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000009")  # renamed by somebody
    found, _, passed_over = newest(tmp_path)
    assert found.name == "step_00000001"
    assert len(passed_over) == 1 and "the folder has been renamed" in passed_over[0]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": 1}, [10]),
        ({"keep_last": 3}, [8, 9, 10]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 9, 10]),
        ({"keep_last": 1, "keep_every": 100}, [10]),
    ],
)
def test_what_is_kept(save, tmp_path, keep, left):
    for step in range(1, 11):
        outcome = save(step, **keep)
    assert [manifest.step_of(path) for path in checkpoints(tmp_path)] == left
    if keep == {"keep_last": 1}:
        assert [path.name for path in outcome.pruned] == ["step_00000009"]
    assert newest(tmp_path)[0].name == "step_00000010"


def test_broken_checkpoints_do_not_count_as_kept_ones(save, tmp_path):
    save(1), save(2), save(3)
    (tmp_path / "step_00000003" / "manifest.json").write_text("{}")
    save(4, keep_last=2)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "3", "4"]


def test_training_goes_on_while_a_file_is_written(trained, topology, tmp_path, monkeypatch):
    """What is saved is the state at the call, not what training made of it meanwhile."""
    stage, zero = trained
    go, write = threading.Event(), writer._write_file
    monkeypatch.setattr(writer, "_write_file", lambda *a: (go.wait(30), write(*a))[1])
    one = Writer(tmp_path, topology, ABOUT)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    one.save(1, stage, zero, {})
    assert one.news() is None and not checkpoints(tmp_path)
    for partition in zero._partitions():
        partition.data.add_(1.0)
    go.set()
    outcome = one.finish()
    assert outcome.error is None and outcome.stall < outcome.seconds
    found = Checkpoint.open(tmp_path / "step_00000001")
    assert all(torch.equal(found.whole(name), value) for name, value in before.items())
    for partition in zero._partitions():
        partition.data.sub_(1.0)


def test_a_failed_background_write_is_told_and_is_no_checkpoint(trained, topology, tmp_path, monkeypatch):
    def fail(path, tensors):
        path.write_bytes(b"half")
        raise OSError(5, "Input/output error")

    one = Writer(tmp_path, topology, ABOUT)
    one.save(1, *trained, {})
    assert one.finish().error is None
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_file", fail)
        one.save(2, *trained, {})
        with pytest.raises(
            CheckpointError,
            match=r"the last checkpoint could not be written: .*Input/output error, [\d,]+ bytes needed",
        ):
            one.finish()
        one.save(3, *trained, {})
        one.save(4, *trained, {})
        one._join()
        assert "step_00000004.tmp" in one.news().error
        with pytest.raises(CheckpointError, match="3 checkpoints in a row could not be written"):
            one.save(5, *trained, {})
    assert newest(tmp_path)[0].name == "step_00000001"
    again = Writer(tmp_path, topology, ABOUT)
    again.save(6, *trained, {})
    assert again.finish().error is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000006"]  # rests are gone


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as place:
        yield place


def test_a_full_disk_is_seen_before_writing(save, disk):
    assert save(1, disk).error is None
    (disk / "others").write_bytes(bytes(4 * 2**20 - 2**19 - 2**17))
    outcome = save(2, disk)
    assert f"{disk}: " in outcome.error and "bytes needed" in outcome.error and "free" in outcome.error
    assert not list(disk.glob("*.tmp"))
    assert newest(disk)[0].name == "step_00000001"


def test_a_disk_that_fills_while_writing(save, disk, monkeypatch):
    assert save(1, disk).error is None
    free = shutil.disk_usage(disk).free
    (disk / "others").write_bytes(bytes(free - 40_000))
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 0, 2**30))
    outcome = save(2, disk)
    assert "rank-00000.safetensors" in outcome.error and "bytes needed" in outcome.error, outcome
    (disk / "others").unlink()
    assert newest(disk)[0].name == "step_00000001"
    assert save(3, disk).error is None and not list(disk.glob("*.tmp"))


def test_a_folder_that_is_gone(save, tmp_path):
    outcome = save(1, tmp_path / "a")
    assert f"{tmp_path / 'a'}: gone" in outcome.error and "bytes needed" in outcome.error
    assert not (tmp_path / "a").exists()  # whoever deleted it meant it


def test_a_read_only_disk(save, tmp_path):
    with small_disk(tmp_path / "a", "ro,size=8m") as place:
        outcome = save(1, place)
    assert "step_00000001.tmp: Read-only file system" in outcome.error and "bytes needed" in outcome.error


def test_a_folder_without_the_permission_to_write(save):
    """As somebody whom the folder does not belong to; root may write anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        assert save(1, place).error is None
        place.chmod(0o555)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            outcome = save(2, place)
        finally:
            os.seteuid(before)
        assert "step_00000002.tmp: Permission denied" in outcome.error and "bytes needed" in outcome.error
        assert newest(place)[0].name == "step_00000001"
        place.chmod(0o755)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_manifests_of_all_kinds_are_answered_in_one_line(save, tmp_path, data):
    """Arbitrary bytes, arbitrary JSON, and JSON with a right hash but wrong fields."""
    folder = tmp_path / "fuzz" / "step_00000001"
    folder.mkdir(parents=True, exist_ok=True)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    kind = data.draw(st.sampled_from(["bytes", "json", "hashed"]))
    if kind == "bytes":
        (folder / "manifest.json").write_bytes(data.draw(st.binary(max_size=200)))
    elif kind == "json":
        (folder / "manifest.json").write_text(json.dumps(data.draw(values)))
    else:
        fields = st.dictionaries(st.sampled_from([*manifest._FIELDS, "lanes"]), values, max_size=12)
        names = st.sampled_from(["../../secret", "/etc/passwd", "rank-00000.safetensors", "rank-0.safetensors"])
        content = data.draw(fields) | {"files": data.draw(st.dictionaries(names, values, max_size=2))}
        content.pop("format", None), content.pop("sha256", None)
        manifest.write_manifest(folder, content)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    try:
        verify(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        raise AssertionError("no such manifest is that of a checkpoint")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_manifest_cannot_name_files_elsewhere(tmp_path, save):
    save(1)
    folder = tmp_path / "step_00000001"
    content = read_manifest(folder)
    content.pop("sha256"), content.pop("format")
    told = content["files"].pop("rank-00000.safetensors")
    content["files"]["../rank-00000.safetensors"] = told
    manifest.write_manifest(folder, content)
    with pytest.raises(
        CheckpointError, match="names a file '../rank-00000.safetensors' that is none of a checkpoint's"
    ):
        verify(folder)


def connections_of_groups(rank, store) -> tuple[int, int]:
    """Sockets that a group of all ranks opens: the writer's, which is used like a save's, and another."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=8)
    start = psutil.Process().num_fds()
    group = _group_of_all(60)
    gathered = [None] * 8 if rank == 0 else None
    dist.gather_object(rank, gathered, dst=0, group=group)
    outcome = [gathered]
    dist.broadcast_object_list(outcome, src=0, group=group)
    assert outcome[0] == list(range(8))
    used = psutil.Process().num_fds()
    dist.new_group(backend="gloo")
    every = psutil.Process().num_fds() - used
    dist.barrier()  # a rank that leaves closes what another may still be opening
    dist.destroy_process_group()
    return used - start, every


def test_ranks_connect_to_those_that_they_talk_to():
    """At thousands of ranks every one would have thousands of sockets."""
    (first, every), *others = in_processes(connections_of_groups, 8)
    assert first == every  # all ranks send to the first
    assert max(used for used, _ in others) < every
    assert sum(used for used, _ in others) < 0.75 * sum(every for _, every in others)
