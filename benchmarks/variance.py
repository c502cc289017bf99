"""Compute the exact variance of the estimator by K_b, weight, schedule and m, on a trained pair of models.

    python benchmarks/variance.py POLICY REFERENCE PAIRS --rows 200 --out docs/variance

POLICY and REFERENCE are model directories, and PAIRS is a preference table with recorded steps. One forward of each
model with `num_draws = "all"` gives l_t for every step of every block. The closed form of docs/method.md then gives the
variance over draws, without sampling. The variance of the ELBO is estimated from independent draws. The weights differ
only if steps have unequal sizes; such steps come from decoding the prompts again with a confidence threshold. The
script writes OUT.json and OUT.svg and prints the tables.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from dtrpo_ray.config.train import Objective
from dtrpo_ray.data.schemas import PREFERENCE
from dtrpo_ray.data.tables import read_table
from dtrpo_ray.decode.decoder import decode_all
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.method.batch import SIDES, ModelLayout, build_batch
from dtrpo_ray.method.step import order_by_confidence, scored_logps
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.registry import load_model

mpl.use("Agg")
import matplotlib.pyplot as plt

DRAWS, ELBO_DRAWS, CHUNK = (1, 2, 4), 16, 20
THRESHOLDS = (0.5, 0.7, 0.9)
Json = dict[str, Any]


def blocks(models: list[DiffusionLM], rows: list[Json], objective: Objective) -> Iterator[dict[int, list[float]]]:
    """Yield, for each block of each side, the log-ratios of the scored tokens by draw."""
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        batch = build_batch(part, objective, ModelLayout.of(models[0]), seed=0)
        with torch.no_grad():
            ratio = (scored_logps(models[0], batch) - scored_logps(models[1], batch)).tolist()
        found: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        block = batch.block[batch.scored_row, batch.scored_col].tolist()
        for slot, number, draw, value in zip(batch.slot.tolist(), block, batch.draw.tolist(), ratio, strict=True):
            found[slot, number][draw].append(value)
        yield from found.values()


def variance(steps: list[list[float]], weighting: str, num_draws: int) -> float:
    """Return the variance of one block's estimate: the sum over strata of n sum v^2 - (sum v)^2."""
    if num_draws >= len(steps) and (num_draws > 1 or len(steps) == 1):
        return 0.0
    values = [sum(s) for s in steps] if weighting == "steps" else [sum(s) / len(s) for s in steps for _ in s]
    return float(sum(len(v) * (v**2).sum() - v.sum() ** 2 for v in np.array_split(values, num_draws)))


def redecoded(model: DiffusionLM, rows: list[Json], threshold: float) -> list[Json]:
    """Sample both sides again from `model` at temperature 1; a step takes every token above `threshold`."""
    params = SamplingParams(
        max_new_tokens=max(len(r["chosen_ids"]) for r in rows),
        denoising_steps=1,
        temperature=1.0,
        threshold=threshold,
        ignore_eos=True,
    )
    made = [dict(row) for row in rows]
    for number, side in enumerate(SIDES):
        seeds = [int(row_generator(number, row["row_id"], 0, "decode").integers(2**63)) for row in rows]
        for row, response in zip(made, decode_all(model, [r["prompt_ids"] for r in rows], params, seeds), strict=True):
            row |= {f"{side}_ids": response.ids, f"{side}_steps": response.steps}
    return made


def measure(models: list[DiffusionLM], rows: list[Json]) -> list[Json]:
    """Return a record for each schedule, K_b, weight and m: the mean variance per block in nats^2, and its blocks.

    Trajectories decoded with a threshold have no fixed K_b; the record has the mean over blocks.
    """
    size = models[0].block_size
    schedules = {"recorded": Objective(num_draws="all")}
    for name in ("random", "confidence", "left_to_right"):
        for k in (size, size // 2, size // 4, size // 8):
            if k:
                schedules[f"{name}/{k}"] = Objective(schedule=name, tokens_per_step=k, num_draws="all")
    rows = order_by_confidence(models[1], rows, torch.device("cpu"))
    sources = {name: (rows, objective) for name, objective in schedules.items()}
    for threshold in THRESHOLDS:
        sources[f"threshold {threshold}"] = (redecoded(models[1], rows, threshold), Objective(num_draws="all"))
    out = []
    for name, (source, objective) in sources.items():
        groups: dict[float, list[list[list[float]]]] = defaultdict(list)
        for draws in blocks(models, source, objective):
            steps = [draws[d] for d in sorted(draws)]
            groups[0 if name.startswith("threshold") else len(steps)].append(steps)
        if name.startswith("threshold"):
            groups = {round(float(np.mean([len(steps) for steps in groups[0]])), 2): groups[0]}
        for num_steps, found in sorted(groups.items()):
            signal = float(np.mean([sum(map(sum, steps)) ** 2 for steps in found]))
            for weighting in ("steps", "tokens"):
                for m in DRAWS:
                    mean = float(np.mean([variance(steps, weighting, m) for steps in found]))
                    out.append(
                        {"schedule": name.split("/")[0], "steps_per_block": num_steps, "weighting": weighting, "m": m,
                         "variance": mean, "squared_log_ratio": signal, "blocks": len(found)}
                    )  # fmt: skip
    return [*out, elbo(models, rows, size)]


def elbo(models: list[DiffusionLM], rows: list[Json], size: int) -> Json:
    """Estimate the variance of the block ELBO with one draw from independent draws, without bias."""
    found = []
    for draws in blocks(models, rows, Objective(type="elbo_dpo", num_draws=ELBO_DRAWS)):
        if len(draws) == ELBO_DRAWS:
            found.append(float(np.var([size / len(v) * sum(v) for v in draws.values()], ddof=1)))
    return {"schedule": "block ELBO", "m": 1, "variance": float(np.mean(found)), "blocks": len(found)}


def plot(records: list[Json], file: Path) -> None:
    """Plot three panels: by schedule (m = 1), by m (random order), and by weight for steps of unequal size."""
    measured = [r for r in records if "weighting" in r]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))

    def line(axis: Any, label: str, **fixed: Any) -> None:
        found = [r for r in measured if all(r[key] == value for key, value in fixed.items())]
        axis.plot([r["steps_per_block"] for r in found], [r["variance"] for r in found], "o-", label=label)

    for schedule in ("recorded", "confidence", "left_to_right", "random"):
        line(left, schedule, schedule=schedule, weighting="steps", m=1)
    left.axhline(records[-1]["variance"], ls="--", color="grey", label="block ELBO")
    left.set_ylabel("variance per block, nats$^2$")
    left.set_title("by schedule, m = 1", fontsize=10)
    for m in DRAWS:
        line(middle, f"m = {m}", schedule="random", weighting="steps", m=m)
    middle.set_title("random order, by draws m", fontsize=10)
    for offset, weighting in ((-0.2, "steps"), (0.2, "tokens")):
        found = [
            r for r in measured if r["schedule"].startswith("threshold") and (r["weighting"], r["m"]) == (weighting, 1)
        ]
        right.bar([i + offset for i in range(len(found))], [r["variance"] for r in found], 0.4, label=weighting)
        right.set_xticks(range(len(found)), [r["schedule"].removeprefix("threshold ") for r in found])
    right.set_title("steps of unequal size, by weight, m = 1", fontsize=10)
    right.set_xlabel("decoding threshold")
    for axis in (left, middle):
        axis.set_xlabel("denoising steps of a block, $K_b$")
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def table(records: list[Json]) -> str:
    lines = ["| schedule | K_b | weight | m = 1 | m = 2 | m = 4 | mean (l)^2 | blocks |", "|---" * 8 + "|"]
    keys = dict.fromkeys((r["schedule"], r["steps_per_block"], r["weighting"]) for r in records if "weighting" in r)
    for key in keys:
        same = [r for r in records if (r["schedule"], r.get("steps_per_block"), r.get("weighting")) == key]
        cells = [f"{r['variance']:.4f}" for r in same]
        lines.append(
            f"| {' | '.join(map(str, (*key, *cells)))} | {same[0]['squared_log_ratio']:.4f} | {same[0]['blocks']} |"
        )
    last = records[-1]
    return "\n".join([*lines, f"| block ELBO | - | - | {last['variance']:.4f} | - | - | - | {last['blocks']} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/variance"))
    args = parser.parse_args()
    models = [load_model(path).eval() for path in (args.policy, args.reference)]
    rows = [{**row, "epoch": 0} for row in read_table(args.pairs, PREFERENCE).slice(0, args.rows).to_pylist()]
    records = measure(models, rows)
    args.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    plot(records, args.out.with_suffix(".svg"))
    print(table(records))


if __name__ == "__main__":
    main()
