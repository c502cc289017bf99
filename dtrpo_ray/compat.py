"""Private parts of Ray, DeepSpeed and torch that no public call replaces.

No other module names them (tests/test_compat.py reads every import). Each entry says why it is needed and when it may
go. Written against Ray 2.60, DeepSpeed 0.19.8 and torch 2.13; try to drop each entry at an upgrade. Heavy packages are
imported where they are used, so that importing this module costs nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RAY_DATA_PROGRESS_LOGGER = "ray.data._internal.progress"
"""Logger that warns once in a process about progress bars that we switched off on purpose.

Until Ray Data keeps silent about bars that a program disables. Silencing all of `ray.data` would hide real warnings.
"""

RAY_TRAIN_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a run's checkpoints, a file in the run's folder.

A new driver removes it and chooses among the checkpoints that verify: Ray refuses to start over a listed checkpoint
that was pruned. Until a RunConfig can start a run without the list of an earlier one.
"""


@contextmanager
def loopback_ports() -> Iterator[None]:
    """Let `ray.init` start a session whose ports are all on 127.0.0.1.

    On Linux they are on all interfaces, three of them without a token, and `_node_ip_address` moves some of them only.
    Where Ray supports no cluster (Windows, macOS) it uses loopback, by a constant that `ray.init` reads. Until an
    option of `ray.init` names the address.
    """
    from ray._private import ray_constants

    default = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = default


def drop_placement_group_cleaner(trainer: Any) -> None:
    """Run a TorchTrainer without the actor that frees the workers' places if Ray Train's controller dies.

    In a session that we started, those places go with the session. The actor asks the dashboard, which such a session
    lacks, and so delays the end of each training stage by 12 seconds. Until it answers without a dashboard, or an
    option of RunConfig leaves it out.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    create = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [
        c for c in create() if not isinstance(c, PlacementGroupCleanerCallback)
    ]


def end_serve_controller(seconds: float) -> None:
    """End Ray Serve's controller and wait up to `seconds` for it, before `serve.shutdown` does the rest.

    `serve.shutdown` waits for a call that dies with the controller, and Ray prints "Task
    ServeController.graceful_shutdown failed" at every Ctrl-C. Until it no longer does.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    deadline = time.monotonic() + seconds
    with suppress(ValueError, RayActorError):  # raised once it is gone
        ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE).graceful_shutdown.remote(wait=False)
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            time.sleep(0.1)


def disable_shm_all_reduce(deepspeed: Any) -> None:
    """Switch off DeepSpeed's C++ all-reduce for CPU inference, which it would compile when it starts.

    Training does not use it, it takes a minute, and a worker killed during the build leaves a lock on which every later
    run waits. Until DeepSpeed builds it only for inference, or reads an environment variable that disables it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def extension_folder(name: str) -> Path:
    """Return the folder in which torch compiles an extension.

    torch's lock in it outlives a build that was killed, and every later build would wait on it, so the caller removes
    the lock. Until torch locks with something that dies with the process.
    """
    from torch.utils.cpp_extension import _get_build_directory  # imports setuptools, which only a build needs

    return Path(_get_build_directory(name, False))
