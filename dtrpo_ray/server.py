"""Ray Serve shell: `build` makes the application of a config (also from cluster/serve.yaml), `start` serves it here."""

import socket
from pathlib import Path

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions

from dtrpo_ray.app import create_app
from dtrpo_ray.config import ServeConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.errors import ServeError
from dtrpo_ray.models.registry import read_config

APP_NAME = "dtrpo"


def build(args: ServeConfig) -> serve.Application:
    """The Serve application of a config: each replica loads the checkpoint and hosts the HTTP application."""
    read_config(Path(args.checkpoint))  # a wrong path is the deployer's to see, not a replica's
    keys = read_keys(args.api_key_file)

    def application() -> FastAPI:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        return create_app(Engine.load(Path(args.checkpoint)), args, keys)

    gpus = 1 if torch.cuda.is_available() else 0

    @serve.deployment(
        name="dtrpo",
        num_replicas=args.num_replicas,
        max_ongoing_requests=16,
        max_queued_requests=64,
        graceful_shutdown_timeout_s=30,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    @serve.ingress(application)
    class Replica:
        """Holds the application; every route is its own."""

    return Replica.bind()  # type: ignore[attr-defined]


def read_keys(path: Path | None) -> frozenset[str]:
    """The keys of a file, one a line. Raises ServeError for a file that is missing or empty."""
    if path is None:
        return frozenset()
    try:
        keys = frozenset(line.strip() for line in path.read_text().splitlines() if line.strip())
    except OSError as error:
        raise ServeError(f"serve.api_key_file: {path} cannot be read ({error.strerror})") from None
    if not keys:
        raise ServeError(f"serve.api_key_file: {path} holds no key; write one a line")
    return keys


def start(config: ServeConfig) -> str:
    """Serve `config` in the Ray session of this process; returns the base URL once requests are answered.

    Port 0 takes a free one. Raises ServeError where the port is taken or the model does not load.
    """
    port = _usable_port(config.host, config.port)
    serve.start(http_options=HTTPOptions(host=config.host, port=port))
    try:
        serve.run(build(config), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise ServeError(f"{config.checkpoint} cannot be served: {str(error).strip().splitlines()[-1]}") from None
    return f"http://{config.host}:{port}"


def stop() -> None:
    """Drain and end what `start` started."""
    serve.shutdown()


def _usable_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"serve.port = {port} on {host} cannot be used ({error.strerror}); set another, or 0 for any"
            ) from None
        return int(probe.getsockname()[1])
