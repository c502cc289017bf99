"""Counters of a serving process -> Prometheus text. `vllm bench serve` reads the `vllm:diffusion_*` names."""

from collections.abc import Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dtrpo_ray.serve.batcher import Batcher

LATENCY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

COUNTERS = {  # metric -> (field of Counters, help)
    "vllm:diffusion_num_denoising_steps": ("steps_with_commits", "Denoising steps and commits, summed over choices."),
    "vllm:diffusion_num_canvas_positions": ("positions_with_commits", "Block positions of those steps and commits."),
    "vllm:diffusion_num_committed_tokens": ("committed_tokens", "Tokens of finished blocks."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted choices."),
    "vllm:prefix_cache_hits": ("reused_tokens", "Prompt tokens whose keys and values were cached."),
    "dtrpo:passes": ("passes", "Forward passes of the model."),
    "dtrpo:pass_tokens": ("pass_tokens", "Tokens of those passes."),
}
GAUGES = {  # metric -> (property of Batcher, help)
    "vllm:num_requests_running": ("num_running", "Choices that decode."),
    "vllm:num_requests_waiting": ("num_waiting", "Choices that wait for a place."),
}


class Monitor(Collector):
    """The metrics of one process: the counters of its batchers, and the latencies and outcomes of requests."""

    def __init__(self, served: Mapping[str, Batcher]) -> None:
        self.served, self.registry = served, CollectorRegistry()
        self.registry.register(self)
        self.requests = Counter(
            "dtrpo:requests", "Requests by outcome.", ["model_name", "outcome"], registry=self.registry
        )
        seconds = partial(Histogram, labelnames=["model_name"], buckets=LATENCY_SECONDS, registry=self.registry)
        self.latency = seconds("vllm:e2e_request_latency_seconds", "Seconds from a request to its last token.")
        self.first = seconds("vllm:time_to_first_token_seconds", "Seconds from a request to its first block.")

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the metrics; the registry calls this at each scrape."""
        for name, (field, text) in (COUNTERS | GAUGES).items():
            family = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            metric = family(name, text, labels=["model_name"])
            for model, served in self.served.items():
                metric.add_metric([model], getattr(served.counters if name in COUNTERS else served, field))
            yield metric
