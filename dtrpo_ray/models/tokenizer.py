"""Text <-> ids, with the prompt/response boundary exact: both sides are tokenized apart and joined as ids."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import logging as hf_logging

from dtrpo_ray.errors import DataError, ModelError

EOS, MASK = "<|endoftext|>", "<|MASK|>"
# SDAR's (two spellings), Fast-dLLM v2's (the pipes outside), Dream's and LLaDA2's, LLaDA's
MASK_SPELLINGS = (MASK, "<MASK>", "|<MASK>|", "<|mask|>", "<|mdm_mask|>")

QWEN2_BY_ANOTHER_NAME = ("DreamTokenizer",)  # a copy of Qwen2's class that a release ships as remote code
PROBE = "assistant-answer"  # an assistant's turn that no template writes by itself


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters plus end-of-sequence and mask, for puzzle tasks."""
    vocab = {token: i for i, token in enumerate([*alphabet, EOS, MASK])}
    backend = Tokenizer(WordLevel(vocab))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, without remote code. Raises ModelError if there is none."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would warn of a model_type that is ours to know
    try:
        if _named_class(path) in QWEN2_BY_ANOTHER_NAME:
            return Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a broken file gives anything from KeyError to the tokenizers library's bare Exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path}: no usable tokenizer ({reason})") from None
    finally:
        hf_logging.set_verbosity(verbosity)


def _named_class(path: Path) -> str | None:
    file = path / "tokenizer_config.json"
    return json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the mask token: declared, or one of MASK_SPELLINGS. Raises ModelError if there is none."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    for spelling in MASK_SPELLINGS:
        if spelling in tokenizer.get_vocab():
            return int(tokenizer.get_vocab()[spelling])
    raise ModelError("the tokenizer has no mask token; a diffusion model needs one")


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token. Raises ModelError if there is none."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token; name one as eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that the chat template writes after an assistant's turn.

    None where there is no template, where it takes no assistant's turn, and where plain text ends one.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        _, found, after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(PROBE)
    except TemplateError:
        return None
    added = tokenizer.get_added_vocab()
    end = re.search(_any_of(added), after) if found and added else None
    return int(added[end[0]]) if end else None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What text must not hold, since it would be read as control tokens: the special ones and the mask."""
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    mask = str(tokenizer.convert_ids_to_tokens(mask_token_id(tokenizer)))
    return re.compile(_any_of({*tokenizer.all_special_tokens, *flagged, mask}))


def _any_of(tokens: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


@dataclass(frozen=True, slots=True)
class Declared:
    """What the tokenizer files of a directory say of ids, read as JSON alone; None where they say nothing."""

    added: dict[str, int]
    mask: int | None
    eos: int | None


def declared_ids(path: Path) -> Declared:
    """The ids of a directory's added tokens. Raises ModelError where two files disagree."""
    added: dict[str, int] = {}
    for name, tokens in ADDED_TOKENS.items():
        for token, token_id in tokens(_read_json(path / name)):
            if added.setdefault(token, token_id) != token_id:
                raise ModelError(f"{path}: the tokenizer files give {token!r} two ids: {added[token]}, {token_id}")
    masks = sorted({token_id for token, token_id in added.items() if token in MASK_SPELLINGS})
    if len(masks) > 1:
        raise ModelError(f"{path}: the tokenizer files give the mask token two ids: {masks}")
    eos = _read_json(path / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return Declared(added, masks[0] if masks else None, added.get(str(eos)))


# file -> (token, id) of the added tokens in it
ADDED_TOKENS: dict[str, Callable[[dict[str, Any]], Iterable[tuple[str, int]]]] = {
    "tokenizer_config.json": lambda r: ((t["content"], int(i)) for i, t in r.get("added_tokens_decoder", {}).items()),
    "added_tokens.json": lambda record: record.items(),
    "tokenizer.json": lambda record: ((token["content"], token["id"]) for token in record.get("added_tokens", [])),
}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from None
    return record


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # the tokenizers library raises no narrower one for text it has no token for
        raise DataError(f"the tokenizer cannot encode the text {text[:40]!r} ({error})") from None


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens: what calling the tokenizer gives, in half the time.

    transformers also notes where each token stood and makes masks, of which nothing here has a use.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return list(map(attrgetter("ids"), backend.encode_batch_fast(texts, add_special_tokens=False)))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Prompt ids: messages go through the chat template with the assistant's opening, text is taken as it is.

    Raises DataError for text the tokenizer has no token for and messages the template refuses.
    """
    return _encode(tokenizer, rendered(tokenizer, prompt))


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt: its own, or its messages in the chat template with the assistant's opening."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template; give the prompt as text")
    try:
        return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages ({error})") from None


def rendered_all(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]
) -> tuple[list[str], dict[int, str]]:
    """Each conversation as `rendered` gives it, all in one call, and why those that are refused (here "") are so."""
    try:
        if tokenizer.chat_template is not None and conversations:
            return list(tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)), {}
    except TemplateError:  # one conversation spoils the call: find it
        pass
    texts, refused = [""] * len(conversations), dict[int, str]()
    for place, conversation in enumerate(conversations):
        try:
            texts[place] = rendered(tokenizer, conversation)
        except DataError as error:
            refused[place] = str(error)
    return texts, refused


def encode_response(
    tokenizer: PreTrainedTokenizerBase, response: str, prompt_len: int, block_size: int, end: int | None
) -> list[int]:
    """Response ids up to the end of the terminal block on the global grid.

    The token `end` follows the text: `turn_end_id` in a chat, else `eos_token_id`; None where the text has a fixed
    length. What is left of the block is filled with end-of-sequence tokens, supervised like any other (as LLaDA's SFT
    does), so that sampler and trainer agree on the terminal block.
    """
    ids = _encode(tokenizer, response) + ([] if end is None else [end])
    return ids + [eos_token_id(tokenizer)] * (-(prompt_len + len(ids)) % block_size)
