"""Verify instructions as IFEval does (arXiv 2311.07911): each named instruction is a predicate on the text alone.

Two checks replace the published code's use of nltk: sentences are counted by their end marks, and words in capitals are
found by a regular expression. The library langdetect recognises languages.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.produce.verifiers.extract import answer_error, json_object

_SENTENCE_END = re.compile(r"""[.!?]+["')\]]*(?=\s|$)""")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def score(prompt: str, response: str, answer: str) -> float:
    """Return the share of instructions followed. `answer` is IFEval's JSON {instruction_id_list, kwargs}."""
    given = json_object(answer, "instructions")
    names, kwargs = given.get("instruction_id_list"), given.get("kwargs")
    if not isinstance(names, list) or not isinstance(kwargs, list) or not 0 < len(names) == len(kwargs):
        raise answer_error("instructions", "instruction_id_list and kwargs are not two lists of the same length")
    if unknown := [name for name in names if name not in INSTRUCTIONS]:
        raise DataError(f"instruction {unknown[0]!r} is not one of {', '.join(INSTRUCTIONS)}")
    held = [_follows(name, response, arguments) for name, arguments in zip(names, kwargs, strict=True)]
    return sum(held) / len(held)


def _follows(name: str, text: str, arguments: Mapping[str, Any] | None) -> bool:
    try:
        known = {key: value for key, value in (arguments or {}).items() if value is not None}
        return bool(text.strip()) and INSTRUCTIONS[name](text, **known)
    except ConfigError:
        raise
    except (TypeError, AttributeError, ValueError, re.error) as error:  # keywords are patterns, as published
        raise answer_error("instructions", f"{name}: {error}") from None


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _parts(text: str, separator: str) -> list[str]:
    """Split a text at a pattern; nothing before the first separator, or after the last, is no part."""
    parts = [part.strip() for part in re.split(separator, text)]
    return parts[not parts[0] : len(parts) - (not parts[-1])]


def _language(text: str, language: str) -> bool:
    try:
        import langdetect
    except ImportError:
        raise ConfigError(
            "language:response_language needs langdetect: pip install 'dtrpo-ray[verifiers]' (every node)"
        ) from None
    langdetect.DetectorFactory.seed = 0
    try:
        return bool(langdetect.detect(text) == language)
    except langdetect.LangDetectException:
        return True  # no language found counts as followed, as in the published code


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return all(parts) and len(parts) == num_paragraphs


def _paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = re.split(r"\n\n", text)
    count = sum(bool(part.strip()) for part in paragraphs)
    if nth_paragraph > count or not (paragraph := paragraphs[nth_paragraph - 1].strip()):
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'))[0].lower()
    return count == num_paragraphs and word == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    found = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE) + re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(found) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _json(text: str) -> bool:
    bare = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = _parts(text, r"\*{6}")
    return all(parts) and len(parts) == 2 and parts[0] != parts[1]


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(re.search(word, text, re.IGNORECASE) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _compare(
        len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compare(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _compare(
        len(_SENTENCE_END.findall(text)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, num_words, relation: _compare(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _paragraph_first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(answer in text for answer in _ANSWERS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) - 1 >= num_sections
    ),
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text: any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: re.fullmatch(r'".*"', text.strip(), re.DOTALL) is not None,
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _compare(
        sum(word.isupper() for word in text.split()), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
