"""Decoded held-out prompts of base and aligned -> accuracy with 95 % intervals and tokens per forward."""

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import pyarrow as pa

from dtrpo_ray.config.decode import EvalConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Z95 = 1.959964
HELD_OUT = "held-out"
NUM_EXAMPLES = 4  # denoisings kept for the report


class Score(TypedDict):
    """The accuracy of a model on a test set at a budget, the number of denoising steps per block."""

    model: NotRequired[str]  # absent in the file of one model
    set: str
    budget: int
    temperature: float
    num_prompts: int
    correct: int
    accuracy: float
    low: float
    high: float
    tokens_per_forward: float


class Example(TypedDict):
    """One denoising, for the report: `steps` has the step that unmasked each token."""

    model: NotRequired[str]  # absent in the file of one model
    prompt: str
    answer: str
    response: str
    correct: bool
    block_size: int
    budget: int
    steps: list[int]
    tokens: list[str]


class Comparison(TypedDict):
    """The accuracy of a model minus the base's on a set at a budget; "same" if the 95 % intervals overlap."""

    model: str
    set: str
    budget: int
    gain: float
    verdict: Literal["better", "worse", "same"]


class Evaluation(TypedDict):
    """Base against aligned; the file `eval.json` of one model has no comparison."""

    table: list[Score]
    examples: list[Example]
    comparison: NotRequired[list[Comparison]]


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927), which stays inside [0, 1]."""
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(
    trajectories: pa.Table, answers: dict[str, str], config: EvalConfig, tokenizer: "PreTrainedTokenizerBase"
) -> Evaluation:
    """Evaluate one model's trajectories, whose row ids read "set/budget/number"."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in trajectories.sort_by("row_id").to_pylist():
        test_set, budget, _ = row["row_id"].rsplit("/", 2)
        groups.setdefault((test_set, int(budget)), []).append(row)
    table = [_table_row(rows, *group, config.temperature) for group, rows in groups.items()]
    smallest = min(groups, key=lambda group: (group[1], group[0] != HELD_OUT))
    kept = _examples(groups[smallest], answers, tokenizer)
    return {"table": sorted(table, key=lambda r: (r["set"] != HELD_OUT, r["set"], r["budget"])), "examples": kept}


def _table_row(rows: list[dict[str, Any]], test_set: str, budget: int, temperature: float) -> Score:
    correct, total = sum(row["reward"] >= 1 for row in rows), len(rows)
    low, high = wilson_interval(correct, total)
    return {
        "set": test_set,
        "budget": budget,
        "temperature": temperature,
        "num_prompts": total,
        "correct": correct,
        "accuracy": correct / total,
        "low": low,
        "high": high,
        "tokens_per_forward": sum(len(r["steps"]) for r in rows) / sum(r["num_forwards"] for r in rows),
    }


def _examples(
    rows: list[dict[str, Any]], answers: dict[str, str], tokenizer: "PreTrainedTokenizerBase"
) -> list[Example]:
    failed = [r for r in rows if r["reward"] < 1][: NUM_EXAMPLES // 2]
    solved = [r for r in rows if r["reward"] >= 1][: NUM_EXAMPLES - len(failed)]
    return [
        {
            "prompt": row["prompt"],
            "answer": answers[row["prompt_id"]],
            "response": row["response"],
            "correct": row["reward"] >= 1,
            "block_size": row["block_size"],
            "budget": row["denoising_steps"],
            "steps": row["steps"],
            "tokens": [str(tokenizer.decode([i])) for i in row["response_ids"]],
        }
        for row in failed + solved
    ]


def compare(table: Sequence[Score]) -> list[Comparison]:
    """Compare each model with the base on every (set, budget)."""
    base = {(r["set"], r["budget"]): r for r in table if r["model"] == "base"}
    return [
        {
            "model": row["model"],
            "set": row["set"],
            "budget": row["budget"],
            "gain": row["accuracy"] - other["accuracy"],
            "verdict": "better" if row["low"] > other["high"] else "worse" if row["high"] < other["low"] else "same",
        }
        for row in table
        if row["model"] != "base" and (other := base.get((row["set"], row["budget"])))
    ]
