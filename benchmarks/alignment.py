"""Compare dTRPO with its controls, for several seeds, through the real pipeline.

    python benchmarks/alignment.py jobs/demo.toml --seeds 0 1 2 --storage runs --out runs/alignment

All arms of a seed start from the same base, rollouts and pairs, and differ in `train.objective` alone. An arm without a
reference costs half the forwards, so each of them also runs for twice the optimizer steps: as many forwards as dTRPO's.
Finished stages are reused. Arms are compared prompt by prompt (`paired_test`). Writes OUT.json and OUT.md.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dtrpo_ray.config.decode import STEPS, Setting
from dtrpo_ray.config.load import load_job
from dtrpo_ray.pipeline import Pipeline
from dtrpo_ray.report.evaluation import (
    HELD_OUT,
    Difference,
    Evaluation,
    p_text,
    paired_forwards,
    paired_test,
    right_or_wrong,
)
from dtrpo_ray.session import ray_session
from dtrpo_ray.stages import Store

TITLES = {
    "base": "base",
    "dtrpo": "dTRPO",
    "imitation": "imitation, all hidden tokens, same steps",
    "imitation-forwards": "imitation, all hidden tokens, same forwards",
    "imitation-unmasked": "imitation, newly unmasked tokens, same steps",
    "imitation-unmasked-forwards": "imitation, newly unmasked tokens, same forwards",
    "sft": "imitation in random states, same steps",
    "sft-forwards": "imitation in random states, same forwards",
    "elbo_dpo": "block-ELBO DPO",
}
ARMS = [name for name in TITLES if name != "base"]


class Measured(NamedTuple):
    """The rewards of one arm's answers to a set at a setting, and the denoising forwards of each answer."""

    arm: str
    seed: int
    set: str
    setting: str
    rewards: list[float]
    forwards: list[int]

    @property
    def reward(self) -> float:
        """The mean reward: the accuracy where an answer is right (1) or wrong (0)."""
        return sum(self.rewards) / len(self.rewards)


def settings_of(arm: str, job_file: Path, overrides: list[str]) -> list[str]:
    """Return the overrides of the job for an arm."""
    objective = arm.removesuffix("-forwards")
    made = [*overrides, f"train.objective.type={objective.removesuffix('-unmasked')}"]
    if objective.endswith("-unmasked"):
        made.append("train.objective.nll_tokens=unmasked")
    if arm.endswith("-forwards"):
        train = load_job(job_file, overrides).train
        made += [f"train.{name}={2 * value}" for name in ("num_epochs", "max_steps") if (value := getattr(train, name))]
    return made


def evaluate_arms(
    job_file: Path, seed: int, storage: Path, arms: list[str], overrides: list[str]
) -> Iterator[tuple[str, Pipeline, Evaluation]]:
    """Yield each arm of one seed with its pipeline, of which every stage is finished, and its evaluation."""
    with ray_session(load_job(job_file, overrides).cluster):  # one for all arms: it takes seconds to start
        for arm in arms:
            job = load_job(job_file, [*settings_of(arm, job_file, overrides), f"seed={seed}", f"storage={storage}"])
            pipeline = Pipeline(job, Store(storage))
            value = pipeline.evaluate()
            if value is None:
                raise SystemExit(f"{job_file}: nothing to compare; the job needs [eval] and a task with a verifier")
            yield arm, pipeline, value


def measured(arm: str, seed: int, value: Evaluation, with_base: bool) -> list[Measured]:
    """Return what an arm solves and, with `with_base`, what its base solves."""
    names = {"aligned": arm, **({"base": "base"} if with_base else {})}
    return [
        Measured(names[row["model"]], seed, row["set"], row["setting"], row["rewards"], row["forwards"])
        for row in value["table"]
        if row["model"] in names
    ]


def differences(rows: list[Measured], arm: str, over: str, forwards: bool = False) -> dict[str, Difference]:
    """Return setting -> `arm` minus another on held-out prompts, all seeds together: in reward, or in forwards."""
    made = {}
    for setting in settings_in(rows):
        here = {(r.arm, r.seed): r for r in rows if r.setting == setting and r.set == HELD_OUT}
        seeds = sorted(seed for name, seed in here if name == over and (arm, seed) in here)
        ours, theirs = ([here[name, seed] for seed in seeds] for name in (arm, over))
        if forwards:
            made[setting] = paired_forwards([r.forwards for r in ours], [r.forwards for r in theirs])
        else:
            made[setting] = paired_test([r.rewards for r in ours], [r.rewards for r in theirs])
    return made


def settings_in(rows: list[Measured]) -> list[str]:
    """Return the settings of some rows in order."""
    return [str(setting) for setting in sorted({Setting.parse(row.setting) for row in rows})]


def markdown(rows: list[Measured], job_file: Path, overrides: list[str], subject: str = "dtrpo") -> str:
    """Return the page: mean reward by seed and pooled, then the subject against each control, then the public sets."""
    arms = [arm for arm in TITLES if any(r.arm == arm for r in rows)]
    settings = settings_in(rows)
    seeds = sorted({r.seed for r in rows})
    evaluated = load_job(job_file, overrides).eval
    heat = evaluated.temperature if evaluated else 0
    decoding = f"Temperature {heat:g}" if heat else "Greedy decoding"
    measure = "Accuracy" if all(right_or_wrong(row.rewards) for row in rows) else "Mean reward"
    lines = [
        f"# Alignment on `{job_file}`",
        "",
        f"Machine: {platform.machine()}, {platform.platform()}. Seeds: {', '.join(map(str, seeds))}. Overrides of the "
        f"job: {', '.join(f'`{word}`' for word in overrides) or 'none'}. Command: see `benchmarks/alignment.py`.",
        "",
        f"## {measure} on held-out prompts",
        "",
        f"{decoding}, by setting: the mean of the seeds, with each seed in brackets.",
        "",
        *_head("arm", settings),
        *(f"| {TITLES[arm]} | " + " | ".join(_cell(rows, arm, HELD_OUT, s) for s in settings) + " |" for arm in arms),
        "",
        f"## {TITLES[subject]} minus each other arm",
        "",
        "Percentage points with the 95 % interval of the difference and the p-value of the exact sign test, prompt by "
        "prompt, with its mean over the seeds (`dtrpo_ray/report/evaluation.py:paired_test`). **Bold**: p < 0.01.",
        "",
        *_head("minus", settings),
        *_against(rows, arms, subject),
    ]
    if adaptive := [setting for setting in settings if not setting.startswith(STEPS)]:
        lines += _forwards_section(rows, arms, subject, adaptive)
    public = sorted({r.set for r in rows if r.set != HELD_OUT})
    for name in public:
        lines += ["", f"## {measure} on `{name}`", "", *_head("arm", settings)]
        lines += [f"| {TITLES[a]} | " + " | ".join(_cell(rows, a, name, s) for s in settings) + " |" for a in arms]
    return "\n".join(lines) + "\n"


def _forwards_section(rows: list[Measured], arms: list[str], subject: str, settings: list[str]) -> list[str]:
    """Return the lines on forwards per answer, at the settings where the model's confidence decides on them."""
    base = [_mean(rows, "base", setting) for setting in settings]
    lines = ["", "## Denoising forwards per answer", "", "Held-out prompts, the mean of the seeds.", ""]
    lines += _head("arm", settings)
    lines += [f"| {TITLES[a]} | " + " | ".join(f"{_mean(rows, a, s)[0]:.2f}" for s in settings) + " |" for a in arms]
    lines += ["", f"{TITLES[subject]} minus each other arm, with the 95 % bootstrap interval and the p-value of "
              "Wilcoxon's signed-rank test (`paired_forwards`). **Bold**: p < 0.01.", ""]  # fmt: skip
    lines += [*_head("minus", settings), *_against(rows, arms, subject, forwards=True)]
    lines += ["", "Forwards per answer at the accuracy that the base has at each threshold, by linear interpolation "
              "between an arm's own thresholds (–: outside of their range).", ""]  # fmt: skip
    lines += _head("arm", [f"{setting}: {accuracy:.3f}" for setting, (_, accuracy) in zip(settings, base, strict=True)])
    for arm in arms:
        curve = [_mean(rows, arm, setting) for setting in settings]
        needed = [forwards_at(accuracy, curve) for _, accuracy in base]
        lines.append(f"| {TITLES[arm]} | " + " | ".join("–" if n is None else f"{n:.2f}" for n in needed) + " |")
    return lines


def forwards_at(accuracy: float, curve: list[tuple[float, float]]) -> float | None:
    """Interpolate the fewest forwards per answer at which a curve of (forwards, accuracy) has this accuracy."""
    for (x, y), (x1, y1) in pairwise(sorted(curve)):
        if min(y, y1) <= accuracy <= max(y, y1):
            return x if y == y1 else x + (x1 - x) * (accuracy - y) / (y1 - y)
    return None


def _head(first: str, settings: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(settings) + " |", "|---|" + "---|" * len(settings)]


def _against(rows: list[Measured], arms: list[str], subject: str, forwards: bool = False) -> list[str]:
    """Return a row of differences for each arm but the subject; those in forwards where they may differ."""
    lines = []
    for other in (arm for arm in arms if arm != subject):
        found = differences(rows, subject, other, forwards)
        cells = [
            _difference(d, 1 if forwards else 100) for s, d in found.items() if not (forwards and s.startswith(STEPS))
        ]
        lines.append(f"| {TITLES[other]} | " + " | ".join(cells) + " |")
    return lines


def _mean(rows: list[Measured], arm: str, setting: str) -> tuple[float, float]:
    """Return (forwards per answer, accuracy) on held-out prompts, the mean of the seeds."""
    found = [r for r in rows if (r.arm, r.set, r.setting) == (arm, HELD_OUT, setting)]
    return float(np.mean([r.forwards for r in found])), float(np.mean([r.reward for r in found]))


def _cell(rows: list[Measured], arm: str, test_set: str, setting: str) -> str:
    found = [r.reward for r in rows if (r.arm, r.set, r.setting) == (arm, test_set, setting)]
    each = f" ({', '.join(f'{value:.3f}' for value in found)})" if len(found) > 1 else ""
    return f"{sum(found) / len(found):.3f}{each}"


def _difference(found: Difference, unit: int) -> str:
    mean, low, high = (f"{unit * value:+.{1 if unit == 100 else 2}f}" for value in found[:3])
    text = f"{mean} [{low}, {high}], {p_text(found.p_value)}"
    return f"**{text}**" if found.p_value < 0.01 else text


def parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    """Return the options of this benchmark and of those that add to it."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("job", type=Path)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    made.add_argument("--set", dest="overrides", action="append", default=[])
    made.add_argument("--storage", type=Path, default=Path("runs"))
    made.add_argument("--out", type=Path, default=out)
    return made


def main() -> None:
    """Measure every seed, writing the page after each, so that an interrupt loses no finished seed."""
    options = parser(__doc__, Path("runs/alignment")).parse_args()
    rows: list[Measured] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        found = evaluate_arms(options.job, seed, options.storage, options.arms, options.overrides)
        for arm, _, value in found:
            rows += measured(arm, seed, value, with_base=arm == options.arms[0])
        options.out.with_suffix(".json").write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(rows, options.job, options.overrides))
        print(options.out.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
