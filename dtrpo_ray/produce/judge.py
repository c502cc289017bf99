"""Responses to the same prompt -> rewards, by a language model that compares them two by two, each pair in both orders.

A response's reward is its mean over the comparisons that came out: 1 won, 0.5 tied, 0 lost. Two verdicts that disagree
tie; a comparison with an unreadable verdict does not count, and a response without one that counts has no reward.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

from dtrpo_ray.config.produce import JUDGE_FIELDS, JudgeConfig
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import prompt_messages
from dtrpo_ray.produce.llm import LanguageModel, Reply, Sampling

Verdict = Literal["first", "second", "tie"]
NAMES: dict[str, Verdict] = {"a": "first", "b": "second"}
SWAPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}

DECIDED, TIE, INCONSISTENT = "decided", "tie", "inconsistent"  # outcomes of a comparison that count
UNPARSABLE, TOO_LONG = "unparsable", "too long"  # and that do not

_THOUGHT = re.compile(r"<think>.*?(</think>|$)|^.*?</think>", re.DOTALL)  # some templates open it, unseen in the reply
_BEFORE = r"(?:(?:the|answer|response|assistant|a(?=\s+(?:tie|draw)))\s+)*"
_WORDS = rf"{_BEFORE}(?P<word>a|b|c|tie|tied|draw|equal|neither|both)\b"
# "Verdict: A", "**Verdict:** [[B]]", "verdict = answer a", "Verdict: a tie"; not "Verdict: A or B", "Verdict: a better"
_OPEN = r"(?!\s*(?:/|or\b|and\b|better\b|,\s*(?:b|c|tie)\b))"
_SAID = rf"verdict[\s*_`\"']*[:=\-][\s*_`\"'(\[]*{_WORDS}{_OPEN}"
_BRACKETED = r"\[\[\s*(?P<bracketed>a|b|c|tie)\s*\]\]"
_MARKED = re.compile(f"{_SAID}|{_BRACKETED}", re.IGNORECASE)
_BARE = re.compile(rf"\W*{_WORDS}\W*", re.IGNORECASE)


def read_verdict(reply: str) -> Verdict | None:
    """What a reply says: its last marked verdict, or the whole of it where it is a bare one; None if neither."""
    said = _THOUGHT.sub("", reply)
    marked = list(_MARKED.finditer(said))
    found = marked[-1] if marked else _BARE.fullmatch(said)
    if found is None:
        return None
    word = next(value for value in found.groupdict().values() if value).lower()
    return NAMES.get(word, "tie")


def question(template: str, prompt: str, first: str, second: str) -> str:
    """The template filled in; what is filled in may hold braces, or the name of another field."""
    fields = dict(zip(JUDGE_FIELDS, (prompt, first, second), strict=True))
    return re.sub("|".join(map(re.escape, fields)), lambda found: fields[found[0]], template)


def shown(prompt: str) -> str:
    """The column `prompt` as a judge reads it: a single turn bare, a conversation with its roles."""
    turns = prompt_messages(prompt)
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)


def outcome(straight: Verdict | None, swapped: Verdict | None) -> tuple[str, float | None]:
    """(name, points of the first response) of its comparison with a second, asked again with the places swapped."""
    if straight is None or swapped is None:
        return UNPARSABLE, None
    if straight != SWAPPED[swapped]:
        return INCONSISTENT, 0.5
    return (TIE, 0.5) if straight == "tie" else (DECIDED, float(straight == "first"))


def mean_points(count: int, points: Sequence[tuple[int, int, float | None]]) -> list[float | None]:
    """The rewards of `count` responses from comparisons (one, other, points of the one or None)."""
    won: list[list[float]] = [[] for _ in range(count)]
    for one, other, value in points:
        if value is not None:
            won[one].append(value)
            won[other].append(1 - value)
    return [sum(values) / len(values) if values else None for values in won]


class Judge:
    """Scores the responses of whole prompts; `counts` adds up what became of the comparisons."""

    def __init__(self, config: JudgeConfig, model: Any = None) -> None:
        self.config, self.counts = config, Counter[str]()
        self.model: Any = model or LanguageModel(config.model, config.engine)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        """Rewards in the order of the rows; None for a response that met no other, or only in vain."""
        together: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            together.setdefault(prompt, []).append(row)
        pairs = [pair for rows in together.values() for pair in combinations(rows, 2)]
        asked = [order for one, other in pairs for order in ((one, other), (other, one))]
        template = self.config.template
        ids = [self._encode(question(template, shown(prompts[a]), responses[a], responses[b])) for a, b in asked]
        fit = [place for place, tokens in enumerate(ids) if tokens is not None]
        replies: list[Reply] = self.model.generate([ids[at] for at in fit], Sampling(self.config.max_new_tokens))
        verdicts = dict(zip(fit, (read_verdict(reply.text) for reply in replies), strict=True))
        points = []
        for number, (one, other) in enumerate(pairs):
            places = (2 * number, 2 * number + 1)
            name, value = TOO_LONG, None
            if all(place in verdicts for place in places):
                name, value = outcome(verdicts[places[0]], verdicts[places[1]])
            self.counts[name] += 1
            points.append((one, other, value))
        return mean_points(len(prompts), points)

    def _encode(self, text: str) -> list[int] | None:
        """Ids of a question; None where it leaves no room for a reply, or has no ids."""
        template = self.model.tokenizer.chat_template
        try:
            ids: list[int] = self.model.encode([{"role": "user", "content": text}] if template else text)
        except DataError:
            return None
        return ids if len(ids) + self.config.max_new_tokens <= self.model.longest else None
