"""A local head with tokens: `ray job submit` of a run that succeeds and of a broken one, and `serve deploy`."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from paths import ROOT

from dtrpo_ray.models.registry import save_model
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.models.tokenizer import character_tokenizer
from tests.test_end_to_end import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_shared_ray")]

START_SECONDS = 90


@dataclass(frozen=True)
class Head:
    address: str
    env: dict[str, str]

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        words = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", self.address]
        words += ["--working-dir", ".", "--", sys.executable, *entrypoint]
        deadline = time.monotonic() + START_SECONDS
        while True:
            done = subprocess.run(words, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=600)
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(2)  # the head answers before its job agent has come up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head node on loopback that answers nobody without the token."""
    port, dashboard = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4"]
    words += [f"--dashboard-agent-listen-port={free_port()}"]  # the default is taken by any other Ray on the machine
    words += [
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + START_SECONDS
    while (code := status(address, env["RAY_AUTH_TOKEN"])) != 200:
        assert time.monotonic() < deadline, f"the head did not start (last answer {code})"
        time.sleep(1)
    yield Head(address, env)
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def status(address: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_head_is_closed_to_those_without_the_token(head: Head) -> None:
    assert status(head.address, "") == 401
    assert status(head.address, "wrong" * 16) == 403


def test_a_submitted_run_succeeds_and_leaves_its_checkpoint(head: Head, tmp_path: Path) -> None:
    settings = [
        w
        for item in [f"storage={tmp_path}", "cluster.address=auto", *SMALL, "sft.num_examples=1536"]
        for w in ("--set", item)
    ]
    done = head.submit("jobs/run.py", "sft", "jobs/sudoku.toml", *settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "succeeded" in done.stdout + done.stderr
    base = next((tmp_path / "stages").glob("base-*"))
    assert (base / "model" / "model.safetensors").exists()
    assert (base / "checkpoints" / "step-00000012").is_dir()


def test_a_broken_config_fails_with_its_message(head: Head) -> None:
    done = head.submit("jobs/run.py", "train", "jobs/sudoku.toml", "--set", "train.lrr=1")
    assert done.returncode != 0
    assert "unknown field train.lrr" in done.stdout + done.stderr


def test_serve_deploy_serves_the_shipped_yaml(head: Head, tmp_path: Path, tiny: SDAR) -> None:
    """cluster/serve.yaml as it stands, but for the places of this machine: its port, its checkpoint and its keys."""
    (tmp_path / "model").mkdir()
    save_model(tiny, tmp_path / "model")
    character_tokenizer("abcdefghijklmnopqrstu").save_pretrained(tmp_path / "model")
    (tmp_path / "keys").write_text("a-key\n")
    config = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    places = {"checkpoint": str(tmp_path / "model"), "api_key_file": str(tmp_path / "keys")}
    config["applications"][0]["args"] |= places
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    words = [str(Path(sys.executable).with_name("serve"))]
    done = subprocess.run(
        [*words, "deploy", "-a", head.address, str(tmp_path / "serve.yaml")],
        env=head.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer a-key"}
    deadline = time.monotonic() + START_SECONDS
    while not ready(url):
        assert time.monotonic() < deadline, "the deployment did not become ready"
        time.sleep(0.5)
    body = {"model": "dtrpo", "prompt": "abc", "max_tokens": 8, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 8)
    subprocess.run([*words, "shutdown", "-y", "-a", head.address], env=head.env, check=True, capture_output=True)


def ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False
