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
    except (
        TypeError,
        AttributeError,
        ValueError,
        re.error,
    ) as error:  # keywords are patterns, as published
        raise answer_error("instructions", f"{name}: {error}") from None


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


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


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(_SENTENCE_END.findall(text)), relation, num_sentences)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    parts = parts[not parts[0] : len(parts) - (not parts[-1])]
    return all(parts) and len(parts) == num_paragraphs


def _paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = re.split(r"\n\n", text)
    count = sum(bool(part.strip()) for part in paragraphs)
    if nth_paragraph > count or not (paragraph := paragraphs[nth_paragraph - 1].strip()):
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'))[0].lower()
    return count == num_paragraphs and word == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    found = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE) + re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(found) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(answer in text.strip() for answer in _ANSWERS)


def _highlights(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) - 1 >= num_sections


def _json(text: str) -> bool:
    bare = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    parts = parts[not parts[0] : len(parts) - (not parts[-1])]
    return all(parts) and len(parts) == 2 and parts[0] != parts[1]


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in re.findall(r"\S+", text)), capital_relation, capital_frequency)


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _paragraph_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
