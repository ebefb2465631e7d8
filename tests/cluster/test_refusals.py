"""A cluster that does not take jobs says why, with the next step: no operator, no right, no such context, nobody there."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import clusters
from tests.cluster.conftest import ROOT, person
from tests.clusters import Cluster, wait_for
from training import submit
from training.cluster import explain
from training.cluster.following import Followed
from training.cluster.jobs import EVERYWHERE, LONGEST_PAUSE_S, ClusterError, Jobs, pause_s
from training.cluster.manifests import Object, Order, render
from training.config import ClusterConfig, Config

GIVEN = ClusterConfig(image=f"x@sha256:{'1' * 64}", store="s3://b", queue=None)
ORDER = Order("bit-pretrain-1", "pretrain", None, {"params.yaml": "{}"})


def jobs_of(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    return Jobs(GIVEN)


def held(name: str) -> list[Object]:
    """The objects of a job that does not begin."""
    config_map, job = render(dataclasses.replace(ORDER, name=name), GIVEN, ROOT)
    job["spec"]["runPolicy"]["suspend"] = True
    return [config_map, job]


def test_who_has_no_right_reads_which_one_and_where_it_is_to_be_had(
    prepared: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = jobs_of(person(prepared, "nobody"), monkeypatch)
    with pytest.raises(
        ClusterError, match=r"forbidden: you may not apply ConfigMap .* in namespace 'bit'.*Role `submitter`"
    ):
        nobody.apply(render(ORDER, GIVEN, ROOT), dry_run=True)
    with pytest.raises(ClusterError, match=r"may not list pytorchjobs in all namespaces.*ClusterRole `bit-watcher`"):
        nobody.of(EVERYWHERE).find()
    watcher = jobs_of(person(prepared, "watcher", "bit-watcher"), monkeypatch)
    everywhere = watcher.of(EVERYWHERE)
    for seen in (everywhere.find(), everywhere.pods_of("bit/stage"), everywhere.workloads()):
        assert isinstance(seen, list)
    with pytest.raises(ClusterError, match="forbidden: you may not list events"):
        watcher.events("bit-pretrain-1")


def test_a_namespace_that_is_not_there_is_named(prepared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(prepared, monkeypatch).of("bit-nowhere")
    with pytest.raises(ClusterError, match=r"Is the namespace 'bit-nowhere' there\? kubectl apply -k"):
        jobs.apply(render(ORDER, GIVEN, ROOT))


def test_a_job_that_is_removed_ends_those_who_follow_it(prepared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(prepared, monkeypatch)
    jobs.apply(held("bit-pretrain-gone"))
    followed = Followed(jobs, "bit-pretrain-gone")
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(followed.to_the_end)
        wait_for(lambda: followed.said or ended.done())
        jobs.delete("bit-pretrain-gone")
        assert explain.condition(ended.result(60)) == "Removed"
    with pytest.raises(ClusterError, match=r"bit-pretrain-gone was removed: .*the same command goes on"):
        submit.attach(Config(cluster=GIVEN), jobs, "bit-pretrain-gone", "pretrain", None)


def test_a_follower_who_may_not_see_the_pods_is_told_so(prepared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs_of(prepared, monkeypatch).apply(held("bit-pretrain-unseen"))
    prepared.kubectl("create", "clusterrole", "blind", "--verb=list,watch", "--resource=pytorchjobs.kubeflow.org")
    blind = jobs_of(person(prepared, "follower", "blind"), monkeypatch)
    with pytest.raises(ClusterError, match="forbidden: you may not list pods"):
        Followed(blind, "bit-pretrain-unseen", patience_s=0).to_the_end()


def test_only_the_job_that_is_meant_is_removed(prepared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(prepared, monkeypatch)
    jobs.apply(held("bit-pretrain-anew"))
    assert not jobs.delete("bit-pretrain-anew", "the-uid-of-the-one-before")
    job = jobs.get("bit-pretrain-anew")
    assert job is not None
    assert jobs.delete("bit-pretrain-anew", job["metadata"]["uid"])
    wait_for(lambda: jobs.get("bit-pretrain-anew") is None)


def test_a_log_that_is_not_there_yet_is_empty_and_a_refused_one_is_told(
    prepared: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(jobs_of(prepared, monkeypatch).logs("bit-pretrain-1-worker-0", follow=False)) == []
    blind = jobs_of(person(prepared, "blind"), monkeypatch)
    with pytest.raises(ClusterError, match="forbidden: you may not read the log of pod bit-pretrain-1-worker-0"):
        list(blind.logs("bit-pretrain-1-worker-0", follow=False))


def test_a_watch_rests_longer_each_time_but_no_longer_after_days_without_an_answer() -> None:
    rests = [pause_s(failures) for failures in (0, 1, 2, 2000)]
    assert rests == sorted(rests)
    assert rests[0] < 1
    assert rests[-1] == LONGEST_PAUSE_S


def test_a_cluster_without_the_operator_and_one_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with clusters.running(tmp_path / "bare", "") as bare:
        bare.kubectl("create", "namespace", "bit")
        jobs = jobs_of(bare, monkeypatch)
        with pytest.raises(ClusterError, match="does not know PyTorchJobs: install the Kubeflow training operator"):
            jobs.apply(render(ORDER, GIVEN, ROOT), dry_run=True)
        with pytest.raises(ClusterError, match="does not know PyTorchJobs"):
            next(jobs.watch("bit/job"))
        assert jobs.workloads() == []  # no Kueue either
        with pytest.raises(ClusterError, match=r"no cluster to submit to .*: set KUBECONFIG or cluster.context"):
            Jobs(GIVEN.model_copy(update={"context": "nowhere"}))
    with pytest.raises(
        ClusterError, match=r"cannot be reached .*: is cluster.context the right one, and the cluster up\?"
    ):
        jobs.find()
