"""Compare our engine with a naive decoder that runs the whole sequence in every step, and with itself at one request
at a time. A comparison uses the same weights and prompts in one run, and reports whether the tokens are equal."""

import platform
import random
import time
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from dtrpo_ray.decode.decoder import Decoder, pages_needed
from dtrpo_ray.decode.types import Committed, Generation, SamplingParams
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.registry import build_model

VOCABULARY = 4096


def bench_model(hidden: int, layers: int, block: int) -> DiffusionLM:
    """Make a model with random weights in the SDAR layout; the time of a forward does not depend on the weights."""
    config = {
        "model_type": "sdar",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 128),
        "head_dim": 64,
        "block_size": block,
        "mask_token_id": VOCABULARY - 1,
        "eos_token_id": VOCABULARY - 2,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
    }
    return build_model(config, seed=0).eval().requires_grad_(False)


@torch.inference_mode()
def naive(model: DiffusionLM, prompt: list[int], params: SamplingParams) -> tuple[list[int], int]:
    """Decode with LLaDA's loop (arXiv 2502.09992) and the model's block mask; return the response and its forwards.

    Every step runs the whole sequence and computes the logits of all its positions.
    """
    size, n = model.block_size, len(prompt)
    end = -(-(n + params.max_new_tokens) // size) * size
    canvas = torch.full((1, end), model.mask_id)
    canvas[0, :n] = torch.tensor(prompt)
    positions = torch.arange(end)
    mask = (positions[None, :] // size <= positions[:, None] // size)[None, None]
    forwards = 0
    for first in range(n // size * size, end, size):
        block = slice(max(first, n), first + size)
        for left in range(params.denoising_steps, 0, -1):
            masked = canvas[0, block] == model.mask_id
            if not masked.any():
                break
            logp, tokens = model.log_mu(model.hidden(canvas, positions[None], mask)).max(-1)
            confidence = logp[0, block].masked_fill(~masked, float("-inf"))
            chosen = confidence.topk(-(-int(masked.sum()) // left)).indices
            canvas[0, block.start + chosen] = tokens[0, block][chosen]
            forwards += 1
    return canvas[0, n : n + params.max_new_tokens].tolist(), forwards


def serve_load(
    model: DiffusionLM, prompts: list[list[int]], params: SamplingParams, concurrency: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """Decode all prompts, `concurrency` at a time; return the measurements and the responses."""
    pages = concurrency * max(pages_needed(model, len(prompt), params.max_new_tokens) for prompt in prompts)
    decoder = Decoder[int](model, concurrency, pages)
    begun: dict[Hashable, float] = {}
    first: dict[Hashable, float] = {}
    done: dict[Hashable, float] = {}
    answers: dict[Hashable, list[int]] = {}
    start, cpu = time.perf_counter(), time.process_time()
    waiting = list(range(len(prompts)))[::-1]
    while waiting or decoder.rows:
        while waiting and decoder.admit(waiting[-1], prompts[waiting[-1]], params, waiting[-1]):
            begun[waiting.pop()] = time.perf_counter()
        for key, event in decoder.step():
            now = time.perf_counter()
            if isinstance(event, Committed):
                first.setdefault(key, now - begun[key])
            elif isinstance(event, Generation):
                done[key], answers[key] = now - begun[key], event.text_ids
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = sum(map(len, answers.values()))
    latency = np.array([done[key] for key in sorted(done)])  # type: ignore[type-var]
    row = {
        "concurrency": concurrency,
        "requests": len(prompts),
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "tokens_per_forward": tokens / decoder.counters.denoising_steps,
        "passes": decoder.counters.passes,
        "first_block_p50_s": float(np.median(list(first.values()))),
        "latency_p50_s": float(np.quantile(latency, 0.5)),
        "latency_p99_s": float(np.quantile(latency, 0.99)),
    }
    return row, [answers[key] for key in range(len(prompts))]


def against_naive(model: DiffusionLM, prompt: list[int], params: SamplingParams, repeats: int) -> dict[str, Any]:
    """Decode one request with both in turn, `repeats` times; return medians, and whether the tokens are equal."""
    slow, fast, ratios, cpu_ratios = [], [], [], []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        expected, forwards = naive(model, prompt, params)
        middle, middle_cpu = time.perf_counter(), time.process_time()
        (row, (got,)) = serve_load(model, [prompt], params, 1)
        end, end_cpu = time.perf_counter(), time.process_time()
        slow.append(middle - start)
        fast.append(end - middle)
        ratios.append(slow[-1] / fast[-1])
        cpu_ratios.append((middle_cpu - cpu) / (end_cpu - middle_cpu))
    return {
        "same_tokens": got == expected,
        "denoising_steps": forwards,
        "naive_tokens_per_second": len(expected) / float(np.median(slow)),
        "engine_tokens_per_second": len(got) / float(np.median(fast)),
        "ratio": float(np.median(ratios)),
        "cpu_ratio": float(np.median(cpu_ratios)),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "first_block_s": row["first_block_p50_s"],
    }


def decode_benchmark(
    prompt_tokens: int, new_tokens: int, block: int, hidden: int, layers: int, steps: int, repeats: int, widest: int
) -> dict[str, Any]:
    """Run the benchmark; `dtrpo bench decode --help` explains the arguments."""
    torch.set_num_threads(1)
    model = bench_model(hidden, layers, block)
    rng = random.Random(0)

    def prompt() -> list[int]:
        return [rng.randrange(VOCABULARY - 2) for _ in range(prompt_tokens)]

    params = SamplingParams(max_new_tokens=new_tokens, denoising_steps=steps, ignore_eos=True)
    serve_load(model, [prompt()], params.model_copy(update={"max_new_tokens": block}), 1)  # warm up
    single = against_naive(model, prompt(), params, repeats)
    loads = [
        serve_load(model, [prompt() for _ in range(max(4, c))], params, c)[0] for c in (1, 4, 16, 64) if c <= widest
    ]
    for load in loads:
        for name in ("throughput", "cpu"):
            key = "tokens_per_second" if name == "throughput" else "tokens_per_cpu_second"
            load[f"{name}_ratio"] = load[key] / loads[0][key]
    return {
        "device": f"{platform.machine()} CPU, 1 thread",
        "torch": torch.__version__,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "block_size": block,
        "hidden_size": hidden,
        "layers": layers,
        "denoising_steps_per_block": steps,
        "naive": single,
        "loads": loads,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Format the result as two tables."""
    r, one = result, result["naive"]
    lines = [
        f"Prompt {r['prompt_tokens']}, {r['new_tokens']} new tokens, block {r['block_size']}, "
        f"width {r['hidden_size']}, {r['layers']} layers, {r['denoising_steps_per_block']} denoising steps per block; "
        f"{r['device']}, torch {r['torch']}.",
        "",
        "| one request | tokens/s |",
        "|---|---|",
        f"| naive: whole sequence each step | {one['naive_tokens_per_second']:.1f} |",
        f"| engine: exact cache | {one['engine_tokens_per_second']:.1f} |",
        f"| ratio, median of {len(one['ratios'])} pairs | **{one['ratio']:.1f}** |",
        f"| the same in CPU seconds, which other processes do not lengthen | **{one['cpu_ratio']:.1f}** |",
        "",
        f"Same tokens: {'yes' if one['same_tokens'] else 'NO'}. First block after {one['first_block_s']:.3f} s.",
        "",
        "| concurrent | tokens/s | ratio to one | in CPU seconds | tokens/forward | first block p50 | p50 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {w['concurrency']} | {w['tokens_per_second']:.1f} | {w['throughput_ratio']:.2f} | {w['cpu_ratio']:.2f} "
        f"| {w['tokens_per_forward']:.2f} | {w['first_block_p50_s']:.2f} s | {w['latency_p50_s']:.2f} s "
        f"| {w['latency_p99_s']:.2f} s |"
        for w in r["loads"]
    ]
    return "\n".join(lines) + "\n"
