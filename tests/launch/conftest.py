"""Clusters that jobs are submitted to: make test-clusters installs and starts them."""

import os
from collections.abc import Iterator

import pytest

from slurm_cluster import SlurmCluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Three nodes, no accounting."""
    yield from _cluster(accounting=False)


@pytest.fixture(scope="module")
def slurm_with_accounting() -> Iterator[SlurmCluster]:
    """The same, and sacct knows ended jobs."""
    yield from _cluster(accounting=True)


def _cluster(accounting: bool) -> Iterator[SlurmCluster]:
    if not os.environ.get("POWERNAP_TEST_CLUSTERS"):
        pytest.skip("make test-clusters runs this on a real SLURM")
    if SlurmCluster.missing(accounting):
        pytest.skip("SLURM is not installed: .ci/install-slurm")
    with SlurmCluster(accounting=accounting) as cluster:
        yield cluster
