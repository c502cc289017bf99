"""What a job asks of a machine, and what it is told where the machine has less."""

from pathlib import Path
from typing import Any

import pytest
import ray
from paths import ROOT
from ray._private import ray_constants

from dtrpo_ray.cli import main
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.errors import ConfigError, SessionError
from dtrpo_ray.session import fit_cluster, ray_session, shortfall, uses_gpu


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
    assert said[0].startswith("this cluster has no GPU now: the job runs on CPUs")


def test_a_cluster_that_is_too_small_says_what_it_waits_for(with_gpus: Any) -> None:
    with_gpus(2)
    cluster = ClusterConfig(num_workers=(4, 8), address="auto")
    assert shortfall(cluster, gpu=True).startswith("4 worker(s) need a GPU each and the cluster has 2: waiting")
    assert shortfall(cluster, gpu=False) == ""


def fake_ray(monkeypatch: pytest.MonkeyPatch, *failures: Exception) -> list[str]:
    """Let `ray.init` fail so often before it succeeds; return the calls that a session makes."""
    calls: list[str] = []
    left = list(failures)

    def init(**options: Any) -> None:
        calls.append(f"init {options['address']}")
        if left:
            raise left.pop(0)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


# what Ray 2.60 raises if its own processes do not come up in time
SLOW = [
    Exception("The current node timed out during startup. This could happen because some of the raylet failed"),
    RuntimeError("Failed to start GCS.  Last 0 lines of error files:\n\n.Please check gcs_server.out for details."),
    TimeoutError("Timed out after 30 seconds while waiting for node to startup."),
]


@pytest.mark.parametrize("failure", SLOW, ids=lambda error: type(error).__name__)
def test_ray_that_starts_too_slowly_is_started_once_more(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    calls = fake_ray(monkeypatch, failure)
    with ray_session(ClusterConfig()):
        assert calls == ["init local", "shutdown", "init local"]  # what did start is ended before the second try
    assert calls[-1] == "shutdown"


@pytest.mark.parametrize(("address", "looped", "said"), [("local", True, ""), ("auto", False, "on all interfaces")])
def test_a_session_of_our_own_is_on_loopback_and_one_that_is_joined_says_what_is_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, looped: bool, said: str
) -> None:
    fake_ray(monkeypatch)
    found = []
    monkeypatch.setattr(ray, "init", lambda **_: found.append(not ray_constants.ENABLE_RAY_CLUSTER))
    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_session(ClusterConfig(address=address)):
        assert found == [looped]
        assert ray_constants.ENABLE_RAY_CLUSTER is before
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("address", ["local", "auto"])
def test_ray_that_does_not_start_is_one_message_with_a_remedy(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    calls = fake_ray(monkeypatch, *SLOW)
    with pytest.raises(SessionError) as caught, ray_session(ClusterConfig(address=address)):
        pytest.fail("there is no session")
    assert calls == [f"init {address}", "shutdown"] * 2
    message = str(caught.value)
    assert message.startswith(f"cluster.address = '{address}': Ray did not start in 2 tries (Failed to start GCS.")
    assert "end other programs, then run the same command again" in message
    assert "\n" not in message
    assert caught.value.__cause__ is None


def test_no_cluster_to_join_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_ray(monkeypatch, ConnectionError("Could not find any running Ray instance.\nPlease specify"))
    refusal = r"no Ray cluster answers \(Could not find any running Ray instance\.\)"
    with pytest.raises(ConfigError, match=refusal), ray_session(ClusterConfig(address="auto")):
        pytest.fail("there is no session")
    assert calls == ["init auto"]


@pytest.mark.parametrize("verb", ["train", "prepare", "serve"])
def test_a_verb_whose_ray_does_not_start_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    fake_ray(monkeypatch, *SLOW)
    source = str(tmp_path if verb == "serve" else ROOT / "jobs" / "sudoku.toml")
    setting = [] if verb == "serve" else ["--set", f"storage={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", ["dtrpo", verb, source, *setting])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "error: cluster.address = 'local': Ray did not start in 2 tries" in said
    assert "Traceback" not in said
