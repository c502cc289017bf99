"""Intervals with known values, tables from trajectories, and the paired test of two models."""

from math import sqrt
from typing import Any

import numpy as np
import pytest

from dtrpo_ray.config.decode import EvalConfig, Setting
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.report.evaluation import (
    HELD_OUT,
    Score,
    against_base,
    compare,
    is_graded,
    mean_interval,
    p_text,
    paired_forwards,
    paired_test,
    reward_text,
    summarise,
    wilson_interval,
)
from tests.data.test_pairs import trajectories


def digits(text: str) -> list[float]:
    """The rewards that a text of 1 and 0 spells."""
    return [float(digit) for digit in text]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(5, 10, 0.23659, 0.76341), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (1386, 2000, 0.67244, 0.71280)],
)
def test_the_wilson_interval_has_its_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-4)


def test_a_table_row_counts_tokens_per_denoising_forward() -> None:
    table = trajectories(("held-out/0", [1, 2, 3, 4], 1.0, 2), ("held-out/1", [1, 2, 3, 4], 0.0, 2))
    ids = ["held-out/denoising_steps=2/000000", "held-out/denoising_steps=2/000001"]
    table = table.set_column(1, "row_id", [ids])
    record = summarise(table, {"held-out/0": "1234", "held-out/1": "4321"}, EvalConfig(), character_tokenizer("01234"))
    row = record["table"][0]
    assert (row["set"], row["setting"], row["reward"], row["num_prompts"]) == ("held-out", "denoising_steps=2", 0.5, 2)
    assert row["rewards"] == [1.0, 0.0]
    assert row["tokens_per_forward"] == 1.0  # four tokens in four forwards each
    assert (row["forwards"], row["forwards_per_answer"]) == ([4, 4], 4.0)
    assert {example["reward"] for example in record["examples"]} == {1.0, 0.0}
    assert record["examples"][0]["tokens"] == ["1", "2", "3", "4"]


def test_the_paired_test_is_mcnemars_on_the_prompts_that_one_model_alone_solves() -> None:
    """Of 15 such prompts 12 are won: two-sided binomial, 2 (C(15, 0) + ... + C(15, 3)) / 2^15."""
    base, other = "1" * 30 + "0" * 12 + "1" * 3 + "0" * 5, "1" * 30 + "1" * 12 + "0" * 3 + "0" * 5
    gain, low, high, p_value = paired_test([digits(other)], [digits(base)])
    assert gain == pytest.approx(9 / 50)
    assert p_value == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
    half = 1.959964 * sqrt((15 + 1) / 52 - (9 / 52) ** 2) / sqrt(52)  # Agresti and Min with b = 12, c = 3, n = 50
    assert (low, high) == pytest.approx((9 / 52 - half, 9 / 52 + half))
    assert paired_test([digits(base)], [digits(other)]) == pytest.approx((-gain, -high, -low, p_value))


def test_equal_models_differ_in_nothing_and_the_interval_says_how_little_ten_prompts_show() -> None:
    gain, low, high, p_value = paired_test([digits("1010101010")], [digits("1010101010")])
    assert (gain, p_value) == (0, 1)
    assert -0.2 < low < 0 < high < 0.2


def test_seeds_with_the_same_answers_prove_no_more_than_one() -> None:
    """Prompts are the sample: a seed that repeats another tells nothing new of the gain."""
    one, base = digits("1101100111"), digits("1001100011")
    assert paired_test([one] * 3, [base] * 3) == pytest.approx(paired_test([one], [base]))


def test_the_test_rejects_true_equality_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    rejected, covered = 0, 0
    for _ in range(400):
        hard = rng.random(200)
        one, other = ((rng.random(200) < hard).astype(float).tolist() for _ in "ab")
        _, low, high, p_value = paired_test([one], [other])
        rejected += p_value < 0.05
        covered += low <= 0 <= high
    assert rejected <= 0.05 * 400 + 2 * sqrt(400 * 0.05 * 0.95)
    assert covered >= 0.95 * 400 - 2 * sqrt(400 * 0.05 * 0.95)


def test_a_verdict_is_of_the_pairs_and_not_of_two_intervals() -> None:
    """Accuracies of 0.60 and 0.64 are four wins of four where one model solves all that the other does."""

    def row(model: str, steps: int, solved: str) -> Score:
        return {
            "model": model, "set": "s", "setting": f"denoising_steps={steps}", "temperature": 0.0, "num_prompts": 100,
            "reward": 0.0, "low": 0.0, "high": 1.0, "tokens_per_forward": 1.0, "forwards_per_answer": 4.0,
            "rewards": digits(solved), "forwards": [4 - (model == "aligned")] * 50 + [4] * 50,
        }  # fmt: skip

    nested, crossed = "1" * 64 + "0" * 36, "0" * 36 + "1" * 64
    base = "1" * 60 + "0" * 40
    table = [row("base", 1, base), row("aligned", 1, nested), row("base", 2, base), row("aligned", 2, crossed)]
    table += [row("base", 4, "1" * 100), row("aligned", 4, base), row("aligned", 8, base)]
    made = compare(table)
    assert [c["setting"] for c in made] == [f"denoising_steps={k}" for k in (1, 2, 4)]  # at 8 there is no base
    assert [c["forwards"]["mean"] for c in made] == [-0.5] * 3
    assert [c["gain"] for c in made] == pytest.approx([0.04, 0.04, -0.4])
    assert [c["p_value"] for c in made] == pytest.approx([0.125, 0.728, 0], abs=5e-3)
    assert [c["verdict"] for c in made] == ["same", "same", "worse"]


def test_the_aligned_model_is_compared_with_base_and_controls_and_each_of_these_with_the_base() -> None:
    """Base right on 2 of 10, the control on 5, the aligned model on 9, each on what the one before solves too."""
    facts = {"set": HELD_OUT, "setting": "denoising_steps=1", "temperature": 0.0, "num_prompts": 10, "reward": 0.0}
    facts |= {"low": 0.0, "high": 1.0, "tokens_per_forward": 1.0, "forwards_per_answer": 4.0, "forwards": [4] * 10}
    shares = {"base": 2, "aligned": 9, "imitation": 5}
    table: Any = [{"model": m, **facts, "rewards": [1.0] * n + [0.0] * (10 - n)} for m, n in shares.items()]
    found = {(c["model"], c["against"]): c["gain"] for c in compare(table)}
    wanted = {("aligned", "base"): 0.7, ("imitation", "base"): 0.3, ("aligned", "imitation"): 0.4}
    assert found == pytest.approx(wanted)
    assert [c["gain"] for c in against_base(compare(table))] == pytest.approx([0.7])


def test_forwards_are_compared_prompt_by_prompt() -> None:
    """The law of the signed-rank test with all differences of one sign: 2 / 2^n; and the mean's normal interval."""
    rng = np.random.default_rng(0)
    base = rng.integers(4, 17, 400)
    other = base - rng.integers(0, 5, 400)
    found = paired_forwards([other.tolist()], [base.tolist()])
    change = other - base
    half = 1.959964 * change.std() / sqrt(400)
    assert found.mean == change.mean()
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.02)
    assert found.p_value < 1e-6
    turned = paired_forwards([base.tolist()], [other.tolist()])
    assert turned == pytest.approx((-found.mean, -found.high, -found.low, found.p_value), abs=0.02)
    assert paired_forwards([[5, 3, 1, 4]], [[6, 5, 4, 8]]).p_value == pytest.approx(2 / 2**4)
    assert paired_forwards([[4, 4]], [[4, 4]]) == (0, 0, 0, 1)
    assert paired_forwards([[3] * 9], [[4] * 9])[:3] == (-1, -1, -1)
    assert paired_forwards([[1, 3], [3, 3]], [[2, 2], [2, 4]]) == (0, 0, 0, 1)  # seeds that cancel prompt by prompt


def test_settings_sort_from_few_forwards_to_many_and_are_read_back_from_row_ids() -> None:
    """Numbers sort as numbers, whatever the order of the rows; the examples are those of the first setting."""
    settings = EvalConfig(budgets=(16, 2), thresholds=(0.9, 0.25)).settings
    assert list(map(str, settings)) == ["denoising_steps=2", "denoising_steps=16", "threshold=0.25", "threshold=0.9"]
    assert [str(Setting.parse(str(setting))) for setting in settings] == list(map(str, settings))
    assert [setting.label for setting in settings][1:3] == ["16 steps per block", "threshold 0.25"]
    table = trajectories(*[(f"a/b.jsonl/{i}", [1, 2, 3, 4], 1.0, None) for i in range(4)])
    ids = [f"a/b.jsonl/{setting}/{i:06d}" for i, setting in enumerate(settings)]
    table = table.set_column(1, "row_id", [ids])
    answers = {f"a/b.jsonl/{i}": "1234" for i in range(4)}
    record = summarise(table, answers, EvalConfig(), character_tokenizer("01234"))
    assert [row["setting"] for row in record["table"]] == list(map(str, settings))
    assert [example["setting"] for example in record["examples"]] == ["denoising_steps=2"]


def test_graded_rewards_have_the_interval_of_a_mean_and_a_test_of_signs() -> None:
    """Half of the rewards 0.25, half 0.75: standard deviation 0.25. Three prompts gain 0.1 + 0.2 and none loses."""
    rewards = [0.25, 0.75] * 5000
    assert mean_interval(rewards) == pytest.approx((0.5 - 1.959964 * 0.0025, 0.5 + 1.959964 * 0.0025), abs=1e-6)
    assert mean_interval([1.0, 0.0] * 5) == wilson_interval(5, 10)
    gain, _, _, p_value = paired_test([[0.3, 0.3, 0.3, 0.3]], [[0.0, 0.0, 0.0, 0.1 + 0.2]])
    assert (gain, p_value) == (pytest.approx(0.225), 0.25)
    few, many = [0.5] * 20 + [0.0] * 60, [0.0] * 20 + [0.1] * 60  # the mean is of the 20, the count of the 60
    assert paired_test([few], [many])[::3] == (pytest.approx(0.05), 1.0)
    assert [is_graded([{"rewards": found}]) for found in ([0.0, 1.0], [0.0, 0.5])] == [False, True]  # type: ignore[list-item, typeddict-item]
    assert [reward_text(reward) for reward in (1, 0.583, 0)] == ["correct", "reward 0.58", "wrong"]


def test_a_p_value_is_never_said_to_be_zero() -> None:
    assert [p_text(p) for p in (0.5, 0.0494, 0.00099, 1e-30)] == ["p = 0.500", "p = 0.049", "p < 0.001", "p < 0.001"]
