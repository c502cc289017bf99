"""Compare the base, rejection fine-tuning, block-ELBO DPO and dTRPO over several seeds with the real pipeline.

    python benchmarks/alignment.py jobs/demo.toml --seeds 0 1 2 --storage runs --out benchmarks/results/alignment

All variants share the base, the rollouts and the pairs, and take the same optimizer steps on the same rows; they differ
only in `train.objective.type`. Rejection fine-tuning needs no reference, so one more variant of it takes twice as many
steps, which is as many forwards as dTRPO takes. Finished stages are reused. The script writes OUT.json and OUT.md.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any, cast

from dtrpo_ray.config.load import load_job
from dtrpo_ray.pipeline import Pipeline
from dtrpo_ray.report.evaluation import Score, compare, wilson_interval
from dtrpo_ray.session import ray_session
from dtrpo_ray.stages import Store

VARIANTS = {
    "dtrpo": "dTRPO",
    "sft": "rejection fine-tuning, same steps",
    "sft_forwards": "rejection fine-tuning, same forwards",
    "elbo_dpo": "block-ELBO DPO",
}


def settings_of(variant: str, job_file: Path) -> list[str]:
    """Return the overrides of the job for a variant."""
    if variant != "sft_forwards":
        return [f"train.objective.type={variant}"]
    train = load_job(job_file).train
    longer = [f"train.{name}={2 * value}" for name in ("num_epochs", "max_steps") if (value := getattr(train, name))]
    return ["train.objective.type=sft", *longer]


def measure(job_file: Path, seed: int, storage: Path, variants: list[str]) -> list[dict[str, Any]]:
    """Run every variant with one seed and return the evaluation rows of the base and of each variant."""
    rows: list[dict[str, Any]] = []
    for variant in variants:
        job = load_job(job_file, [f"seed={seed}", f"storage={storage}", *settings_of(variant, job_file)])
        with ray_session(job.cluster):
            value = Pipeline(job, Store(storage)).evaluate()
        for row in value["table"]:
            if row["model"] == "base" and variant != variants[0]:
                continue
            rows.append({**row, "seed": seed, "model": variant if row["model"] == "aligned" else "base"})
    return rows


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum the rows of all seeds by (model, set, budget), with an interval; leave out models that some seed lacks."""
    seeds = {row["seed"] for row in rows}
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["set"], row["budget"]), []).append(row)
    made = []
    for (model, test_set, budget), group in groups.items():
        if {row["seed"] for row in group} != seeds:
            continue
        correct, total = sum(r["correct"] for r in group), sum(r["num_prompts"] for r in group)
        low, high = wilson_interval(correct, total)
        facts = {"model": model, "set": test_set, "budget": budget, "correct": correct, "num_prompts": total}
        made.append({**facts, "accuracy": correct / total, "low": low, "high": high, "seed": "all"})
    return made


def markdown(rows: list[dict[str, Any]], job_file: Path) -> str:
    """Return a page: the held-out set by seed and pooled over seeds, then the public sets pooled over seeds."""
    models = ["base", *(m for m in VARIANTS if any(r["model"] == m for r in rows))]
    titles = " | ".join({"base": "base", **VARIANTS}[m] for m in models)
    lines = [
        f"# Alignment on `{job_file}`",
        "",
        "The table shows accuracy with 95 % Wilson intervals, greedy decoding, by denoising steps per block.",
        "**Bold** means that the interval lies above the base's interval, ~~struck~~ that it lies below.",
        "",
        f"Machine: {platform.machine()}, {platform.platform()}. `benchmarks/alignment.py` wrote this page.",
        "",
        f"| set | seed | steps per block | {titles} |",
        "|---|---|---|" + "---|" * len(models),
    ]
    held_out = [r for r in rows if r["set"] == "held-out"]
    for group in (held_out, pooled(held_out), pooled([r for r in rows if r["set"] != "held-out"])):
        keys = sorted({(r["set"], str(r["seed"]), r["budget"]) for r in group})
        lines += [_line(group, key, models) for key in keys]
    return "\n".join(lines) + "\n"


def _line(rows: list[dict[str, Any]], key: tuple[str, str, int], models: list[str]) -> str:
    found = {r["model"]: r for r in rows if (r["set"], str(r["seed"]), r["budget"]) == key}
    verdicts = {c["model"]: c["verdict"] for c in compare(cast("list[Score]", list(found.values())))}
    cells = []
    for model in models:
        row = found.get(model)
        cell = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row else "-"
        cells.append({"better": f"**{cell}**", "worse": f"~~{cell}~~"}.get(verdicts.get(model, ""), cell))
    return f"| {key[0]} | {key[1]} | {key[2]} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure every seed and write the table after each one, so that an interrupt loses no finished seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/alignment"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows += measure(options.job, seed, options.storage, options.variants)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(rows, options.job))
        print(markdown(rows, options.job), flush=True)


if __name__ == "__main__":
    main()
