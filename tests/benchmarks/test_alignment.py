"""The arms differ in the objective alone, and their differences are those of the paired test."""

from pathlib import Path

import pytest

from benchmarks.alignment import ARMS, Measured, differences, forwards_at, markdown, settings_of
from dtrpo_ray.config.load import load_job

JOB = Path(__file__).parents[2] / "jobs" / "sudoku.toml"


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
    at, cost = "denoising_steps=1", [2] * 4
    rows = [
        Measured("dtrpo", seed, "held-out", at, list(map(float, solved)), cost)
        for seed, solved in ((0, "1111"), (1, "1100"))
    ]
    rows += [
        Measured("base", seed, "held-out", at, list(map(float, solved)), cost)
        for seed, solved in ((0, "1100"), (1, "1100"))
    ]
    rows += [Measured(arm, 0, "other.jsonl", at, [0.0] * 4, cost) for arm in ("dtrpo", "base")]
    gain, _, _, p_value = differences(rows, "dtrpo", "base")[at]
    assert (gain, p_value) == (0.25, 0.5)  # two prompts are better in one seed of two, none is worse
    page = markdown(rows, JOB, [])
    assert "| dTRPO | 0.750 (1.000, 0.500) |" in page
    assert "| base | +25.0 [" in page
    assert "p = 0.500 |" in page
    assert "## Accuracy on `other.jsonl`" in page
    assert "Greedy decoding, by setting" in page
    page = markdown([row._replace(rewards=[0.5]) for row in rows], JOB, ["eval.temperature=0.7"])
    assert "## Mean reward on held-out prompts\n\nTemperature 0.7, by setting" in page
    assert "forwards per answer" not in page  # no setting at which they could differ


def test_forwards_are_compared_at_equal_accuracy() -> None:
    """Base 0.5 at 2 forwards and 1.0 at 4; the arm 0.25 at 1 and 1.0 at 2.5: it has 0.5 at 1.5 forwards."""
    solved = {"base": {0.5: ("1100", 2), 0.9: ("1111", 4)}, "dtrpo": {0.5: ("1000", 1), 0.9: ("1111", 2.5)}}
    rows = [
        Measured(arm, 0, "held-out", f"threshold={t}", list(map(float, answers)), [cost] * 4)  # type: ignore[list-item]
        for arm, at in solved.items()
        for t, (answers, cost) in at.items()
    ]
    assert differences(rows, "dtrpo", "base", forwards=True)["threshold=0.9"].mean == -1.5
    page = markdown(rows, JOB, [])
    assert "| arm | threshold=0.5: 0.500 | threshold=0.9: 1.000 |" in page
    assert page.endswith("| base | 2.00 | 4.00 |\n| dTRPO | 1.50 | 2.50 |\n")
    assert "| base | -1.00 [-1.00, -1.00], p = 0.125 | -1.50 [" in page
    assert forwards_at(0.2, [(1, 0.25), (2.5, 1.0)]) is None
