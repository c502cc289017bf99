"""What a job asks of a machine, and what it is told where the machine has less."""

from typing import Any

import pytest
import ray

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.session import fit_cluster, shortfall, uses_gpu


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of four CPUs and so many GPUs."""
    return lambda count: monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(count)})


@pytest.mark.parametrize(
    ("gpus", "asked", "workers", "actors"),
    [
        (0, {"num_workers": 2}, 2, 2),  # on CPUs, logical ones: nothing to fit
        (1, {"num_workers": 2}, 1, 1),
        (2, {"num_workers": 2}, 2, 2),
        (2, {"num_workers": 2, "num_actors": 8}, 2, 2),
        (1, {"num_workers": 2, "use_gpu": "no"}, 2, 2),
        (2, {"num_workers": (1, 8)}, (1, 2), 2),
        (1, {"num_workers": (2, 8)}, (1, 1), 1),
        (1, {"num_workers": 2, "address": "auto"}, 2, 2),  # it may grow
    ],
)
def test_one_machine_has_a_gpu_for_each_worker_and_actor(
    with_gpus: Any, gpus: int, asked: dict[str, Any], workers: Any, actors: int
) -> None:
    with_gpus(gpus)
    said: list[str] = []
    cluster = ClusterConfig.model_validate(asked)
    made = fit_cluster(cluster, said.append)
    assert (made.num_workers, made.num_actors) == (workers, actors)
    assert len(said) == (made != cluster)


def test_gpus_that_are_demanded_and_not_there_are_named(with_gpus: Any) -> None:
    with_gpus(1)
    with pytest.raises(ConfigError, match=r"cluster\.num_workers = 4, but this machine has 1 GPU"):
        fit_cluster(ClusterConfig(num_workers=4, use_gpu="yes"), pytest.fail)
    with_gpus(0)
    with pytest.raises(ConfigError, match=r'cluster\.use_gpu = "yes", but this machine has no GPU'):
        uses_gpu(ClusterConfig(use_gpu="yes"))


def test_a_cluster_without_a_gpu_yet_is_waited_for_or_told(with_gpus: Any) -> None:
    with_gpus(0)
    demanded = ClusterConfig(use_gpu="yes", address="auto", num_workers=8)
    assert uses_gpu(demanded)
    assert fit_cluster(demanded, pytest.fail) == demanded
    assert shortfall(demanded, gpu=True).startswith("8 worker(s) need a GPU each and the cluster has 0: waiting")
    said: list[str] = []
    assert fit_cluster(ClusterConfig(address="auto"), said.append) == ClusterConfig(address="auto")
    assert len(said) == 1
    assert said[0].startswith("no GPU is up in this cluster: the work goes to CPUs")


def test_a_cluster_that_is_too_small_says_what_it_waits_for(with_gpus: Any) -> None:
    with_gpus(2)
    cluster = ClusterConfig(num_workers=(4, 8), address="auto")
    assert shortfall(cluster, gpu=True).startswith("4 worker(s) need a GPU each and the cluster has 2: waiting")
    assert shortfall(cluster, gpu=False) == ""
