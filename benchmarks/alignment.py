"""Compare dTRPO with its controls, for several seeds, through the real pipeline.

    python benchmarks/alignment.py jobs/demo.toml --seeds 0 1 2 --storage runs --out benchmarks/results/alignment

All arms of a seed start from the same base, rollouts and pairs, and differ in `train.objective` alone. An arm without a
reference costs half the forwards, so each of them also runs for twice the optimizer steps: as many forwards as dTRPO's.
Finished stages are reused. Arms are compared prompt by prompt (`paired_test`). Writes OUT.json and OUT.md.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import NamedTuple

from dtrpo_ray.config.load import load_job
from dtrpo_ray.pipeline import Pipeline
from dtrpo_ray.report.evaluation import HELD_OUT, p_text, paired_test
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
    """The answers of one arm to a set at a budget: "1" for each prompt that was solved, "0" for each other."""

    arm: str
    seed: int
    set: str
    budget: int
    solved: str

    @property
    def accuracy(self) -> float:
        """Share of the prompts that were solved."""
        return self.solved.count("1") / len(self.solved)


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


def measure(job_file: Path, seed: int, storage: Path, arms: list[str], overrides: list[str]) -> list[Measured]:
    """Return what base and each arm solve for one seed."""
    made: list[Measured] = []
    for arm in arms:
        settings = [*settings_of(arm, job_file, overrides), f"seed={seed}", f"storage={storage}"]
        job = load_job(job_file, settings)
        if not (job.eval and job.puzzle):
            raise SystemExit(f"{job_file}: nothing to compare; the job needs [eval] and a task with a verifier")
        with ray_session(job.cluster):
            value = Pipeline(job, Store(storage)).evaluate()
        for row in value["table"] if value else ():
            if row["model"] == "aligned" or arm == arms[0]:
                name = "base" if row["model"] == "base" else arm
                made.append(Measured(name, seed, row["set"], row["budget"], row["solved"]))
    return made


def differences(rows: list[Measured], arm: str, over: str) -> dict[int, tuple[float, float, float, float]]:
    """Return budget -> (gain of `arm` over another, low, high, p-value) on held-out prompts, all seeds together."""
    made = {}
    for budget in sorted({row.budget for row in rows}):
        here = {(r.arm, r.seed): r.solved for r in rows if r.budget == budget and r.set == HELD_OUT}
        seeds = sorted(seed for name, seed in here if name == over and (arm, seed) in here)
        made[budget] = paired_test([here[arm, seed] for seed in seeds], [here[over, seed] for seed in seeds])
    return made


def markdown(rows: list[Measured], job_file: Path, overrides: list[str], subject: str = "dtrpo") -> str:
    """Return the page: accuracy by seed and pooled, then the subject against each control, then the public sets."""
    arms = [arm for arm in TITLES if any(r.arm == arm for r in rows)]
    budgets = sorted({r.budget for r in rows})
    seeds = sorted({r.seed for r in rows})
    lines = [
        f"# Alignment on `{job_file}`",
        "",
        f"Machine: {platform.machine()}, {platform.platform()}. Seeds: {', '.join(map(str, seeds))}. Overrides of the "
        f"job: {', '.join(f'`{word}`' for word in overrides) or 'none'}. Command: see `benchmarks/alignment.py`.",
        "",
        "## Accuracy on held-out prompts",
        "",
        "Greedy decoding, by denoising steps per block: the mean of the seeds, with each seed in brackets.",
        "",
        "| arm | " + " | ".join(map(str, budgets)) + " |",
        "|---|" + "---|" * len(budgets),
        *(f"| {TITLES[arm]} | " + " | ".join(_cell(rows, arm, HELD_OUT, b) for b in budgets) + " |" for arm in arms),
        "",
        f"## {TITLES[subject]} minus each other arm",
        "",
        "Percentage points with the 95 % interval of the difference and the p-value of the exact sign test, prompt by "
        "prompt, with its mean over the seeds (`dtrpo_ray/report/evaluation.py:paired_test`). **Bold**: p < 0.01.",
        "",
        "| minus | " + " | ".join(map(str, budgets)) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for other in arms:
        if other != subject:
            found = differences(rows, subject, other)
            lines.append(f"| {TITLES[other]} | " + " | ".join(_difference(found[b]) for b in budgets) + " |")
    public = sorted({r.set for r in rows if r.set != HELD_OUT})
    for name in public:
        lines += ["", f"## Accuracy on `{name}`", "", "| arm | " + " | ".join(map(str, budgets)) + " |"]
        lines += ["|---|" + "---|" * len(budgets)]
        lines += [f"| {TITLES[arm]} | " + " | ".join(_cell(rows, arm, name, b) for b in budgets) + " |" for arm in arms]
    return "\n".join(lines) + "\n"


def _cell(rows: list[Measured], arm: str, test_set: str, budget: int) -> str:
    found = [r.accuracy for r in rows if (r.arm, r.set, r.budget) == (arm, test_set, budget)]
    each = f" ({', '.join(f'{value:.3f}' for value in found)})" if len(found) > 1 else ""
    return f"{sum(found) / len(found):.3f}{each}"


def _difference(found: tuple[float, float, float, float]) -> str:
    gain, low, high, p_value = found
    text = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {p_text(p_value)}"
    return f"**{text}**" if p_value < 0.01 else text


def main() -> None:
    """Measure every seed, writing the page after each, so that an interrupt loses no finished seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/alignment"))
    options = parser.parse_args()
    rows: list[Measured] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        rows += measure(options.job, seed, options.storage, options.arms, options.overrides)
        options.out.with_suffix(".json").write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(rows, options.job, options.overrides))
        print(options.out.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
