"""`dtrpo bench`: each command measures alternatives in one run, on the same weights and data, and prints ratios."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dtrpo_ray.cli import AsJson, result, say

bench = typer.Typer()

Out = Annotated[Path | None, typer.Option(help="Also write OUT.json and OUT.md.")]
Hidden = Annotated[int, typer.Option(min=64, help="Width of the model.")]
Layers = Annotated[int, typer.Option(min=1)]


@bench.callback(no_args_is_help=True)
def bench_group() -> None:
    """Measure alternatives in one run, on the same weights and data, and print their ratios."""


def _write_results(out: Path | None, value: dict[str, Any], page: str) -> None:
    """Write OUT.json and OUT.md if OUT was given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(value, indent=2) + "\n")
        out.with_suffix(".md").write_text(page)


@bench.command("train")
def bench_train(
    steps: Annotated[int, typer.Option(min=5, help="Optimizer steps of each variant.")] = 15,
    batch: Annotated[int, typer.Option(min=2, help="Pairs per step: even, and enough for steps of one second.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each variant runs; the variants take turns.")] = 2,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare training on Ray Train, Ray Data and DeepSpeed with the bare loop, and two workers with one."""
    from benchmarks import train as bench_of_train

    value = bench_of_train.run(steps, batch, rounds)
    _write_results(out, value, "# Training\n\n`dtrpo bench train`\n\n" + bench_of_train.text(value) + "\n")
    result({"verb": "bench train", **value}, as_json, bench_of_train.text(value))


@bench.command("decode")
def bench_decode(
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    block: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 32,
    hidden: Hidden = 256,
    layers: Layers = 4,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per block.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Times that both decoders run one request.")] = 3,
    widest: Annotated[int, typer.Option(min=1, help="Of 1, 4, 16 and 64 requests at once, run those up to this.")] = 64,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare our engine with a naive decoder, and with itself at 1, 4, 16 and 64 concurrent requests."""
    from benchmarks.decode import as_markdown, decode_benchmark

    value = decode_benchmark(prompt_tokens, new_tokens, block, hidden, layers, steps, repeats, widest)
    _write_results(out, value, "# Decoding\n\n`dtrpo bench decode`\n\n" + as_markdown(value))
    result(value, as_json, as_markdown(value))


@bench.command("load")
def bench_load(
    hidden: Hidden = 256,
    layers: Layers = 4,
    seconds: Annotated[float, typer.Option(min=1, help="Time that each number of clients asks for.")] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Small requests alone, and beside a large one.")] = 15,
    most: Annotated[int, typer.Option(min=0, help="Of 1, 8, 32, 128 and 512 clients, run those up to this.")] = 512,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure an endpoint under load: small requests beside a large one, and 1 to 512 clients, whole and streamed."""
    from benchmarks import load

    value = load.run(hidden, layers, seconds, repeats, most)
    _write_results(out, value, "# An endpoint under load\n\n`dtrpo bench load`\n\n" + load.text(value))
    result({"verb": "bench load", **value}, as_json, load.text(value))


@bench.command("data")
def bench_data(
    rows: Annotated[int, typer.Option(min=64, help="Rows for prepare, score and pair.")] = 40_000,
    model_rows: Annotated[int, typer.Option(min=16, help="Rows for rollout and ref-logps.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each variant runs; the variants take turns.")] = 3,
    store_mb: Annotated[int, typer.Option(min=80, help="Object store of the memory runs.")] = 80,
    times: Annotated[
        float, typer.Option(min=0.1, help="Input of the memory runs, in object stores; also a tenth.")
    ] = 10,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare each pipeline on Ray (one and two workers) with one process; measure memory on large inputs."""
    from benchmarks import data

    value = data.run(rows, model_rows, rounds, store_mb, times)
    _write_results(out, value, "# Data pipelines\n\n`dtrpo bench data`\n\n" + data.text(value) + "\n")
    result({"verb": "bench data", **value}, as_json, data.text(value))


@bench.command("forward")
def bench_forward(
    rounds: Annotated[int, typer.Option(help="Fresh processes per variant; the variants take turns.")] = 3,
    repeats: Annotated[int, typer.Option(help="Timed steps per process.")] = 3,
    shape: Annotated[str, typer.Option(help="Sizes: bars, or 8b for a GPU of 80 GB.")] = "bars",
    device: Annotated[str, typer.Option(help="cpu in float32, or cuda in bfloat16.")] = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare one training step on packed rows with common implementations, VRPO, and the replay of all steps."""
    from benchmarks import forward

    value = forward.compare(forward.named_shape(shape, device), rounds, repeats, say)
    _write_results(out, value, forward.page(value))
    result({"bench": "forward", **value}, as_json, forward.table(value))
