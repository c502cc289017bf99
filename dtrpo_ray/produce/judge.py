"""Reward responses to the same prompt by a language model that compares them in pairs, each pair in both orders.

A response's reward is its mean over the comparisons that count: 1 won, 0.5 tied, 0 lost. Two verdicts that disagree
are a tie. A comparison with an unreadable verdict does not count; a response without any that counts has no reward.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from dtrpo_ray.config.produce import JUDGE_FIELDS, JudgeConfig
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import prompt_messages
from dtrpo_ray.produce.llm import GenerateParams, LanguageModel, Reply

POINTS = {"a": 1.0, "b": 0.0}  # of the answer shown first; any other word is a tie

DECIDED, TIE, INCONSISTENT = "decided", "tie", "inconsistent"  # outcomes that count
UNPARSABLE, TOO_LONG = "unparsable", "too long"  # outcomes that do not

_THOUGHT = re.compile(r"<think>.*?(</think>|$)|^.*?</think>", re.DOTALL)  # some templates open the thought themselves
_BEFORE = r"(?:(?:the|answer|response|assistant|a(?=\s+(?:tie|draw)))\s+)*"
_WORDS = rf"{_BEFORE}(?P<word>a|b|c|tie|tied|draw|equal|neither|both)\b"
# "Verdict: A", "**Verdict:** [[B]]", "verdict = answer a", "Verdict: a tie"; not "Verdict: A or B", "Verdict: a better"
_OPEN = r"(?!\s*(?:/|or\b|and\b|better\b|,\s*(?:b|c|tie)\b))"
_SAID = rf"verdict[\s*_`\"']*[:=\-][\s*_`\"'(\[]*{_WORDS}{_OPEN}"
_BRACKETED = r"\[\[\s*(?P<bracketed>a|b|c|tie)\s*\]\]"
_MARKED = re.compile(f"{_SAID}|{_BRACKETED}", re.IGNORECASE)
_BARE = re.compile(rf"\W*{_WORDS}\W*", re.IGNORECASE)


def read_verdict(reply: str) -> float | None:
    """Return a verdict as points of the answer shown first: 1 won, 0.5 tied, 0 lost.

    It is the last marked one, or the whole reply if that is nothing else; None if neither.
    """
    said = _THOUGHT.sub("", reply)
    marked = list(_MARKED.finditer(said))
    found = marked[-1] if marked else _BARE.fullmatch(said)
    return POINTS.get(next(filter(None, found.groupdict().values())).lower(), 0.5) if found else None


def question(template: str, prompt: str, first: str, second: str) -> str:
    """Fill in the template; the texts may hold braces, or the name of another field."""
    fields = dict(zip(JUDGE_FIELDS, (prompt, first, second), strict=True))
    return re.sub("|".join(map(re.escape, fields)), lambda found: fields[found[0]], template)


def readable_prompt(prompt: str) -> str:
    """Format the column `prompt` for a judge: a single turn bare, a conversation with its roles."""
    turns = prompt_messages(prompt)
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)


def outcome(straight: float | None, swapped: float | None) -> tuple[str, float | None]:
    """Return (name, points of the first response) from its verdict and the one with the places swapped."""
    if straight is None or swapped is None:
        return UNPARSABLE, None
    if straight + swapped != 1:
        return INCONSISTENT, 0.5
    return TIE if straight == 0.5 else DECIDED, straight


def mean_points(count: int, points: Sequence[tuple[int, int, float | None]]) -> list[float | None]:
    """Average the rewards of `count` responses from comparisons (one, other, points of the one or None)."""
    won: list[list[float]] = [[] for _ in range(count)]
    for one, other, value in points:
        if value is not None:
            won[one].append(value)
            won[other].append(1 - value)
    return [sum(values) / len(values) if values else None for values in won]


class Judge:
    """Score the responses of whole prompts; `counts` counts the outcomes of comparisons."""

    def __init__(self, config: JudgeConfig, model: Any = None) -> None:
        self.config, self.counts = config, Counter[str]()
        self.model: Any = model or LanguageModel(config.model, config.engine)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        """Return rewards in the order of the rows; None for a response without a comparison that counts."""
        together: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            together.setdefault(prompt, []).append(row)
        pairs = [pair for rows in together.values() for pair in combinations(rows, 2)]
        asked = [[self._encode(prompts[a], responses[a], responses[b]) for a, b in (p, p[::-1])] for p in pairs]
        fit = [ids for both in asked if None not in both for ids in both]
        replies: list[Reply] = self.model.generate(fit, GenerateParams(self.config.max_new_tokens))
        verdicts = iter([read_verdict(reply.text) for reply in replies])
        points = []
        for (one, other), both in zip(pairs, asked, strict=True):
            name, value = (TOO_LONG, None) if None in both else outcome(next(verdicts), next(verdicts))
            self.counts[name] += 1
            points.append((one, other, value))
        return mean_points(len(prompts), points)

    def _encode(self, prompt: str, first: str, second: str) -> list[int] | None:
        """Encode a question; None if it leaves no room for a reply, or cannot be encoded."""
        text = question(self.config.template, readable_prompt(prompt), first, second)
        chats = bool(self.model.tokenizer.chat_template)
        try:
            ids: list[int] = self.model.encode([{"role": "user", "content": text}] if chats else text)
        except DataError:
            return None
        return ids if len(ids) + self.config.max_new_tokens <= self.model.longest else None
