"""The Ray Serve shell: one real deployment over HTTP, and every refusal to start one."""

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from paths import ROOT
from ray import serve
from ray.serve.schema import ServeDeploySchema

from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.config.train import LoraConfig
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import ModelError, ServeError
from dtrpo_ray.models.lora import add_adapters, save_adapter
from dtrpo_ray.models.registry import build_model, load_model, save_model
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.serve import server
from dtrpo_ray.serve.app import MAX_ACTIVE_REQUESTS
from dtrpo_ray.serve.middleware import DEADLINE_SECONDS
from tests.serve.test_app import CONFIG, HERE

torch.set_num_threads(1)

CLUSTER = ROOT / "cluster"


def write_model(path: Path, seed: int) -> Path:
    """A model with one id that has no text."""
    save_model(build_model({**CONFIG, "vocab_size": 8}, seed=seed), path)
    character_tokenizer("01234").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), 3)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "api_key"
    path.write_text("\nfirst-key\n  second-key \n\n")
    return path


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("another"), 5)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, settings = tmp_path_factory.mktemp("adapter"), LoraConfig(rank=2, alpha=16)
    model = load_model(checkpoint)
    add_adapters(model, settings, 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    save_adapter(model, settings, "a/base", path)
    return path


@pytest.fixture(scope="module")
def config(checkpoint: Path, key_file: Path) -> ServeConfig:
    return ServeConfig(checkpoint=str(checkpoint), model_name="tiny", port=0, api_key_file=key_file)


@pytest.fixture(scope="module")
def url(local_ray: None, config: ServeConfig) -> Iterator[str]:
    yield server.start(config)
    server.stop()


KEY = {"Authorization": "Bearer first-key"}


def post(url: str, key: str = "first-key", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", "x-request-timeout-seconds": "0"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)


# --- a real deployment -----------------------------------------------------------------------------------------


def test_answers_over_http_what_the_engine_generates(url: str, checkpoint: Path) -> None:
    engine = Engine.load(checkpoint)
    (expected,) = engine.generate([engine.encode("0123")], SamplingParams(max_new_tokens=12, denoising_steps=2), [0])
    response = post(url, model="tiny", prompt="0123", temperature=0, max_tokens=12, steps=2)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == engine.decode(expected.text_ids)
    sampled = [post(url, prompt="0123", seed=9, n=4).json()["choices"] for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_every_port_of_a_local_session_is_on_loopback(url: str) -> None:
    """Ray's own ports too (GCS, raylet, workers, agents, Serve's proxy), though Ray opens them on all interfaces.

    But one for each replica: Serve writes the address of its gRPC server, which asks for the token, in its own code.
    """
    ours = psutil.Process()
    family = {process.pid: process for process in (ours, *ours.children(recursive=True))}
    ports = [
        (process.name(), found.laddr.ip, found.laddr.port)
        for process in family.values()
        for found in process.net_connections("inet")
        if found.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and found.laddr
    ]
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in ports}
    assert int(url.rsplit(":", 1)[1]) in {port for _, _, port in ports}
    elsewhere = [name for name, address, _ in ports if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert len(elsewhere) <= 1
    assert all(name.startswith("ray::ServeReplica") for name in elsewhere)


def test_keys_of_the_file_open_the_deployment(url: str) -> None:
    assert post(url, "second-key", prompt="0").status_code == 200
    assert post(url, "third-key", prompt="0").status_code == 401
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_refusals_pass_serve_unchanged(url: str) -> None:
    assert post(url, prompt="0", echo=True).json()["error"]["param"] == "echo"
    assert post(url, prompt="0" * 2**21).status_code == 413


def test_a_second_server_in_the_cluster_is_refused(url: str, checkpoint: Path) -> None:
    with pytest.raises(ServeError, match="already"):
        server.start(ServeConfig(checkpoint=str(checkpoint), port=0))


def test_streams_pass_serve_block_by_block(url: str) -> None:
    body = {"prompt": "0123", "seed": 9, "max_tokens": 24, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**body, "stream": True}, headers=KEY, timeout=60
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    assert len(parts) == 6
    assert "".join(parts) == post(url, **body).json()["choices"][0]["text"]


def send_raw(url: str, head: bytes) -> bytes:
    """Send a GET of the models with these header lines; return the whole answer."""
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), 30) as wire:
        wire.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + head + b"\r\n")
        return b"".join(iter(lambda: wire.recv(2**16), b""))


OBEYED = (
    b"serve_multiplexed_model_id",
    b"x-session-id",
    b"x-request-id",
    b"x-request-timeout-seconds",
    b"traceparent",
)


def test_no_header_breaks_the_proxy_or_steers_it(url: str) -> None:
    """Serve reads these itself: bytes that are no UTF-8 ended in its own 500, and a client chose its own timeout."""
    key = b"Authorization: Bearer first-key\r\n"
    for name in OBEYED:
        for value in (b"\xff\xfe", b"0.000001"):
            answer = send_raw(url, key + name + b": " + value + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), (name, value, answer[:300])


def test_bodies_that_never_arrive_stop_nobody(url: str) -> None:
    """More of them than Serve takes requests."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer first-key\r\n"
    with ExitStack() as stack:
        for _ in range(2 * MAX_ACTIVE_REQUESTS * 2 + 50):
            slow = stack.enter_context(socket.create_connection((host, int(port)), 30))
            slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode())
        for _ in range(3):
            assert post(url, prompt="0123", max_tokens=8).status_code == 200


def test_a_drained_endpoint_asks_to_come_back(url: str, config: ServeConfig) -> None:
    """What has begun is finished, and a new request meanwhile is a 503 of our shape, which clients try again."""
    body = {"prompt": "0123", "max_tokens": 240, "ignore_eos": True, "steps": 4, "n": 16, "stream": True}
    refused: list[httpx.Response] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=KEY, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        serve.delete(server.APP_NAME, _blocking=False)
        wait_for(lambda: refused.append(post(url, prompt="0")) or refused[-1].status_code != 200)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert (refused[-1].status_code, refused[-1].headers["Retry-After"]) == (503, "1")
    assert refused[-1].json()["error"]["code"] == "unavailable"
    wait_for(lambda: server.APP_NAME not in serve.status().applications)
    deploy(config)
    wait_for(lambda: post(url, prompt="0").status_code == 200)


def load(url: str, seconds: float, workers: int = 4, retries: int = 3) -> Iterator[Callable[[], list[int]]]:
    """Requests in a loop while the block runs; what it yields stops them and returns their statuses, 0 for a failure.

    A connection that breaks, or a status from 500 on, is tried again `retries` times, as a retry policy would.
    """
    stop = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            for _ in range(1 + retries):
                with suppress(httpx.TransportError):
                    status = post(url, prompt="0123", max_tokens=32, ignore_eos=True, temperature=0).status_code
                    if status < 500:
                        break
                time.sleep(0.3)
            else:
                status = 0
            statuses.append(status)

    threads = [threading.Thread(target=ask) for _ in range(workers)]
    for thread in threads:
        thread.start()

    def finish() -> list[int]:
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join(60)
        return statuses

    yield finish
    stop.set()


def deploy(config: ServeConfig, **options: Any) -> None:
    """Deploy over what runs, and wait until the application is healthy again."""
    built = server.build(config)
    if options:
        built = built._bound_deployment.options(**options).bind(*built._bound_deployment.init_args)
    serve.run(built, name=server.APP_NAME, route_prefix="/")


def text_of(url: str) -> str:
    return str(post(url, prompt="0123", temperature=0, max_tokens=20, ignore_eos=True).json()["choices"][0]["text"])


def test_a_new_checkpoint_is_swapped_in_under_load(url: str, config: ServeConfig, another: Path) -> None:
    """`user_config` alone: the same replica, not one request refused, and the new model's answers."""
    before = text_of(url)
    for finish in load(url, 1.0):
        deploy(config, user_config={"checkpoints": {"tiny": str(another)}})
        statuses = finish()
    assert len(statuses) >= 4
    assert set(statuses) == {200}
    engine = Engine.load(another)
    (expected,) = engine.generate(
        [engine.encode("0123")], SamplingParams(max_new_tokens=20, denoising_steps=4, ignore_eos=True), [0]
    )
    assert text_of(url) == engine.decode(expected.text_ids) != before


def processes() -> set[psutil.Process]:
    """The replicas of this session, whatever else runs on the machine."""
    ours = psutil.Process().children(recursive=True)
    return {process for process in ours if "ServeReplica" in " ".join(process.cmdline())}


def test_a_rolled_replica_ends_what_it_has_begun(url: str, config: ServeConfig) -> None:
    """Other arguments, so another process; nothing is tried again, and nothing is lost."""
    before = processes()
    for finish in load(url, 1.0, retries=0):
        deploy(config.model_copy(update={"denoising_steps": 2}))
        assert processes() - before
        statuses = finish()
    assert len(statuses) >= 4
    assert set(statuses) == {200}


def test_a_killed_replica_loses_no_request_that_is_retried_and_says_so_to_a_stream(url: str) -> None:
    body = {"prompt": "0123", "max_tokens": 240, "ignore_eos": True, "steps": 4, "n": 16, "stream": True}
    killed, lines = processes(), list[str]()
    for finish in load(url, 1.0):
        with (
            suppress(httpx.TransportError),
            httpx.stream("POST", f"{url}/v1/completions", json=body, headers=KEY, timeout=60) as answer,
        ):
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if not lines:
                    for process in killed:
                        process.kill()
                lines.append(line)
        statuses = finish()
    assert lines
    assert "data: [DONE]" not in lines
    assert json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert len(statuses) >= 4
    assert set(statuses) == {200}
    assert processes() - killed


def replicas() -> int:
    states = serve.status().applications[server.APP_NAME].deployments["Model"].replica_states
    return sum(count for state, count in states.items() if str(state) in ("RUNNING", "ReplicaState.RUNNING"))


def test_replicas_follow_the_load_up_and_down_to_none(
    url: str, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("UPSCALE_SECONDS", 0.2), ("DOWNSCALE_SECONDS", 1.0), ("LOOK_BACK_SECONDS", 1.0)):
        monkeypatch.setattr(server, name, value)
    scaled = config.model_copy(update={"num_replicas": 0, "max_replicas": 2, "max_batch": 2})
    deploy(scaled)
    for finish in load(url, 0.0, workers=8):
        wait_for(lambda: replicas() == 2)
        statuses = finish()
    assert set(statuses) <= {200, 429}
    wait_for(lambda: replicas() == 0)
    assert post(url, prompt="0").status_code == 200  # a request starts one again


def wait_for(met: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_server_that_stops_waits_as_long_as_its_replicas_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve.delete` gives up after a minute; a request may take two."""
    left = [TimeoutError(), TimeoutError(), None]
    applications = {server.APP_NAME: None}

    def delete(name: str) -> None:
        if error := left.pop(0):
            raise error
        del applications[name]

    def end(_: float) -> None:
        assert not applications

    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr(serve, "delete", delete)
    monkeypatch.setattr(serve, "shutdown", lambda: None)
    monkeypatch.setattr(server.compat, "end_serve_controller", end)
    server.stop()
    assert not left


# --- refusals to start, before anything runs ---------------------------------------------------------------------


def test_a_port_in_use_is_named_with_its_remedy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "status", lambda: serve.schema.ServeStatus())
    monkeypatch.setattr(server, "PORT_SECONDS", 0)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another Serve would hold it
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"serve\.port = {port} .*set serve\.port to another"):
            server.start(ServeConfig(checkpoint=str(checkpoint), port=port))


def test_a_port_that_becomes_free_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    monkeypatch.setattr(server.time, "sleep", lambda _: taken.close())
    assert server.free_port("127.0.0.1", port) == port


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ServeError, match=r"serve\.port = 0 on 198\.51\.100\.1"):
        server.free_port("198.51.100.1", 0)


def test_afree_port_is_found_and_a_free_one_kept() -> None:
    port = server.free_port("127.0.0.1", 0)
    assert port > 0
    assert server.free_port("127.0.0.1", port) == port


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
    ],
)
def test_the_url_can_be_reached(host: str, url: str) -> None:
    assert server._url(host, 80) == url


def test_serve_deploy_without_keys_is_refused_wherever_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` cannot know the host of the YAML, so it is closed."""
    monkeypatch.delenv("DTRPO_API_KEY", raising=False)
    with pytest.raises(ServeError, match="would answer everyone who reaches its port; name a file of keys"):
        server.build(ServeConfig(checkpoint="unused"))


def test_keys_are_the_lines_of_the_file(key_file: Path) -> None:
    assert server.read_keys(key_file) == {"first-key", "second-key"}
    assert server.read_keys(None) == frozenset()


def test_keys_of_the_environment_count_where_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", " , "):
        monkeypatch.setenv("DTRPO_API_KEY", value)
        with pytest.raises(ValueError, match=r"serve\.host = '0\.0\.0\.0' is open"):
            ServeConfig(host="0.0.0.0")
    monkeypatch.setenv("DTRPO_API_KEY", "one, two,")
    assert ServeConfig(host="0.0.0.0").api_key_file is None
    assert server.read_keys(None) == {"one", "two"}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_replicas": 0}, "max_replicas"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"model_name": "m", "other_models": {"m": "x"}}, "its own name"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ServeConfig(**fields)


def test_replicas_are_bounded_where_they_follow_the_load() -> None:
    deployment = server._application(
        ServeConfig(checkpoint="somewhere", num_replicas=0, max_replicas=3), frozenset()
    )._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 3)


@pytest.fixture
def replica(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., server.Model]:
    """The replica's class by itself, without Ray, from its other models."""
    context = SimpleNamespace(get_assigned_resources=dict)
    monkeypatch.setattr(server.ray, "get_runtime_context", lambda: context)

    def make(digests: tuple[str, ...] = (), **others: str) -> server.Model:
        elsewhere = {"api_key_file": Path("/not/on/this/node"), "other_models": others}
        return server.Model(config.model_copy(update=elsewhere), digests)

    return make


def said(model: server.Model, *names: str) -> list[str]:
    """What models of a replica write to one prompt."""
    asked = {"prompt": "0123", "temperature": 0, "max_tokens": 20, "ignore_eos": True, "steps": 2}
    client = TestClient(model.__serve_build_asgi_app__(), HERE)
    answers = [client.post("/v1/completions", json={**asked, "model": name}) for name in names]
    return [answer.json()["choices"][0]["text"] for answer in answers]


def test_a_replica_swaps_what_user_config_changes(
    config: ServeConfig, another: Path, replica: Callable[..., server.Model]
) -> None:
    """Another directory for a name is loaded, the same one is not, and one that is no model leaves all as it was."""
    model = replica(base=config.checkpoint)
    before, kept = said(model, "tiny", "base"), model.asgi.state.service.served["base"]
    assert before[0] == before[1]
    with pytest.raises(ModelError):
        asyncio.run(model.reconfigure({"checkpoints": {"tiny": str(another), "base": "nowhere"}}))
    assert said(model, "tiny", "base") == before
    asyncio.run(model.reconfigure({"checkpoints": {"tiny": str(another), "base": config.checkpoint}}))
    assert model.asgi.state.service.served["base"] is kept
    after = said(model, "tiny", "base")
    assert after[1] == before[1] != after[0]


def test_adapters_stand_on_the_base_that_serves(
    config: ServeConfig, checkpoint: Path, another: Path, adapter: Path, replica: Callable[..., server.Model]
) -> None:
    """Asked for by name beside their base; a new base is swapped in with its adapters on it, also with new ones."""

    def expected(base: Path) -> list[str]:
        engine = Engine.load(base)
        params = SamplingParams(max_new_tokens=20, denoising_steps=2, ignore_eos=True)
        made = [e.generate([e.encode("0123")], params, [0])[0] for e in (engine, engine.load_adapter(adapter))]
        return [engine.decode(each.text_ids) for each in made]

    model = replica(aligned=str(adapter))
    assert said(model, "tiny", "aligned") == expected(checkpoint)
    hosted = model.asgi.state.service.served
    embeddings = [hosted[name].engine.model.lm.model.embed_tokens.weight for name in ("tiny", "aligned")]
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr()
    asyncio.run(model.reconfigure({"checkpoints": {"new": str(adapter), "tiny": str(another)}}))
    on_another = expected(another)
    assert said(model, "tiny", "aligned", "new") == [*on_another, on_another[1]]
    assert len({*expected(checkpoint), *on_another}) == 4


def test_the_keys_of_the_command_hold_in_a_replica_that_cannot_read_them(
    config: ServeConfig, replica: Callable[..., server.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests travel, and no key: on the replica's node neither the file nor the variable exists."""
    monkeypatch.delenv("DTRPO_API_KEY", raising=False)
    given, digests = server.build(config)._bound_deployment.init_args
    assert "first-key" not in repr((given, digests))
    assert digests == tuple(sorted(hashlib.sha256(key).hexdigest() for key in (b"first-key", b"second-key")))
    client = TestClient(replica(digests=digests).asgi)
    for header, status in ((None, 401), ("Bearer wrong", 401), ("Bearer second-key", 200)):
        assert client.get("/v1/models", headers={"Authorization": header} if header else {}).status_code == status


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe"])
def test_a_key_file_without_keys_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ServeError, match=rf"serve\.api_key_file = {path}: .*one.* a line|one a line"):
        server.start(ServeConfig(checkpoint="unused", api_key_file=path))


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"serve\.checkpoint"):
        server.start(ServeConfig())
    with pytest.raises(ModelError, match="not a model directory"):
        server.start(ServeConfig(checkpoint=str(tmp_path), port=0))


def test_the_deployment_is_bounded_and_drains() -> None:
    deployment = server._application(ServeConfig(checkpoint="somewhere", num_replicas=3), ())._bound_deployment
    assert deployment.num_replicas == 3
    assert MAX_ACTIVE_REQUESTS < deployment.max_ongoing_requests < 1000
    assert 0 < deployment.max_queued_requests < 1000
    assert deployment._deployment_config.graceful_shutdown_timeout_s > DEADLINE_SECONDS


# --- the files of cluster/ ---------------------------------------------------------------------------------------


def deployed() -> list[dict[str, Any]]:
    manifests = list(yaml.safe_load_all((CLUSTER / "kuberay" / "rayservice.yaml").read_text()))
    (service,) = [m for m in manifests if m["kind"] == "RayService"]
    return [yaml.safe_load((CLUSTER / "serve.yaml").read_text()), yaml.safe_load(service["spec"]["serveConfigV2"])]


@pytest.mark.parametrize("config", deployed(), ids=["vm", "kubernetes"])
def test_shipped_serve_configs_build(config: dict[str, Any], key_file: Path) -> None:
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "dtrpo_ray.serve.server:build"
    args = ServeConfig.model_validate(application.args)
    assert args.api_key_file is not None
    built = server.build(args.model_copy(update={"api_key_file": key_file}))  # this machine lacks theirs
    assert isinstance(built, serve.Application)
    assert schema.controller_options is not None
    assert schema.controller_options.runtime_env == {"env_vars": server.FRONT}
    assert schema.http_options.request_timeout_s is not None
    assert schema.http_options.request_timeout_s > DEADLINE_SECONDS
