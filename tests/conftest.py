"""What the tests share: tiny random models, an exact float64 one, and the folder of public data where there is one."""

import copy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from hypothesis import settings
from paths import SHARED
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dtrpo_ray.models.sdar import SDAR

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("suite")

BLOCK, VOCAB, EOS, MASK = 4, 23, 21, 22

MakeModel = Callable[..., SDAR]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the shared Ray session, and run them before those that start a Ray of their own.

    A test that starts Ray otherwise, as a command or a cluster, has the marker `ray` in its file.
    """
    for item in items:
        if uses_shared_ray(item):
            item.add_marker("ray")
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None and not uses_shared_ray(item))


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Name bytes by their length: compressed ones hold the time, and the workers of pytest-xdist must agree on ids."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def uses_shared_ray(item: pytest.Item) -> bool:
    return "local_ray" in getattr(item, "fixturenames", ())


class ExactSDAR(SDAR):
    """SDAR with every step in float64: the trunk's norms and `logits` are float32 whatever the weights are."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, Qwen3RMSNorm):
                module.forward = MethodType(_exact_norm, module)  # type: ignore[method-assign]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).index_fill(-1, torch.tensor(self.mask_id), float("-inf"))


def _exact_norm(norm: Qwen3RMSNorm, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """The `config.json` of a model small enough for milliseconds, its weights large enough to tell inputs apart."""
    return {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
    }


@pytest.fixture(scope="session")
def make_model(tiny_config: dict[str, Any]) -> MakeModel:
    """A new model from (seed, exact, config changes); `exact` computes in float64 throughout."""

    def make(seed: int = 0, exact: bool = False, **changes: Any) -> SDAR:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = (ExactSDAR if exact else SDAR)(copy.deepcopy(tiny_config) | changes)
            for name, weight in model.named_parameters():
                if "norm" in name:  # ones by default, which would hide a forgotten weight
                    torch.nn.init.uniform_(weight, 0.5, 1.5)
        return (model.double() if exact else model).eval()

    return make


@pytest.fixture(scope="session")
def tiny(make_model: MakeModel) -> SDAR:
    """One float32 model for reading; a test that changes weights makes its own."""
    return make_model(seed=1).requires_grad_(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets and upstream layouts: SHARED_DATA, or shared/data beside the checkout."""
    folder = SHARED
    if not folder.is_dir():
        pytest.skip(f"no public data sets at {folder}; SHARED_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """s3://bucket of a server in this process (moto), which this process and those it starts reach as AWS."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    account = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (account | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        pafs.FileSystem.from_uri("s3://bucket/?allow_bucket_creation=true")[0].create_dir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="session")
def google_bucket() -> Iterator[str]:
    """gs://bucket of a server that this process and those it starts reach as Google.

    A process of its own: pyarrow holds the interpreter while it waits for Google's answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
from http import server
server.HTTPServer = server.ThreadingHTTPServer  # pyarrow copies with several connections at once
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", {port}, in_memory=True, default_bucket="bucket").run()
"""
    server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        else:
            pytest.fail("gcp-storage-emulator does not answer")
        yield "gs://anonymous@bucket"
    server.terminate()
    server.wait()


@pytest.fixture(params=["s3", "gs"])
def remote(request: pytest.FixtureRequest) -> str:
    """A bucket of each kind of object store."""
    name = "bucket" if request.param == "s3" else "google_bucket"
    found: str = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def local_ray(bucket: str) -> Iterator[None]:
    """One Ray session on loopback, as a command would start it, for all tests that can share it.

    Its processes inherit the environment of this moment, so the bucket must be there first.
    """
    from dtrpo_ray.config.cluster import ClusterConfig
    from dtrpo_ray.session import ray_session

    with ray_session(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def no_shared_ray() -> None:
    """End the shared Ray session, for modules that start a Ray of their own."""
    import ray

    ray.shutdown()
