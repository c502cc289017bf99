"""The arms differ in the objective alone, and their differences are those of the paired test."""

from pathlib import Path

import pytest

from benchmarks.alignment import ARMS, Measured, differences, markdown, settings_of
from dtrpo_ray.config.load import load_job

JOB = Path(__file__).parents[2] / "jobs" / "demo.toml"


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_the_objective_and_at_most_the_number_of_steps(arm: str) -> None:
    plain = load_job(JOB, ["train.max_steps=10"])
    job = load_job(JOB, settings_of(arm, JOB, ["train.max_steps=10"]))
    changed = {"objective": plain.train.objective}
    changed |= {"max_steps": 10, "num_epochs": plain.train.num_epochs} if arm.endswith("-forwards") else {}
    assert job.model_copy(update={"train": job.train.model_copy(update=changed)}) == plain
    assert job.train.max_steps == (20 if arm.endswith("-forwards") else 10)
    assert job.train.objective.is_preference == (not arm.startswith(("imitation", "sft")))
    assert job.train.objective.nll_tokens == ("unmasked" if "unmasked" in arm else "hidden")


def test_seeds_are_compared_each_with_its_own() -> None:
    rows = [Measured("dtrpo", seed, "held-out", 1, solved) for seed, solved in ((0, "1111"), (1, "1100"))]
    rows += [Measured("base", seed, "held-out", 1, solved) for seed, solved in ((0, "1100"), (1, "1100"))]
    rows += [Measured(arm, 0, "other.jsonl", 1, "0000") for arm in ("dtrpo", "base")]
    gain, _, _, p_value = differences(rows, "dtrpo", "base")[1]
    assert (gain, p_value) == (0.25, 0.5)  # two prompts are better in one seed of two, none is worse
    page = markdown(rows, JOB, [])
    assert "| dTRPO | 0.750 (1.000, 0.500) |" in page
    assert "| base | +25.0 [" in page
    assert "p = 0.500 |" in page
    assert "## Accuracy on `other.jsonl`" in page
