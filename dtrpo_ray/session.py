"""One Ray session for a command: started here on loopback, or joined where the job was submitted."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
import ray.data
from ray.data.context import ShuffleStrategy

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.progress import console

# a fresh page for every tensor costs a fifth of a small step on CPU: let glibc keep its arenas
CPU_WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@contextmanager
def ray_session(cluster: ClusterConfig, object_store_bytes: int | None = None) -> Iterator[None]:
    """Connect to Ray for the time of a command. Raises ConfigError if there is no cluster to join.

    `object_store_bytes` is for a session that is started here; Ray chooses where it is absent.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # ray.train.report waits for one such poll
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster.address == "local":
        # room for the Ray Data tasks beside the workers: logical CPUs, the threads of each worker are bounded
        num_cpus = max(os.cpu_count() or 1, cluster.most_workers + 2, cluster.num_actors + 2)
        ray.init(
            "local",
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            runtime_env={"env_vars": CPU_WORKER_ENV},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    else:
        try:
            ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"cluster.address = {cluster.address!r}: no Ray cluster answers ({str(error).splitlines()[0]}); "
                'start one, or set cluster.address = "local"'
            ) from None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = console.is_terminal
    # the default shuffle starts 200 aggregators: 20 s on two cores for a table of a thousand rows
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    context.use_datasource_v2 = False  # the new reader lists the files of one small table for 2.5 s, at first for 6
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it says that the bars we took are gone
    try:
        yield
    finally:
        ray.shutdown()


def fit_cluster(cluster: ClusterConfig, say: Callable[[str], None]) -> ClusterConfig:
    """The cluster as this machine can have it: with `local`, no more workers and actors than there are GPUs for.

    What is changed is said. Raises ConfigError where GPUs are demanded that are not there. A cluster that was joined
    may grow, so there nothing is changed.
    """
    gpu = uses_gpu(cluster)
    if cluster.address != "local" and cluster.use_gpu == "auto" and not gpu:
        say('no GPU is up in this cluster: the work goes to CPUs; cluster.use_gpu = "yes" waits for GPUs')
    if cluster.address != "local" or not gpu:
        return cluster
    gpus, fewest = int(ray.cluster_resources()["GPU"]), cluster.fewest_workers
    if cluster.use_gpu == "yes" and fewest > gpus:
        raise ConfigError(f"cluster.num_workers = {cluster.num_workers}, but this machine has {gpus} GPU(s)")
    workers: int | tuple[int, int] = min(fewest, gpus)
    if not isinstance(cluster.num_workers, int):
        workers = (min(fewest, gpus), min(cluster.most_workers, gpus))
    actors = min(cluster.num_actors, gpus)
    made = cluster.model_copy(update={"num_workers": workers, "num_actors": actors})
    if made != cluster:
        say(f"{gpus} GPU(s) here: cluster.num_workers = {workers}, num_actors = {actors}")
    return made


def uses_gpu(cluster: ClusterConfig) -> bool:
    """Whether workers and actors ask for a GPU. Raises ConfigError where one is demanded and this machine has none."""
    available = ray.cluster_resources().get("GPU", 0) > 0
    if cluster.use_gpu == "yes" and cluster.address != "local":
        return True  # a cluster of none yet may grow
    if cluster.use_gpu == "yes" and not available:
        raise ConfigError('cluster.use_gpu = "yes", but this machine has no GPU; set "auto" or "no"')
    return available and cluster.use_gpu != "no"


def shortfall(cluster: ClusterConfig, gpu: bool) -> str:
    """What a training stage will wait for, "" where its workers fit the cluster as it is."""
    kind = "GPU" if gpu else "CPU"
    have = int(ray.cluster_resources().get(kind, 0))
    if have >= cluster.fewest_workers:
        return ""
    return (
        f"{cluster.fewest_workers} worker(s) need a {kind} each and the cluster has {have}: waiting for it to grow; "
        "Ctrl-C, and set cluster.num_workers, if it cannot"
    )


def cpu_threads(sharers: int) -> int:
    """Torch threads for each of `sharers` processes that share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // sharers)
