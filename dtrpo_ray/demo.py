"""One real question to the served, aligned model over HTTP: the last step of `dtrpo run`."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, puzzle_module
from dtrpo_ray.pipeline import HELD_OUT_SEED, Pipeline
from dtrpo_ray.progress import console
from dtrpo_ray.serve.server import free_port, read_keys, start, stop

TIMEOUT_SECONDS = 120


def require_port(config: ServeConfig) -> None:
    """Raise ServeError if the endpoint could not listen, or has no readable keys: before the work, not after it."""
    free_port(config.host, config.port)
    read_keys(config.api_key_file)


@contextmanager
def served(pipeline: Pipeline) -> Iterator[tuple[str, dict[str, Any]]]:
    """Serve the aligned model, ask it one held-out prompt, and keep it up for the time of the block."""
    job = pipeline.job
    config = job.serve.model_copy(update={"checkpoint": str(pipeline.aligned().path.resolve())})
    prompt, score = "Hello", None
    if job.puzzle:
        prompt = generate_puzzles(job.puzzle, 1, "test", HELD_OUT_SEED)[0]["prompt"]
        score = puzzle_module(job.puzzle).score
    with console.status("serving the aligned model"):
        url = start(config)
    try:
        body = {"model": config.model_name, "prompt": prompt, "max_tokens": _max_tokens(pipeline), "temperature": 0}
        key = min(read_keys(config.api_key_file), default=None)
        text = _post(f"{url}/v1/completions", body, key)["choices"][0]["text"]
        yield (
            url,
            {"url": url, "prompt": prompt, "text": text, "correct": bool(score(prompt, text) >= 1) if score else None},
        )
    finally:
        stop()


def _max_tokens(pipeline: Pipeline) -> int:
    return pipeline.job.eval.max_new_tokens if pipeline.job.eval else 32


def _post(url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the user's web proxy
    with direct.open(request, timeout=TIMEOUT_SECONDS) as response:
        value: dict[str, Any] = json.load(response)
    return value
