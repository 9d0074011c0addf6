"""Clusters that jobs are submitted to: make test-clusters installs and starts them."""

import os
from collections.abc import Iterator

import pytest

from tests.helpers import kube_cluster
from tests.helpers.kube_cluster import KubeCluster
from tests.helpers.slurm_cluster import SlurmCluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Three nodes, no accounting."""
    yield from _slurm(accounting=False)


@pytest.fixture(scope="module")
def slurm_with_accounting() -> Iterator[SlurmCluster]:
    """The same, and sacct knows ended jobs."""
    yield from _slurm(accounting=True)


def _slurm(accounting: bool) -> Iterator[SlurmCluster]:
    _skip_unless_asked("SLURM")
    if SlurmCluster.missing(accounting):
        pytest.skip("SLURM is not installed: .ci/install-slurm")
    with SlurmCluster(accounting=accounting) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    """A Kubernetes API server of its own for the tests of one file."""
    _skip_unless_asked("Kubernetes API server")
    if not kube_cluster.installed():
        pytest.skip("there is no kube-apiserver: .ci/build-kube-apiserver")
    with KubeCluster(tmp_path_factory.mktemp("kube")) as cluster:
        yield cluster


def _skip_unless_asked(what: str) -> None:
    if not os.environ.get("POWERNAP_TEST_CLUSTERS"):
        pytest.skip(f"make test-clusters runs this on a real {what}")
