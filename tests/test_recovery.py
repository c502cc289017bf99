"""Nodes that go: a drained one (a checkpoint before its deadline) and a lost one, with an elastic number of workers.

A cluster of small Ray nodes in this machine; the table of faults inside workers is `test_trainer.py`.
"""

import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import ray.cloudpickle
import torch
from ray.cluster_utils import Cluster

from dtrpo_ray import dataset, loop, trainer
from dtrpo_ray.backend import PlainBackend
from dtrpo_ray.config import ClusterConfig
from dtrpo_ray.metrics import EVENTS, METRICS, read_metrics
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.session import ray_session
from tests.test_trainer import CONFIG, write_table

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(sys.modules["tests.test_trainer"])

STEPS, STEP_SECONDS, NOTICE_SECONDS = 24, 1.0, 10
LONG = CONFIG.model_copy(update={"num_epochs": 6, "save_every": 1000, "lr": 1e-3})


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without CPUs and three nodes of one worker each."""
    env = {
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


def slow(folder: str, settings: dict[str, Any]) -> None:
    """`trainer._worker` at one step a second that says on which node it runs."""
    rank, real = ray.train.get_context().get_world_rank(), loop.seed_step
    (Path(folder) / f"{time.time():.3f}-{rank}.json").write_text(
        json.dumps({"rank": rank, "node": ray.get_runtime_context().get_node_id(), "time": time.time()})
    )

    def seed_step(seed: int, step: int, rank: int) -> None:
        real(seed, step, rank)
        time.sleep(STEP_SECONDS)

    loop.seed_step = seed_step  # type: ignore[assignment]
    trainer._worker(settings)


def latest_node(folder: Path, rank: int) -> str:
    notes = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*-{rank}.json"))]
    return str(max(notes, key=lambda note: note["time"])["node"])


def drain(cluster: Cluster, node: str) -> None:
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + NOTICE_SECONDS) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=cluster.address)
    accepted, why = client.drain_node(node, reason, "spot", deadline)
    assert accepted, why


def lose(cluster: Cluster, node: str) -> None:
    cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == node), allow_graceful=False)


def straight_weights(base: Path, table: Path) -> dict[str, torch.Tensor]:
    """The same run by one plain process."""
    rows = pq.read_table(table).to_pylist()
    plan = dataset.make_plan([row["row_id"] for row in rows], LONG, 0)
    size = LONG.global_batch
    batches = [
        [{**rows[plan.row[o]], "epoch": int(plan.epoch[o]), "batch_weight": float(size)} for o in range(s, s + size)]
        for s in range(0, len(plan.row), size)
    ]
    policy, reference = load_model(base), load_model(base).eval()
    backend = PlainBackend(policy, LONG, plan.num_steps, torch.device("cpu"))
    to_batch = loop.collate(LONG, policy, 0)
    loop.run(LONG, backend, reference, batches, to_batch, 0, plan.num_steps, lambda row: None, lambda step: None)
    return {name: value.detach() for name, value in policy.named_parameters()}


def test_a_drained_node_and_a_lost_one(
    nodes: Cluster, tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, notes = tmp_path / "elastic.partial", tmp_path / "notes"
    for folder in (out, notes, tmp_path / "base"):
        folder.mkdir()
    save_model(make_model(), tmp_path / "base")
    stage = trainer.TrainStage("elastic", tmp_path / "base", write_table(tmp_path / "table"), out, 0)
    cluster = ClusterConfig(address=nodes.address, num_workers=(1, 2), max_failures=3, use_gpu="no", hang_seconds=120)
    monkeypatch.setattr(trainer, "_worker", functools.partial(slow, str(notes)))

    def steps() -> int:
        return max((row["step"] for row in read_metrics(out / METRICS)), default=0)

    def events(kind: str) -> list[dict[str, Any]]:
        return [event for event in read_metrics(out / EVENTS) if event["event"] == kind]

    def chaos() -> None:
        while steps() < 3:
            time.sleep(0.2)
        drain(nodes, latest_node(notes, 1))
        while not (events("resume") and steps() >= events("resume")[0]["step"] + 2):
            time.sleep(0.2)
        lose(nodes, latest_node(notes, 1))

    thread = threading.Thread(target=chaos, daemon=True)
    with ray_session(cluster):
        thread.start()
        trainer.train(stage, LONG, cluster)
    thread.join(5)
    assert not thread.is_alive()
    drained, resumed = events("drain"), events("resume")
    assert drained
    assert "checkpoint now" in drained[0]["message"]
    # the checkpoint of the drain is the one both attempts came back to: there was no other
    assert len(resumed) >= 2
    assert resumed[0]["step"] >= 3
    assert resumed[0]["time"] - drained[0]["time"] >= NOTICE_SECONDS * 0.5  # it used the time it was given
    assert resumed[-1]["num_workers"] == 1
    assert [row["step"] for row in read_metrics(out / METRICS)] == list(range(1, STEPS + 1))
    theirs = straight_weights(tmp_path / "base", tmp_path / "table")
    ours = dict(load_model(out / "model").named_parameters())
    start = dict(load_model(tmp_path / "base").named_parameters())
    assert max(float((value - theirs[name]).abs().max()) for name, value in ours.items()) < 1e-4
    assert max(float((value - start[name]).abs().max()) for name, value in ours.items()) > 5e-3
