"""Decoded held-out prompts of base and aligned -> accuracy, tokens per forward, and a comparison prompt by prompt."""

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest

from dtrpo_ray.config.decode import EvalConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Z95 = 1.959964
SIGNIFICANT = 0.05
HELD_OUT = "held-out"
NUM_EXAMPLES = 4  # denoisings kept for the report


class Score(TypedDict):
    """The accuracy of a model on a test set at a budget, the number of denoising steps per block.

    `solved` has a "1" for each prompt that was solved and a "0" for each other, in the order of the set.
    """

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
    solved: str


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
    """A model minus the base on the same prompts of a set at a budget.

    `low` and `high` are the 95 % interval of the gain in accuracy, and `p_value` is that of no difference; the verdict
    is "same" where it is 0.05 or more.
    """

    model: str
    set: str
    budget: int
    gain: float
    low: float
    high: float
    p_value: float
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
    solved = "".join(str(int(row["reward"] >= 1)) for row in rows)
    correct, total = solved.count("1"), len(solved)
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
        "solved": solved,
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


def paired_test(better: Sequence[str], base: Sequence[str]) -> tuple[float, float, float, float]:
    """Compare two models on the same prompts: (gain in accuracy, its 95 % interval low and high, p-value).

    Each sequence has one string of "1" and "0" (see `Score.solved`) for each seed, of the same prompts. A prompt's
    outcome is its mean over the seeds, because the answers of several seeds to one prompt are not independent. The
    p-value is that of the exact sign test: of the prompts with a difference, each model has half. For one seed that is
    McNemar's exact test (Psychometrika 1947). The interval is Agresti and Min's (Statistics in Medicine 2005). Both are
    about these trained models; few seeds say little about another seed.
    """
    one, other = (np.array([[int(c) for c in row] for row in rows], dtype=int) for rows in (better, base))
    change = (one - other).mean(0)
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    total = len(change) + 2  # their two pseudo-prompts: half a win, half a loss, one tie
    centre = change.sum() / total
    half = Z95 * sqrt(((change**2).sum() + 1) / total - centre**2) / sqrt(total)
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return float(change.mean()), float(max(centre - half, -1)), float(min(centre + half, 1)), p_value


def compare(table: Sequence[Score]) -> list[Comparison]:
    """Compare each model with the base, prompt by prompt, on every (set, budget) that both have."""
    base = {(r["set"], r["budget"]): r for r in table if r["model"] == "base"}
    made: list[Comparison] = []
    for row in table:
        other = base.get((row["set"], row["budget"]))
        if row["model"] == "base" or other is None:
            continue
        gain, low, high, p_value = paired_test([row["solved"]], [other["solved"]])
        made.append(
            {
                "model": row["model"],
                "set": row["set"],
                "budget": row["budget"],
                "gain": gain,
                "low": low,
                "high": high,
                "p_value": p_value,
                "verdict": "same" if p_value >= SIGNIFICANT else "better" if gain > 0 else "worse",
            }
        )
    return made


def p_text(p_value: float) -> str:
    """Format a p-value: "p = 0.042", or "p < 0.001"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
