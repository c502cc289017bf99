"""Intervals with known values, tables from trajectories, and the verdict of non-overlapping intervals."""

import pytest

from dtrpo_ray.config.decode import EvalConfig
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.report.evaluation import compare, summarise, wilson_interval
from tests.data.test_pairs import trajectories


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(5, 10, 0.23659, 0.76341), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (1386, 2000, 0.67244, 0.71280)],
)
def test_the_wilson_interval_has_its_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-4)


def test_a_table_row_counts_tokens_per_denoising_forward() -> None:
    table = trajectories(("held-out/0", [1, 2, 3, 4], 1.0, 2), ("held-out/1", [1, 2, 3, 4], 0.0, 2))
    ids = ["held-out/2/000000", "held-out/2/000001"]
    table = table.set_column(1, "row_id", [ids])
    record = summarise(table, {"held-out/0": "1234", "held-out/1": "4321"}, EvalConfig(), character_tokenizer("01234"))
    row = record["table"][0]
    assert (row["set"], row["budget"], row["correct"], row["num_prompts"]) == ("held-out", 2, 1, 2)
    assert row["tokens_per_forward"] == 1.0  # four tokens in four forwards each
    assert {example["correct"] for example in record["examples"]} == {True, False}
    assert record["examples"][0]["tokens"] == ["1", "2", "3", "4"]


def test_better_and_worse_need_intervals_apart() -> None:
    def row(model: str, budget: int, low: float, high: float) -> dict[str, object]:
        return {"model": model, "set": "s", "budget": budget, "accuracy": (low + high) / 2, "low": low, "high": high}

    table = [
        row("base", 1, 0.4, 0.5),
        row("aligned", 1, 0.51, 0.6),
        row("base", 2, 0.4, 0.5),
        row("aligned", 2, 0.49, 0.6),
    ]
    table += [row("base", 4, 0.4, 0.5), row("aligned", 4, 0.2, 0.3)]
    assert [c["verdict"] for c in compare(table)] == ["better", "same", "worse"]
