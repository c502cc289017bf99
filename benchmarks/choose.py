"""Compare settings of a puzzle job on fresh puzzles of its TRAINING split; the held-out puzzles are not used.

    python benchmarks/choose.py jobs/sudoku.toml --seed 100 --storage runs --out benchmarks/results/settings \
        --try train.objective.rpo_alpha=4 --try train.objective.weighting=unit,train.lr=5e-5

The first setting is the unchanged job; each `--try` (overrides, separated by commas) adds one. All settings share the
base and the rollouts. Finished stages are reused. The script writes OUT.json and OUT.md.
"""

import argparse
import json
import pkgutil
from pathlib import Path
from typing import Any

from dtrpo_ray.config.decode import Setting
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job
from dtrpo_ray.data.prepare import puzzle_ids
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, scorer_path
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.pipeline import Pipeline
from dtrpo_ray.report.evaluation import wilson_interval
from dtrpo_ray.session import ray_session
from dtrpo_ray.stages import Store

PUZZLES_SEED = 2**40  # differs from the seeds of all stages


def solved(model: Path, job: Job, count: int) -> dict[str, int]:
    """Count, for each setting of [eval], the puzzles that the model solves by greedy decoding."""
    assert job.eval is not None
    assert job.puzzle is not None
    puzzles = generate_puzzles(job.puzzle, count, "train", PUZZLES_SEED + job.seed)
    score, engine, made = pkgutil.resolve_name(scorer_path(job.puzzle)), Engine.load(model), {}
    asked = [puzzle_ids(job.puzzle, engine.tokenizer, puzzle["prompt"]) for puzzle in puzzles]
    given = SamplingParams(max_new_tokens=job.eval.max_new_tokens, denoising_steps=1)
    for setting in job.eval.settings:
        params, correct = given.model_copy(update={setting.field: setting.value}), 0
        for first in range(0, count, job.eval.batch_size):
            batch = slice(first, first + job.eval.batch_size)
            done = engine.generate(asked[batch], params, [0] * len(asked[batch]))
            correct += sum(
                score(row["prompt"], engine.decode(d.text_ids), row["answer"]) >= 1
                for row, d in zip(puzzles[batch], done, strict=True)
            )
        made[str(setting)] = correct
    return made


def main() -> None:
    """Train and evaluate each setting, and write the page after each one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--try", dest="settings", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for setting in ["", *given.settings]:
        overrides = [item for item in setting.split(",") if item]
        job = load_job(given.job, [f"seed={given.seed}", f"storage={given.storage}", *overrides])
        with ray_session(job.cluster):
            pipeline = Pipeline(job, Store(given.storage))
            models = {setting or "unchanged job": pipeline.aligned().path}
            models |= {"base": pipeline.base().path} if not rows else {}
        for name, path in sorted(models.items(), key=lambda item: item[0] != "base"):
            rows += [
                {"setting": name, "decoding": decoding, "correct": correct, "num_prompts": given.count}
                for decoding, correct in solved(path, job, given.count).items()
            ]
        given.out.with_suffix(".json").write_text(json.dumps({"seed": given.seed, "rows": rows}, indent=2) + "\n")
        given.out.with_suffix(".md").write_text(page(rows, given))


def page(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    """Return the page: a table with one line per setting of the job and one column per setting of [eval]."""
    columns = sorted(Setting.parse(text) for text in {row["decoding"] for row in rows})
    lines = [
        f"# Settings of `{given.job}`",
        "",
        f"The table shows accuracy on {given.count} fresh puzzles of the training split, with greedy decoding and 95 % "
        f"Wilson intervals. No other result uses seed {given.seed}.",
        "",
        "| setting | " + " | ".join(column.label for column in columns) + " | mean |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = {Setting.parse(row["decoding"]): row for row in rows if row["setting"] == setting}
        cells = []
        for column in columns:
            low, high = wilson_interval(mine[column]["correct"], given.count)
            cells.append(f"{mine[column]['correct'] / given.count:.3f} [{low:.3f}, {high:.3f}]")
        mean = sum(row["correct"] for row in mine.values()) / given.count / len(columns)
        lines.append(f"| {setting} | " + " | ".join(cells) + f" | {mean:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
