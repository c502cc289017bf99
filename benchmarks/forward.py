"""Compare forward and backward of one training step with common implementations, on the same weights, data and draws.

    packed   one row contains the pair; logits are computed only at scored positions (this package's training step)
    common   one forward for each side and draw over [noisy | clean] of the whole sequence; logits at every position
    lean     as common, but logits only for the noisy half: a harder baseline than the targets require

All variants compute the same loss; if they do not, the benchmark stops. Each variant runs in a fresh process in each
round, and the variants take turns. `peak` is the memory of a step beyond weights and gradients. On a GPU the comparison
runs in bfloat16 and also reports the model FLOPs utilisation (MFU).
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dtrpo_ray.config.train import Objective
from dtrpo_ray.errors import ConfigError, TrainError
from dtrpo_ray.method.batch import SIDES, MicroBatch, ModelLayout, build_batch
from dtrpo_ray.method.step import preference_loss, sum_by_side, training_step
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.train.backend import peak_flops

Json = dict[str, Any]
CPU_ATTENTION = {  # torch's FLOP counter lacks the CPU kernels, which compute every entry of a dense mask
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
OURS, COMMON = "dtrpo packed", "dtrpo common"
VARIANTS = {  # name -> (way, objective)
    OURS: ("packed", Objective()),
    COMMON: ("common", Objective()),
    "dtrpo lean": ("lean", Objective()),
    "vrpo n=4 common": ("common", Objective(type="elbo_dpo", num_draws=4)),
    "vrpo n=8 common": ("common", Objective(type="elbo_dpo", num_draws=8)),
    "all steps common": ("common", Objective(num_draws="all")),
    "vrpo n=4 packed": ("packed", Objective(type="elbo_dpo", num_draws=4)),
    "all steps packed": ("packed", Objective(num_draws="all")),
}
BARS = (  # (quantity, variant, smallest ratio to `packed` that we aim for)
    ("seconds", COMMON, 2.5),
    ("peak_bytes", COMMON, 3.0),
    ("seconds", "vrpo n=4 common", 5.0),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the comparison, in tokens and units, and its device; the targets hold for the defaults."""

    prompt: int = 256
    response: int = 256
    block: int = 32
    steps: int = 4
    width: int = 256
    layers: int = 4
    vocab: int = 32768
    pairs: int = 1
    head_dim: int = 64
    heads_per_key: int = 1
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations; log-probabilities are always float32."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def model(self, seed: int) -> DiffusionLM:
        """Make a random model of this shape on its device."""
        heads = max(self.width // self.head_dim, 1)
        with torch.device(self.device):
            return build_model(self._config(heads), seed).to(self.dtype)

    def _config(self, heads: int) -> Json:
        return {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(heads // self.heads_per_key, 1),
            "head_dim": self.width // heads,
            "block_size": self.block,
            "mask_token_id": self.vocab - 1,
            "eos_token_id": self.vocab - 2,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
        }

    def rows(self) -> list[Json]:
        """Make random pairs; each block of a response is unmasked in `steps` steps of equal size, in a random order."""
        rng = np.random.default_rng(0)
        rows = []
        for i in range(self.pairs):
            row: Json = {"row_id": f"row-{i}", "epoch": 0}
            for name, length in (("prompt", self.prompt), ("chosen", self.response), ("rejected", self.response)):
                row[f"{name}_ids"] = rng.integers(0, self.vocab - 2, length)
                if name != "prompt":
                    orders = [rng.permutation(self.block) for _ in range(-(-length // self.block))]
                    row[f"{name}_steps"] = np.concatenate(orders)[:length] * self.steps // self.block
            rows.append(row)
        return rows


SHAPES = {
    "bars": Shape(),
    "8b": Shape(width=4096, layers=36, vocab=151936, head_dim=128, heads_per_key=4),  # sizes of Qwen3-8B and SDAR-8B
}


def named_shape(name: str, device: str) -> Shape:
    """Return one of SHAPES on a device. Raises ConfigError for an unknown name, or a GPU that torch does not see."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name}: unknown; use one of {', '.join(SHAPES)}")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: unknown; use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; use --device cpu, or install torch's CUDA build")
    return replace(SHAPES[name], device=device)


# --- the common implementations ---


def two_stream_mask(length: int, block_size: int) -> Tensor:
    """Return the mask of [noisy | clean] (BD3-LM, arXiv 2503.09573; SDAR), bool [1, 1, 2 length, 2 length]."""
    block = torch.arange(length).repeat(2) // block_size
    clean = torch.arange(2 * length) >= length
    query, key = block[:, None], block[None, :]
    diagonal = (query == key) & (clean[:, None] == clean[None, :])
    offset = (query > key) & clean[None, :] & ~clean[:, None]
    causal = (query >= key) & clean[None, :] & clean[:, None]
    return (diagonal | offset | causal)[None, None]


def common_logps(model: DiffusionLM, rows: list[Json], batch: MicroBatch, lean: bool) -> Tensor:
    """Return log mu of the batch's scored tokens [N], from one forward per side and noisy stream.

    The prompt must end on a block boundary and shift be 0; the noisy half is then the prompt and a noisy stream.
    """
    out = torch.zeros(len(batch.target), dtype=torch.float32, device=batch.target.device)
    streams = batch.stream[batch.scored_row, batch.scored_col]
    for slot in range(batch.tokens.numel()):
        row, side = divmod(slot, batch.tokens.shape[1])
        prompt, response = (
            torch.as_tensor(rows[row][f"{name}_ids"], device=out.device) for name in ("prompt", SIDES[side])
        )
        length = len(prompt) + len(response)
        mask = two_stream_mask(length, model.block_size).to(out.device)
        positions = torch.arange(length, device=out.device).repeat(2)[None]
        for stream in streams[batch.slot == slot].unique().tolist():
            mine = (batch.slot == slot) & (streams == stream)
            here = (batch.side[row] == side) & (batch.stream[row] == stream)
            ids = torch.cat([prompt, batch.ids[row][here], prompt, response])[None]
            hidden = model.hidden(ids, positions, mask)[0]
            logits = model.head(hidden[:length] if lean else hidden)[:length].float()
            logits[..., model.mask_id] = float("-inf")
            at = batch.position[row, batch.scored_col[mine]]
            logp = torch.log_softmax(logits, -1)[at, batch.target[mine]]
            out = out.index_put((torch.nonzero(mine)[:, 0],), logp)
    return out


def common_step(
    policy: DiffusionLM, reference: DiffusionLM, rows: list[Json], batch: MicroBatch, beta: float, lean: bool
) -> Tensor:
    """Return the loss of each pair, from separate forwards of policy and reference over chosen and rejected."""
    logp = common_logps(policy, rows, batch, lean)
    with torch.no_grad():
        ref_logp = common_logps(reference, rows, batch, lean)
    ratio = sum_by_side(batch.weight * (logp - ref_logp), batch.slot, *batch.tokens.shape)
    return preference_loss(ratio, beta).loss_P


# --- one variant in a separate process ---


@dataclass(frozen=True, slots=True)
class _Setup:
    """A variant that is ready to run: `step` does forward and backward and returns the loss."""

    step: Callable[[], float]
    policy: DiffusionLM
    trunk_tokens: int
    head_rows: int


def _setup(name: str, shape: Shape) -> _Setup:
    way, objective = VARIANTS[name]
    policy, reference, rows = shape.model(0), shape.model(1).requires_grad_(False), shape.rows()
    batch = build_batch(rows, objective, ModelLayout.of(policy), seed=0).to(torch.device(shape.device))
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> float:
        if way == "packed":
            loss = training_step(policy, reference, batch, objective).loss_P
        else:
            loss = common_step(policy, reference, rows, batch, objective.beta, way == "lean")
        loss.mean().backward()
        return float(loss.detach().mean())

    if way == "packed":  # policy and reference run the same row
        return _Setup(step, policy, 2 * batch.ids.numel(), 2 * len(batch.target))
    streams = batch.stream[batch.scored_row, batch.scored_col]
    draws = len(set(zip(batch.slot.tolist(), streams.tolist(), strict=True)))  # over both sides of all pairs
    length = shape.prompt + shape.response
    return _Setup(step, policy, 4 * draws * length, (2 if way == "lean" else 4) * draws * length)


def _resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def time_variant(name: str, shape: Shape, repeats: int) -> Json:
    """Return median wall-clock and CPU seconds of a step, after two warm-up steps (on a GPU the first compiles)."""
    setup = _setup(name, shape)
    loss, wall, processor = setup.step(), [], []
    setup.step()
    for _ in range(repeats):
        began, cpu = time.perf_counter(), time.process_time()
        setup.step()  # it reads the loss last; on a GPU the gradients may still be running
        if shape.device != "cpu":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - cpu)
    return {"loss": loss, "seconds": statistics.median(wall), "cpu_seconds": statistics.median(processor)}


def weigh_variant(name: str, shape: Shape) -> Json:
    """Return the peak memory of a step beyond weights and gradients, and its FLOPs."""
    small = replace(shape, prompt=shape.block, response=shape.block)
    _setup(name, small).step()  # warm up: libraries allocate at first use
    setup = _setup(name, shape)
    if shape.device == "cpu":
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        setup.step()
        peak = _resident("VmHWM")
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        setup.step()
        peak = torch.cuda.max_memory_allocated()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        setup.step()
    counts = {"trunk_tokens": setup.trunk_tokens, "head_rows": setup.head_rows, "flops": counter.get_total_flops()}
    weights = sum(p.numel() * p.element_size() for p in setup.policy.parameters())
    return {"peak_bytes": peak - before, "process_bytes": peak, "weight_bytes": weights, **counts}


def _in_process(job: str, name: str, shape: Shape, repeats: int) -> Json:
    """Run `time` or `weigh` in a fresh interpreter. For `weigh`, malloc returns large freed tensors to the system."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if job == "weigh":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    call = json.dumps({"job": job, "name": name, "shape": asdict(shape), "repeats": repeats})
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.forward", call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainError(f"bench forward: {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- the comparison ---


def compare(shape: Shape, rounds: int, repeats: int, say: Callable[[str], None]) -> Json:
    """Measure every variant; "ratios" in the result are relative to `packed`, "bars" are the targets."""
    if shape.prompt % shape.block or shape.response % shape.block or shape.steps > shape.block:
        raise TrainError("bench forward: prompt and response must be whole blocks, and steps at most block")
    timed: dict[str, list[Json]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in VARIANTS:
            timed[name].append(_in_process("time", name, shape, repeats))
            say(f"round {number + 1}: {name}: {timed[name][-1]['seconds']:.3f} s")
    rows = []
    for name, runs in timed.items():
        weighed = _in_process("weigh", name, shape, repeats)
        seconds = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
        spread = [round(f(run["seconds"] for run in runs), 4) for f in (min, max)]
        rows.append({"variant": name, "loss": runs[0]["loss"], **seconds, "seconds_range": spread, **weighed})
        rows[-1]["tokens_per_second"] = 2 * shape.pairs * (shape.prompt + shape.response) / seconds["seconds"]
        if peak := peak_flops(torch.device(shape.device)):
            rows[-1]["mfu"] = weighed["flops"] / seconds["seconds"] / peak
    by_name = {row["variant"]: row for row in rows}
    for objective in ("dtrpo", "vrpo n=4", "all steps"):
        ours, theirs = (by_name[f"{objective} {way}"]["loss"] for way in ("packed", "common"))
        if abs(ours - theirs) > (1e-3 if shape.device == "cpu" else 0.05) * max(abs(theirs), 1):
            raise TrainError(f"bench forward: {objective}: losses differ: {ours} packed, {theirs} common; report a bug")
    keys = ("seconds", "cpu_seconds", "peak_bytes", "process_bytes", "trunk_tokens", "head_rows", "flops")
    ratios = {name: {key: row[key] / by_name[OURS][key] for key in keys} for name, row in by_name.items()}
    bars = [
        {"what": what, "of": name, "bar": bar, "measured": ratios[name][what], "met": ratios[name][what] >= bar}
        for what, name, bar in BARS
        if shape == Shape()
    ]
    device = torch.cuda.get_device_name() if shape.device != "cpu" else _cpu()
    machine = {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return {"shape": asdict(shape), "machine": machine, "variants": rows, "ratios": ratios, "bars": bars}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0] if names else platform.processor()


def table(value: Json) -> str:
    """Format the comparison as a Markdown table, and say whether each target is met."""
    head = "| variant | seconds | CPU s | peak MiB | process MiB | trunk tokens | head rows | GFLOP | tokens/s | MFU "
    lines = [head + "| time / ours |", "|---" * 11 + "|"]
    for row in value["variants"]:
        mib = [f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "process_bytes")]
        ratio = f"{value['ratios'][row['variant']]['seconds']:.2f}"
        cells = [row["variant"], f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}", *mib]
        cells += [str(row["trunk_tokens"]), str(row["head_rows"]), f"{row['flops'] / 1e9:.1f}"]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['mfu']:.3f}" if "mfu" in row else "", ratio]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for bar in value["bars"]:
        met = "met" if bar["met"] else "NOT met"
        lines.append(f"- {bar['what']} of `{bar['of']}` / ours: {bar['measured']:.2f}, target {bar['bar']}: {met}")
    return "\n".join(lines)


def page(value: Json) -> str:
    """Format the comparison as a Markdown page."""
    shape, machine = value["shape"], value["machine"]
    text = (
        "# One training step: the packed row against common implementations\n\n"
        "Prompt {prompt}, response {response}, block {block}, {steps} denoising steps per block, width {width}, "
        "{layers} layers, vocabulary {vocab}, {pairs} pair, "
        "{precision}, forward and backward. `dtrpo bench forward` wrote this page. `peak` excludes weights and "
        "gradients; tokens/s counts the tokens of both sides, the prompt twice.\n\n"
    ).format(**shape, precision="float32" if shape["device"] == "cpu" else "bfloat16")
    where = "Machine: {device}, {cores} cores, {threads} thread(s), torch {torch}.\n\n".format(**machine)
    return text + where + table(value) + "\n"


def main(call: str) -> None:
    """Run one job of `_in_process`."""
    given = json.loads(call)
    shape = Shape(**{f.name: given["shape"][f.name] for f in fields(Shape)})
    made = (
        time_variant(given["name"], shape, given["repeats"])
        if given["job"] == "time"
        else weigh_variant(given["name"], shape)
    )
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
