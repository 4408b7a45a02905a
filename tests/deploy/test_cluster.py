"""Trials on a local Ray cluster give what they give here."""

import os
import socket

import pytest
import torch

import opsin.deploy.cluster as cluster_module
from opsin.deploy.cluster import Cluster, connect
from opsin.errors import BadInput, MissingExtra


def test_ray_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(cluster_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"opsin\[cluster\]"):
        connect()


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="needs ray: pip install 'opsin[cluster]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # a busy machine would starve them
        module.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
        yield module
        module.shutdown()


@pytest.mark.slow
def test_map(ray, tmp_path):
    def square(x):
        return x * x, os.getpid(), torch.get_num_threads()

    found = dict(Cluster(per_machine=2, shared=tmp_path)(square, range(5)))
    assert {x: y for x, (y, *_) in found.items()} == {x: x * x for x in range(5)}
    assert os.getpid() not in {pid for _, pid, _ in found.values()}
    assert {threads for *_, threads in found.values()} == {1}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_errors_come_through(ray, tmp_path):
    def fail(x):
        raise BadInput(f"item {x} is bad")

    with pytest.raises(BadInput, match="item 3 is bad"):
        list(Cluster()(fail, [3]))


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_told(ray, tmp_path, monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def elsewhere(folder):
        yield tmp_path / "absent" / "mark"

    monkeypatch.setattr(cluster_module, "_mark", elsewhere)
    with pytest.raises(BadInput, match=rf"{socket.gethostname()}.*does not see the folder"):
        list(Cluster(shared=tmp_path)(str, [1]))


@pytest.mark.slow
def test_a_comparison_on_the_cluster_is_the_same(ray, tmp_path, monkeypatch):
    from opsin.train.compare import compare

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    settings = {"models": "metanet_n", "epochs": 2, "seeds": 2, "data_options": {"limit": 64}, "progress": False}
    sql = "SELECT model, seed, status, val, test, steps FROM trials ORDER BY model, seed"
    there = compare("digits", out="cluster", cluster=True, jobs=2, **settings)
    here = compare("digits", out=tmp_path / "here", **settings)
    assert there.query(sql) == here.query(sql) and len(here.query(sql)) == 2
