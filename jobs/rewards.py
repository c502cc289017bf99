"""A reward function of one's own: `dtrpo score jobs/prompts.toml --set score.scorer=rewards:near` (docs/data.md)."""

import re


def near(completions: list[str], answer: list[str], **columns: list[object]) -> list[float | None]:
    """Return 1 for the number of the reference and less the farther away; None for a response without a number."""
    rewards: list[float | None] = []
    for text, reference in zip(completions, answer, strict=True):
        said, wanted = (re.findall(r"-?\d+", words) for words in (text, reference))
        rewards.append(1 / (1 + abs(int(said[-1]) - int(wanted[-1]))) if said else None)
    return rewards
