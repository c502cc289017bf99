"""Ray Serve shell: `app.py` in replicas behind Serve's HTTP proxy.

`serve deploy` calls `build` with the `args` of cluster/serve.yaml; the CLI and the demo call `start` and `stop` in
their own Ray session.
"""

import asyncio
import errno
import logging
import os
import re
import socket
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, ControllerOptions, HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from dtrpo_ray import compat
from dtrpo_ray.config.serve import KEY_VARIABLE, ServeConfig
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.errors import ServeError
from dtrpo_ray.models.lora import is_adapter
from dtrpo_ray.models.registry import read_config
from dtrpo_ray.serve.app import MAX_ACTIVE_REQUESTS, create_app
from dtrpo_ray.serve.middleware import DEADLINE_SECONDS, key_digests

APP_NAME = "dtrpo"
PORT_SECONDS = 3.0  # for a taken port to become free
READY_SECONDS = 60.0  # from a running replica to the first answer through the proxy
SHUTDOWN_SECONDS = 30.0  # for Serve's controller to end
GRACE_SECONDS = DEADLINE_SECONDS + 10  # for a stopping replica to finish its requests
# environment of Serve's controller, which its proxies inherit
FRONT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "dtrpo_ray.serve.middleware:front"}
UPSCALE_SECONDS, DOWNSCALE_SECONDS, LOOK_BACK_SECONDS = 5.0, 300.0, 10.0  # of load before replicas are added, removed


class Model:
    """One replica: the engines, and the app that Serve asks for once they are loaded.

    `digests` are those of the API keys where the command ran. A replica reads no keys itself: on its node the file or
    the environment variable may be missing, and the endpoint would be open.
    """

    def __init__(self, config: ServeConfig, digests: tuple[str, ...]) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(cpus)))
        self.config, self.checkpoints = config, {config.model_name: config.checkpoint, **config.other_models}
        engine = Engine.load(Path(config.checkpoint))
        others = {name: _load(Path(path), engine) for name, path in config.other_models.items()}
        # not `app`: Serve gives the class a property of that name
        self.asgi = create_app(engine, config, digests, others)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.asgi

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the models that changed in `user_config: {checkpoints: {name: directory}}`, then swap them in.

        A new base reloads its adapters too. Running requests end with the model they began with, and none is refused
        meanwhile. If one directory cannot be loaded, nothing is swapped.
        """
        service, base = self.asgi.state.service, self.config.model_name
        wanted = {**self.checkpoints, **user_config.get("checkpoints", {})}
        changed = {name for name, path in wanted.items() if self.checkpoints.get(name) != path}
        engines = {base: service.served[base].engine}
        if base in changed:
            engines[base] = await asyncio.to_thread(Engine.load, Path(wanted[base]))
            changed |= {name for name, path in wanted.items() if is_adapter(Path(path))}
        for name in changed - {base}:
            engines[name] = await asyncio.to_thread(_load, Path(wanted[name]), engines[base])
        for name in changed:
            service.swap(name, engines[name])
        self.checkpoints = wanted


def _load(path: Path, base: Engine) -> Engine:
    """Load a model, or an adapter on the weights of `base`."""
    return base.load_adapter(path) if is_adapter(path) else Engine.load(path)


def build(args: ServeConfig) -> serve.Application:
    """Return the Serve application of a config; Serve validates the `args` of a YAML into `ServeConfig`.

    Raises ServeError if there are no keys: `serve deploy` listens where its YAML says, on all interfaces if it says
    nothing, and does not tell the application.
    """
    digests = key_digests(read_keys(args.api_key_file))
    if not digests:
        raise ServeError(
            f"serve.api_key_file is not set, and {KEY_VARIABLE} is empty where the application is built: the endpoint "
            "would answer everyone who reaches its port; name a file of keys as api_key_file in the args"
        )
    return _application(args, digests)


def _application(args: ServeConfig, digests: tuple[str, ...]) -> serve.Application:
    if not args.checkpoint:
        raise ServeError("serve.checkpoint is empty; name a model directory, as `dtrpo export` writes one")
    gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    deployment = serve.deployment(
        name="Model",
        **_replicas(args),
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpu else 0},
        # the app itself refuses requests beyond MAX_ACTIVE_REQUESTS; the rest is room for health and model queries
        max_ongoing_requests=2 * MAX_ACTIVE_REQUESTS,
        max_queued_requests=2 * MAX_ACTIVE_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
        user_config={"checkpoints": {args.model_name: args.checkpoint, **args.other_models}},
    )
    application: serve.Application = deployment(serve.ingress()(Model)).bind(args, digests)
    return application


def _replicas(args: ServeConfig) -> dict[str, Any]:
    """Return a fixed number of replicas, or bounds between which they follow the number of running requests."""
    if args.max_replicas is None:
        return {"num_replicas": args.num_replicas}
    scaling = AutoscalingConfig(
        min_replicas=args.num_replicas,
        initial_replicas=max(args.num_replicas, 1),  # the first replica shows at once whether the checkpoint loads
        max_replicas=args.max_replicas,
        target_ongoing_requests=max(1, args.max_batch // 2),  # a batch half full: room for a burst while one starts
        upscale_delay_s=UPSCALE_SECONDS,
        downscale_delay_s=DOWNSCALE_SECONDS,
        look_back_period_s=LOOK_BACK_SECONDS,
    )
    return {"num_replicas": None, "autoscaling_config": scaling}


def start(config: ServeConfig) -> str:
    """Serve `config` in the current Ray session, wait until it answers, and return its base URL.

    Port 0 picks a free one. Raises ServeError for a port in use, unusable keys or a replica that does not start, and
    ModelError for a directory that is not a model.
    """
    application = _application(config, key_digests(read_keys(config.api_key_file)))
    read_config(Path(config.checkpoint))
    for path in map(Path, config.other_models.values()):
        if not is_adapter(path):
            read_config(path)
    if serve.status().proxies:
        raise ServeError(
            "Ray Serve runs in this cluster already; stop it with `serve shutdown`, or `serve deploy` to it"
        )
    port = free_port(config.host, config.port)
    quiet = LoggingConfig(log_level="WARNING")
    http = HTTPOptions(host=config.host, port=port, request_timeout_s=GRACE_SECONDS)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        controller = ControllerOptions(runtime_env={"env_vars": FRONT})
        serve.start(ProxyLocation.HeadOnly, http, logging_config=quiet, controller_options=controller)
        serve.run(application, name=APP_NAME, route_prefix="/", logging_config=quiet)
        url = _url(config.host, port)
        _wait_until_ready(url)
    except (RuntimeError, TimeoutError) as error:
        message = _failure() or str(error).strip().splitlines()[-1]
        stop()
        raise ServeError(f"serving {config.checkpoint} failed: {message}") from None
    except BaseException:
        stop()
        raise
    return url


def stop() -> None:
    """Let the replicas finish their requests, then shut Serve down. Does nothing if it does not run.

    A replica has GRACE_SECONDS for its requests; new ones get a 503 meanwhile.
    """
    deadline = time.monotonic() + GRACE_SECONDS + SHUTDOWN_SECONDS
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        with suppress(TimeoutError):  # raised after a minute, while requests may still decode
            serve.delete(APP_NAME)  # `shutdown` alone would end the proxy before the responses are sent
    compat.end_serve_controller(SHUTDOWN_SECONDS)
    serve.shutdown()


def read_keys(path: Path | None) -> frozenset[str]:
    """Return the API keys of a file, one a line, or without a file those of DTRPO_API_KEY, separated by commas.

    Raises ServeError for a file without keys.
    """
    if path is None:
        return frozenset(key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip())
    try:
        keys = frozenset(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"serve.api_key_file = {path}: cannot be read ({error}); write one key a line") from None
    if not keys:
        raise ServeError(f"serve.api_key_file = {path}: holds no key; write one a line, or remove the field")
    return keys


def free_port(host: str, port: int) -> int:
    """Return the port if nobody listens there, or a free one for 0. Raises ServeError.

    Serve binds with SO_REUSEPORT and would share a taken port silently, so this binds first without it. It retries for
    a while, since the proxy of a server that has just stopped takes a moment to end.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed counts as free
            try:
                probe.bind((host, port))
                return int(probe.getsockname()[1])
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    remedy = "set serve.port to another, or to 0 for any free one"
                    place = f"serve.port = {port} on {host}"
                    raise ServeError(f"{place} cannot be used ({error.strerror or error}); {remedy}") from None
        time.sleep(0.1)


def _url(host: str, port: int) -> str:
    """Return the URL of a listener; one on an unspecified address is reached on loopback."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _wait_until_ready(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the user's web proxy
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"{url}/ready gave no answer within {READY_SECONDS:g} s")


def _failure() -> str | None:
    """Return the last line of the traceback of a replica that did not start, which names the error."""
    application = serve.status().applications.get(APP_NAME)
    for deployment in application.deployments.values() if application else ():
        lines = [line.strip() for line in deployment.message.splitlines() if "Error" in line]
        if lines:
            return re.sub(r"^dtrpo_ray\.errors\.\w+: ", "", lines[-1])
    return None
