"""One Ray session for a command: started here on loopback, or joined where the job was submitted."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
import ray.data
from ray.data.context import ShuffleStrategy

from dtrpo_ray import compat
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.errors import ConfigError, SessionError, first_line
from dtrpo_ray.progress import console

# a fresh page for every tensor costs a fifth of a small step on CPU: let glibc keep its arenas
CPU_WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

CONNECT_TRIES = 2
JOINED = (
    "joined a Ray cluster: Ray's ports (GCS, raylets, workers, agents, metrics) are on all interfaces of its nodes, "
    "and not all of them ask for the token; keep the nodes in a private network"
)


@contextmanager
def ray_session(cluster: ClusterConfig, object_store_bytes: int | None = None) -> Iterator[None]:
    """Connect to Ray for the time of a command. Raises ConfigError or SessionError if that fails.

    `object_store_bytes` applies to a session that is started here; if absent, Ray chooses.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # ray.train.report waits for one such poll
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"address": cluster.address, "logging_level": logging.ERROR, "log_to_driver": False}
    if cluster.address == "local":
        # logical CPUs, with room for Ray Data's tasks beside the workers; each worker's threads are bounded
        options["num_cpus"] = max(os.cpu_count() or 1, cluster.most_workers + 2, cluster.num_actors + 2)
        options |= {"object_store_memory": object_store_bytes, "include_dashboard": False}
        options["runtime_env"] = {"env_vars": CPU_WORKER_ENV}
    _connect(cluster.address, options)
    if cluster.address != "local":
        console.print(JOINED, markup=False, highlight=False, soft_wrap=True)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = console.is_terminal
    # the default shuffle starts 200 aggregators: 20 s on two cores for a table of a thousand rows
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    context.use_datasource_v2 = False  # the new reader takes 2.5 s to list the files of one small table, 6 s at first
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(compat.RAY_DATA_PROGRESS_LOGGER).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str, options: dict[str, Any]) -> None:
    """Call `ray.init`, a second time if it fails: on a busy machine Ray's processes may start too slowly for it."""
    for number in range(1, CONNECT_TRIES + 1):
        try:
            with compat.loopback_ports() if address == "local" else nullcontext():
                ray.init(**options)
            return
        except ConnectionError as error:
            raise ConfigError(
                f"cluster.address = {address!r}: no Ray cluster answers ({first_line(error)}); "
                'start one, or set cluster.address = "local"'
            ) from None
        except Exception as error:  # Ray raises RuntimeError, TimeoutError and plain Exception here
            ray.shutdown()  # ends the processes that did start
            if number == CONNECT_TRIES:
                raise SessionError(
                    f"cluster.address = {address!r}: Ray did not start in {number} tries ({first_line(error)}). The "
                    "machine may be busy or short of memory: end other programs, then run the same command again. "
                    "Ray's logs are in /tmp/ray/session_latest/logs"
                ) from None
            console.print(f"Ray did not start ({first_line(error)}); trying again", markup=False, highlight=False)


def fit_cluster(cluster: ClusterConfig, say: Callable[[str], None]) -> ClusterConfig:
    """Return the cluster that fits this machine: with "local" and GPUs, no more workers and actors than GPUs.

    Announces each change. A cluster that was joined may grow, so it stays as configured. Raises ConfigError if the
    job demands more GPUs than there are.
    """
    gpu = uses_gpu(cluster)
    if cluster.address != "local" and cluster.use_gpu == "auto" and not gpu:
        say('this cluster has no GPU now: the job runs on CPUs; set cluster.use_gpu = "yes" to wait for GPUs')
    if cluster.address != "local" or not gpu:
        return cluster
    gpus, fewest = int(ray.cluster_resources()["GPU"]), cluster.fewest_workers
    if cluster.use_gpu == "yes" and fewest > gpus:
        raise ConfigError(f"cluster.num_workers = {cluster.num_workers}, but this machine has {gpus} GPU(s)")
    lowest, highest = min(fewest, gpus), min(cluster.most_workers, gpus)
    workers: int | tuple[int, int] = lowest if isinstance(cluster.num_workers, int) else (lowest, highest)
    actors = min(cluster.num_actors, gpus)
    made = cluster.model_copy(update={"num_workers": workers, "num_actors": actors})
    if made != cluster:
        say(f"{gpus} GPU(s) here: cluster.num_workers = {workers}, num_actors = {actors}")
    return made


def uses_gpu(cluster: ClusterConfig) -> bool:
    """Return True if workers and actors ask for a GPU. Raises ConfigError if a required one is missing."""
    available = ray.cluster_resources().get("GPU", 0) > 0
    if cluster.use_gpu == "yes" and cluster.address != "local":
        return True  # a cluster without GPUs may grow
    if cluster.use_gpu == "yes" and not available:
        raise ConfigError('cluster.use_gpu = "yes", but this machine has no GPU; set "auto" or "no"')
    return available and cluster.use_gpu != "no"


def shortfall(cluster: ClusterConfig, gpu: bool) -> str:
    """Return a message about the GPUs or CPUs a training stage must wait for, "" if its workers fit the cluster."""
    kind = "GPU" if gpu else "CPU"
    have, fewest = int(ray.cluster_resources().get(kind, 0)), cluster.fewest_workers
    advice = "waiting for it to grow; Ctrl-C, and set cluster.num_workers, if it cannot"
    return "" if have >= fewest else f"{fewest} worker(s) need a {kind} each and the cluster has {have}: {advice}"


def cpu_threads(sharers: int) -> int:
    """Return the torch threads of each of `sharers` processes that share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // sharers)
