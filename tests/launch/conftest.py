"""Clusters for the tests of `powernap submit`."""

import pytest


@pytest.fixture(scope="module")
def kube(tmp_path_factory):
    """A Kubernetes API server of its own for the tests of one file."""
    import kube_cluster

    if not kube_cluster.installed():
        pytest.skip("no kube-apiserver: make test-clusters builds it")
    pytest.importorskip("kubernetes", reason="no kubernetes client: make test-clusters installs it")
    with kube_cluster.KubeCluster(tmp_path_factory.mktemp("kube")) as cluster:
        yield cluster
