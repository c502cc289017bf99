"""Text <-> ids, with the prompt/response boundary exact: both sides are tokenized apart and joined as ids."""

import json
from collections.abc import Iterator
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
# SDAR's, Fast-dLLM v2's (the pipes outside), Dream's and LLaDA2's, LLaDA's
MASK_SPELLINGS = (MASK, "|<MASK>|", "<|mask|>", "<|mdm_mask|>")

QWEN2_BY_ANOTHER_NAME = ("DreamTokenizer",)  # a copy of Qwen2's class that a release ships as remote code


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
    """The id of the mask token: declared, or SDAR's and Fast-dLLM's spelling. Raises ModelError if there is none."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    for spelling in MASK_SPELLINGS:
        if spelling in tokenizer.get_vocab():
            return int(tokenizer.get_vocab()[spelling])
    raise ModelError("the tokenizer has no mask token; a diffusion model needs one")


def declared_mask_id(path: Path) -> int | None:
    """The mask token's id in the tokenizer files of a directory, read as JSON alone; None if they name none.

    Raises ModelError where two files disagree.
    """
    found: dict[int, str] = {}
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        try:
            record = json.loads((path / name).read_text())
        except FileNotFoundError:
            continue
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path / name}: not valid JSON ({error})") from None
        for token, token_id in _token_ids(record):
            if token in MASK_SPELLINGS:
                found.setdefault(int(token_id), name)
    if len(found) > 1:
        raise ModelError(f"{path}: the tokenizer files give the mask token two ids: {found}")
    return next(iter(found), None)


def _token_ids(record: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(token, id) of the added tokens of any of the three files."""
    for token_id, token in record.get("added_tokens_decoder", {}).items():
        yield token["content"], token_id
    for token in record.get("added_tokens", []):
        yield token["content"], token["id"]
    yield from ((token, token_id) for token, token_id in record.items() if isinstance(token_id, int))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # the tokenizers library raises no narrower one for text it has no token for
        raise DataError(f"the tokenizer cannot encode the text {text[:40]!r} ({error})") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Prompt ids: messages go through the chat template with the assistant's opening, text is taken as it is.

    Raises DataError for text the tokenizer has no token for and messages the template refuses.
    """
    if isinstance(prompt, str):
        return _encode(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template; give the prompt as text")
    try:
        text = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages ({error})") from None
    return _encode(tokenizer, text)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, response: str, prompt_len: int, block_size: int, end: bool = True
) -> list[int]:
    """Response ids up to the end of the terminal block on the global grid.

    With `end` an end-of-sequence token follows the text; what is left of the block is filled with the same token,
    supervised like any other (as LLaDA's SFT does), so that sampler and trainer agree on the terminal block.
    """
    ids = _encode(tokenizer, response) + [tokenizer.eos_token_id] * end
    return ids + [tokenizer.eos_token_id] * (-(prompt_len + len(ids)) % block_size)
