"""Decoded held-out prompts of base and aligned -> rewards, denoising forwards, and a comparison prompt by prompt."""

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest, bootstrap, wilcoxon

from dtrpo_ray.config.decode import EvalConfig, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Z95 = 1.959964
SIGNIFICANT = 0.05
HELD_OUT = "held-out"
NUM_EXAMPLES = 4  # denoisings kept for the report
NUM_RESAMPLES = 2000  # of a bootstrap


class Score(TypedDict):
    """The mean reward of a model on a test set at a setting (`str` of `Setting`), and what its answers cost.

    It is the accuracy where each answer is right (1) or wrong (0). `low` and `high` are its 95 % interval. `rewards`
    and `forwards` have the reward and the denoising forwards of each answer, in the order of the set.
    """

    model: NotRequired[str]  # absent in the file of one model
    set: str
    setting: str
    temperature: float
    num_prompts: int
    reward: float
    low: float
    high: float
    tokens_per_forward: float
    forwards_per_answer: float
    rewards: list[float]
    forwards: list[int]


class Example(TypedDict):
    """One denoising, for the report: `steps` has the step that unmasked each token."""

    model: NotRequired[str]  # absent in the file of one model
    prompt: str
    answer: str
    response: str
    reward: float
    block_size: int
    setting: str
    steps: list[int]
    tokens: list[str]


class Difference(NamedTuple):
    """A mean difference over prompts, its 95 % interval, and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p_value: float


class Comparison(TypedDict):
    """A model minus another (`against`) on the same prompts of a set at a setting.

    `low` and `high` are the 95 % interval of the gain in mean reward, and `p_value` is that of no difference; the
    verdict is "same" where it is 0.05 or more. `forwards` is the `Difference` of forwards per answer, by name.
    """

    model: str
    against: str
    set: str
    setting: str
    gain: float
    low: float
    high: float
    p_value: float
    verdict: Literal["better", "worse", "same"]
    forwards: dict[str, float]


class Evaluation(TypedDict):
    """Base, aligned and controls; the file `eval.json` of one model has no comparison."""

    table: list[Score]
    examples: list[Example]
    comparison: NotRequired[list[Comparison]]


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927), which stays inside [0, 1]."""
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_graded(table: Sequence[Score]) -> bool:
    """Return True if some answer is neither right (reward 1) nor wrong (0)."""
    return not all(right_or_wrong(row["rewards"]) for row in table)


def right_or_wrong(rewards: Sequence[float]) -> bool:
    """Return True if each reward is 1 (right) or 0 (wrong), so that their mean is an accuracy."""
    return set(rewards) <= {0, 1}


def mean_interval(rewards: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean reward: Wilson's for rewards of 0 and 1, else mean ± 1.96 standard errors."""
    if right_or_wrong(rewards):
        return wilson_interval(int(sum(rewards)), len(rewards))
    mean, half = float(np.mean(rewards)), float(Z95 * np.std(rewards, ddof=1) / sqrt(len(rewards)))
    return max(0.0, mean - half), min(1.0, mean + half)


def summarise(
    trajectories: pa.Table, answers: dict[str, str], config: EvalConfig, tokenizer: "PreTrainedTokenizerBase"
) -> Evaluation:
    """Evaluate one model's trajectories, whose row ids read "set/setting/number"."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in trajectories.sort_by("row_id").to_pylist():
        test_set, setting, _ = row["row_id"].rsplit("/", 2)
        groups.setdefault((test_set, setting), []).append(row)
    table = [_table_row(rows, *group, config.temperature) for group, rows in groups.items()]
    fewest = min(groups, key=lambda group: (Setting.parse(group[1]), group[0] != HELD_OUT))
    kept = _examples(groups[fewest], answers, tokenizer)
    return {"table": sorted(table, key=in_order), "examples": kept}


def in_order(row: Score) -> tuple[bool, str, Setting]:
    """Return the sort key of a table: the held-out set first, then by set and setting."""
    return row["set"] != HELD_OUT, row["set"], Setting.parse(row["setting"])


def _table_row(rows: list[dict[str, Any]], test_set: str, setting: str, temperature: float) -> Score:
    rewards, forwards = [float(row["reward"]) for row in rows], [int(row["num_forwards"]) for row in rows]
    low, high = mean_interval(rewards)
    return {
        "set": test_set,
        "setting": setting,
        "temperature": temperature,
        "num_prompts": len(rows),
        "reward": sum(rewards) / len(rows),
        "low": low,
        "high": high,
        "tokens_per_forward": sum(len(r["steps"]) for r in rows) / sum(forwards),
        "forwards_per_answer": sum(forwards) / len(rows),
        "rewards": rewards,
        "forwards": forwards,
    }


def _examples(
    rows: list[dict[str, Any]], answers: dict[str, str], tokenizer: "PreTrainedTokenizerBase"
) -> list[Example]:
    failed, solved = ([r for r in rows if (r["reward"] >= 1) == right] for right in (False, True))
    half = NUM_EXAMPLES // 2
    return [
        {
            "prompt": row["prompt"],
            "answer": answers[row["prompt_id"]],
            "response": row["response"],
            "reward": row["reward"],
            "block_size": row["block_size"],
            "setting": row["row_id"].rsplit("/", 2)[1],
            "steps": row["steps"],
            "tokens": [str(tokenizer.decode([i])) for i in row["response_ids"]],
        }
        for row in (failed[:half] + solved + failed[half:])[:NUM_EXAMPLES]
    ]


def paired_test(better: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Difference:
    """Compare the mean rewards, from 0 to 1, of two models on the same prompts.

    Each sequence has the rewards of one seed (see `Score.rewards`), of the same prompts. A prompt's outcome is its mean
    over the seeds, because the answers of several seeds to one prompt are not independent. The p-value is that of the
    exact sign test: of the prompts with a difference, each model has half. For one seed and rewards of 0 and 1 that is
    McNemar's exact test (Psychometrika 1947). The interval is Agresti and Min's (Statistics in Medicine 2005), which is
    made for rewards of 0 and 1 and wide for others. Both are about these trained models; few seeds say little about
    another seed. Where one model gains on more prompts and the other in the mean, which graded rewards permit, the
    p-value is 1: nothing is claimed.
    """
    change = np.mean(np.array(better, dtype=float) - np.array(base, dtype=float), axis=0)
    change[np.abs(change) < 1e-9] = 0  # sums of a few rewards that differ in rounding alone
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    total = len(change) + 2  # their two pseudo-prompts: half a win, half a loss, one tie
    centre = change.sum() / total
    half = Z95 * sqrt(((change**2).sum() + 1) / total - centre**2) / sqrt(total)
    agree = (wins - losses) * change.sum() > 0
    p_value = float(binomtest(wins, wins + losses).pvalue) if agree else 1.0
    return Difference(float(change.mean()), float(max(centre - half, -1)), float(min(centre + half, 1)), p_value)


def paired_forwards(one: Sequence[Sequence[int]], base: Sequence[Sequence[int]]) -> Difference:
    """Compare the forwards per answer of two models on the same prompts; one sequence of numbers for each seed.

    A prompt's outcome is its mean over the seeds, as in `paired_test`. The p-value is that of Wilcoxon's signed-rank
    test (Biometrics Bulletin 1945), the interval the percentile bootstrap's over prompts (Efron 1979).
    """
    change = np.mean(np.array(one, dtype=float) - np.array(base, dtype=float), axis=0)
    if not change.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    low = high = change.mean()
    if np.ptp(change) > 0:
        # `batch` bounds the resamples that are in memory at once
        resampled = bootstrap((change,), np.mean, method="percentile", n_resamples=NUM_RESAMPLES, batch=100, rng=0)
        low, high = resampled.confidence_interval
    return Difference(float(change.mean()), float(low), float(high), float(wilcoxon(change).pvalue))


def compare(table: Sequence[Score]) -> list[Comparison]:
    """Compare each model with the base, and the aligned one with each control, on each (set, setting) of both."""
    scores = {(r["model"], r["set"], r["setting"]): r for r in table}
    models = dict.fromkeys(r["model"] for r in table)
    pairs = [(model, "base") for model in models if model != "base"]
    pairs += [("aligned", model) for model in models if model not in ("base", "aligned")]
    return [
        _comparison(row, other)
        for model, against in pairs
        for (name, test_set, setting), row in scores.items()
        if name == model and (other := scores.get((against, test_set, setting)))
    ]


def against_base(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of the aligned model with the base."""
    return [row for row in comparisons if (row["model"], row["against"]) == ("aligned", "base")]


def _comparison(row: Score, other: Score) -> Comparison:
    gain, low, high, p_value = paired_test([row["rewards"]], [other["rewards"]])
    return {
        "model": row["model"],
        "against": other["model"],
        "set": row["set"],
        "setting": row["setting"],
        "gain": gain,
        "low": low,
        "high": high,
        "p_value": p_value,
        "verdict": "same" if p_value >= SIGNIFICANT else "better" if gain > 0 else "worse",
        "forwards": paired_forwards([row["forwards"]], [other["forwards"]])._asdict(),
    }


def reward_text(reward: float) -> str:
    """Format the reward of an answer: "correct" from 1 on, "wrong" for 0, else "reward 0.58"."""
    return "correct" if reward >= 1 else f"reward {reward:.2f}" if reward > 0 else "wrong"


def p_text(p_value: float) -> str:
    """Format a p-value: "p = 0.042", or "p < 0.001"."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
