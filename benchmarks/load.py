"""Measure an endpoint under load: small requests beside one with many choices, then 1 to 512 clients at once.

The server is `dtrpo serve` with random weights, in a Ray session of this process; the clients are coroutines here. Both
share the machine. A client sends its next request when the last is answered; after a 429 it waits as long as told.
"""

import asyncio
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.decode import VOCABULARY, bench_model
from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.models.registry import save_model
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.serve import server
from dtrpo_ray.serve.middleware import FRONT_SECONDS
from dtrpo_ray.session import ray_session

CROWDS = (1, 8, 32, 128, 512)
HUNG_SECONDS = FRONT_SECONDS + 10  # without an answer by then, a request hangs
LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY - 2)))
PROMPT = LETTERS[:32]
SMALL = {"prompt": PROMPT, "max_tokens": 64, "ignore_eos": True}
HUGE = {"prompt": PROMPT, "max_tokens": 512, "ignore_eos": True, "n": 64}


@dataclass
class Outcomes:
    """What became of the requests of one load; `seconds` are those of the completed ones."""

    seconds: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def quantile(self, share: float) -> float | None:
        return float(np.quantile(self.seconds, share)) if self.seconds else None


@contextmanager
def endpoint(hidden: int, layers: int) -> Iterator[str]:
    """Serve a model with random weights; yield the URL."""
    with tempfile.TemporaryDirectory() as folder, ray_session(ClusterConfig()):
        save_model(bench_model(hidden, layers, 32), Path(folder))
        character_tokenizer(LETTERS).save_pretrained(folder)
        url = server.start(ServeConfig(checkpoint=folder, port=0))
        try:
            yield url
        finally:
            server.stop()


def memory_mb() -> dict[str, float]:
    """Return the resident memory of the replica and of Serve's proxy."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        command = " ".join(process.cmdline())
        for name, title in (("replica", "ServeReplica"), ("proxy", "ProxyActor")):
            if title in command:
                found[name] = found.get(name, 0) + process.memory_info().rss / 2**20
    return found


async def ask(client: httpx.AsyncClient, body: dict[str, Any], outcomes: Outcomes) -> None:
    """Send a request and record what becomes of it; after a 429, wait as long as told."""
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(HUNG_SECONDS):
            answer = await client.post("/v1/completions", json=body)
    except TimeoutError:
        outcomes.counts["hung"] += 1
    except httpx.TransportError:
        outcomes.counts["broken"] += 1
    else:
        outcome = str(answer.status_code)
        if answer.status_code == 200:
            whole = not body.get("stream") or answer.text.endswith("data: [DONE]\n\n")
            outcome = "ended by an error" if '"error"' in answer.text else "completed" if whole else "cut off"
        if outcome == "completed":
            outcomes.seconds.append(time.perf_counter() - begun)
        outcomes.counts[outcome] += 1
        if answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["Retry-After"]))


async def crowd(url: str, clients: int, stream: bool, seconds: float) -> dict[str, Any]:
    """Return the outcomes of so many clients that ask for so long, and the memory before and after."""
    outcomes, before = Outcomes(), memory_mb()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:

        async def repeat() -> None:
            while time.monotonic() < end:
                await ask(client, {**SMALL, "stream": stream}, outcomes)

        await asyncio.gather(*(repeat() for _ in range(clients)))
    counts = dict(outcomes.counts)
    return {
        "clients": clients,
        "stream": stream,
        "completed": counts.pop("completed", 0),
        "refused_429": counts.pop("429", 0),
        "hung": counts.pop("hung", 0),
        "status_5xx": sum(counts.pop(status) for status in list(counts) if status.startswith("5")),
        "other": counts,
        "p50_s": outcomes.quantile(0.5),
        "p99_s": outcomes.quantile(0.99),
        "memory_before_mb": before,
        "memory_after_mb": memory_mb(),
    }


async def beside_a_huge_one(url: str, repeats: int) -> dict[str, Any]:
    """Return the p50 of small requests, one after the other, alone and while one with 64 choices decodes."""
    alone, beside = Outcomes(), Outcomes()
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:
        await ask(client, SMALL, Outcomes())
        for _ in range(repeats):
            await ask(client, SMALL, alone)
        large = asyncio.ensure_future(ask(client, HUGE, Outcomes()))
        await asyncio.sleep(1)
        for _ in range(repeats):
            await ask(client, SMALL, beside)
        decoding = not large.done()
        large.cancel()
        await asyncio.wait({large})
    first, second = alone.quantile(0.5), beside.quantile(0.5)
    assert first is not None
    assert second is not None
    return {
        "repeats": repeats,
        "alone_p50_s": first,
        "beside_p50_s": second,
        "ratio": second / first,
        "huge_decoded_throughout": decoding,
    }


def run(hidden: int, layers: int, seconds: float, repeats: int, most: int) -> dict[str, Any]:
    """Run the benchmark; `dtrpo bench load --help` explains the arguments."""
    with endpoint(hidden, layers) as url:
        fair = asyncio.run(beside_a_huge_one(url, repeats))
        loads = [
            asyncio.run(crowd(url, clients, stream, seconds))
            for clients in CROWDS
            for stream in (False, True)
            if clients <= most
        ]
    return {
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "busy": os.getloadavg()[2],
        "hidden_size": hidden,
        "layers": layers,
        "seconds": seconds,
        "small_beside_huge": fair,
        "loads": loads,
    }


def text(value: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    fair = value["small_beside_huge"]
    shape = f"width {value['hidden_size']} with {value['layers']} layers, block 32, 4 denoising steps per block"
    ended = "" if fair["huge_decoded_throughout"] else " (the large one ended before them)"
    lines = [
        f"A random SDAR model of {shape}; prompts of 32 tokens, {SMALL['max_tokens']} new tokens. {value['machine']}, "
        f"which server and clients share; its load over the last 15 minutes was {value['busy']:.0f}.",
        "",
        f"Small requests, one after the other: p50 {fair['alone_p50_s']:.3f} s alone and {fair['beside_p50_s']:.3f} s "
        f"beside one with n = {HUGE['n']} and {HUGE['max_tokens']} new tokens in each choice, "
        f"**{fair['ratio']:.1f} times**{ended}.",
        "",
        "",
        f"Clients that send one request after the other for {value['seconds']:g} s:",
        "",
        "| clients | answers | completed | 429 | 5xx | hung | other | p50 | p99 | replica MiB | proxy MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in value["loads"]:
        seconds = [f"{row[name]:.2f} s" if row[name] is not None else "-" for name in ("p50_s", "p99_s")]
        before, after = row["memory_before_mb"], row["memory_after_mb"]
        memory = [f"{before.get(name, 0):.0f} -> {after.get(name, 0):.0f}" for name in ("replica", "proxy")]
        lines.append(
            f"| {row['clients']} | {'streamed' if row['stream'] else 'whole'} | {row['completed']} "
            f"| {row['refused_429']} | {row['status_5xx']} | {row['hung']} | {row['other'] or 0} "
            f"| {' | '.join(seconds)} | {' | '.join(memory)} |"
        )
    return "\n".join(lines) + "\n"
