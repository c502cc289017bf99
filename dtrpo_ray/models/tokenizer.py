"""Load tokenizers, and encode prompts and responses apart, so that the boundary between them is exact."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import logging as hf_logging

from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.files import sha256_json
from dtrpo_ray.models.config_json import read_model_json

EOS, MASK = "<|endoftext|>", "<|MASK|>"
# the spellings of SDAR (two), Fast-dLLM v2 (the pipes outside), Dream and LLaDA2, LLaDA
MASK_SPELLINGS = (MASK, "<MASK>", "|<MASK>|", "<|mask|>", "<|mdm_mask|>")

QWEN2_COPIES = ("DreamTokenizer",)  # copies of Qwen2's class that releases ship as remote code
PROBE = "assistant-answer"  # stands for an assistant's turn; no template writes it by itself
UNWRITTEN = {("tool", "name"), ("tool", "tool_call_id")}  # fields that a template need not write
REASONING = ("reasoning", "reasoning_content", "thinking")  # names of one field

Conversation = Sequence[Mapping[str, Any]]


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of single characters plus end-of-sequence and mask, for puzzle tasks."""
    backend = _backend(alphabet)
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return _with_special_tokens(backend)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, with a space between two, plus end-of-sequence and mask, for puzzle tasks."""
    backend = _backend(words)
    backend.pre_tokenizer = WhitespaceSplit()
    return _with_special_tokens(backend)


def _backend(tokens: Sequence[str]) -> Tokenizer:
    return Tokenizer(WordLevel({token: i for i, token in enumerate([*tokens, EOS, MASK])}))


def _with_special_tokens(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory, without remote code. Raises ModelError if there is none."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it warns of model types that transformers does not know
    try:
        if read_model_json(path / "tokenizer_config.json").get("tokenizer_class") in QWEN2_COPIES:
            return Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # broken files raise anything from KeyError to the tokenizers library's bare Exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path}: no usable tokenizer ({reason})") from None
    finally:
        hf_logging.set_verbosity(verbosity)


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the mask token: declared, or one of MASK_SPELLINGS. Raises ModelError if there is none."""
    vocab = tokenizer.get_vocab()
    for spelling in (tokenizer.mask_token, *MASK_SPELLINGS):
        if spelling in vocab:
            return int(vocab[spelling])
    raise ModelError("the tokenizer has no mask token; a diffusion model needs one")


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end-of-sequence token. Raises ModelError if there is none."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token; name one as eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that the chat template writes after an assistant's turn.

    None if there is no template, if it refuses an assistant's turn, or if plain text ends one.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        _, found, after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(PROBE)
    except Exception:  # a template is a program, which raises anything
        return None
    added = tokenizer.get_added_vocab()
    end = re.search(_any_of(added), after) if found and added else None
    return int(added[end[0]]) if end else None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the special tokens and the mask: text that matches would be read as control tokens."""
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    mask = str(tokenizer.convert_ids_to_tokens(mask_token_id(tokenizer)))
    return re.compile(_any_of({*tokenizer.all_special_tokens, *flagged, mask}))


def control_token_error(control: re.Pattern[str], texts: Iterable[tuple[str, str]]) -> str | None:
    """Return which of the (name, text) pairs holds a control token, and which one; None if no text does.

    A text inside a message has to pass: rendered into the chat template, its control tokens would end its turn, or
    open another's.
    """
    found = next(((name, match[0]) for name, text in texts if (match := control.search(text))), None)
    return found and f"{found[0]} holds {found[1]!r}, which the tokenizer reads as a control token"


def _any_of(tokens: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


@dataclass(frozen=True, slots=True)
class Declared:
    """The ids that a directory's tokenizer files declare, read as plain JSON; None means not declared."""

    added: dict[str, int]
    mask: int | None
    eos: int | None


def declared_ids(path: Path) -> Declared:
    """Read the ids of a directory's added tokens. Raises ModelError if two files disagree."""
    config, extra, whole = (
        read_model_json(path / name) for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
    )
    pairs = [(token["content"], int(token_id)) for token_id, token in config.get("added_tokens_decoder", {}).items()]
    pairs += [*extra.items(), *((token["content"], token["id"]) for token in whole.get("added_tokens", []))]
    added: dict[str, int] = {}
    for token, token_id in pairs:
        if added.setdefault(token, token_id) != token_id:
            raise ModelError(f"{path}: the tokenizer files give {token!r} two ids: {added[token]}, {token_id}")
    masks = sorted({token_id for token, token_id in added.items() if token in MASK_SPELLINGS})
    if len(masks) > 1:
        raise ModelError(f"{path}: the tokenizer files give the mask token two ids: {masks}")
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return Declared(added, masks[0] if masks else None, added.get(str(eos)))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Return the ids of a text, with the tokenizer's opening tokens if `special`. Raises DataError if it has none."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=special))
    except Exception as error:  # the tokenizers library raises a bare Exception for text without tokens
        raise DataError(f"the tokenizer cannot encode the text {text[:40]!r} ({error})") from None


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text without special tokens, in half the time that calling the tokenizer takes.

    The saved half is transformers' token offsets and masks, which are not used here.
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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation) -> list[int]:
    """Return prompt ids: messages go through the chat template with the assistant's opening, text stays as it is.

    Raises DataError for text without tokens and for messages that the template refuses.
    """
    return encode_text(tokenizer, render_prompt(tokenizer, prompt))


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation) -> str:
    """Return a prompt's text: its own, or its messages in the chat template with the assistant's opening.

    Messages that end in an assistant's turn have that turn left open, to be continued. Raises DataError for messages
    that the template refuses, and ModelError if there is no template.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template; give the prompt as text")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise ModelError(f"the tokenizer has the chat templates {names} and none called default; name one so")
    goes_on = bool(prompt) and prompt[-1]["role"] == "assistant"
    return render_turns(tokenizer, prompt, add_generation_prompt=not goes_on, continue_final_message=goes_on)


def render_turns(tokenizer: PreTrainedTokenizerBase, turns: Conversation, **options: Any) -> str:
    """Return messages in the chat template, with the tools in `tools` of the first one.

    Raises DataError for messages that the template refuses, or with a field that it would leave out.
    """
    tools = turns[0].get("tools") if turns else None
    fields = {(turn["role"], name) for turn in turns for name in turn.keys() - {"role", "content"}}
    for role, name in sorted(fields - UNWRITTEN):
        if not _writes(tokenizer, str(tokenizer.chat_template), role, name):
            raise DataError(f"the chat template does not write the {name} of the {role}'s messages; leave it out")
    for turn in turns:  # transformers gives a template one of them
        if len({turn[name] for name in REASONING if name in turn}) > 1:
            names = " and ".join(name for name in REASONING if name in turn)
            raise DataError(f"{names} differ in a message; leave one of them out")
    plain = [{name: value for name, value in turn.items() if name != "tools"} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, **options))
    except Exception as error:  # a template is a program, which raises anything
        raise DataError(f"the chat template refuses the messages ({error})") from None


def render_answer(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, answer: Mapping[str, Any]) -> str:
    """Return an assistant's turn as the chat template writes it after its opening, without the end of the turn.

    Raises DataError for a turn that the template refuses, or after which it writes the prompt in another way.
    """
    opened, whole = render_prompt(tokenizer, prompt), render_turns(tokenizer, [*prompt, answer])
    if not whole.startswith(opened):
        raise DataError("the chat template writes the messages in another way once an answer follows")
    found, ends = turn_end_id(tokenizer), [str(tokenizer.eos_token)]
    if found is not None:
        ends.insert(0, str(tokenizer.convert_ids_to_tokens(found)))
    text = whole[len(opened) :]
    return next((text.rpartition(end)[0] for end in ends if end in text), text)


@lru_cache(maxsize=256)
def _writes(tokenizer: PreTrainedTokenizerBase, template: str, role: str, name: str) -> bool:
    """Return whether the chat template writes a field of a role's messages, or the tools of a conversation."""
    function = {"name": PROBE, "description": "?", "parameters": {"type": "object", "properties": {}}}
    tools: list[Any] | None = [{"type": "function", "function": function}] if name == "tools" else None
    call = [{"type": "function", "function": {"name": PROBE, "arguments": {}}}]
    turn = {"role": role, "content": "?"} | ({} if tools else {name: call if name == "tool_calls" else PROBE})
    asked = [{"role": "user", "content": "?"}]
    turns: list[Any] = [turn] if role == "user" else [turn, *asked] if role == "system" else [*asked, turn]
    try:
        return PROBE in str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False))
    except Exception:  # a template is a program, which raises anything
        return False


def encode_response(
    tokenizer: PreTrainedTokenizerBase, response: str, prompt_len: int, block_size: int, end: int | None
) -> list[int]:
    """Return response ids up to the end of the terminal block on the global grid.

    The token `end` follows the text: `turn_end_id` in a chat, else `eos_token_id`; None if the text has a fixed
    length. The rest of the block is end-of-sequence tokens, trained like any other (as in LLaDA's SFT), so that
    sampler and trainer agree on the terminal block.
    """
    ids = encode_text(tokenizer, response) + ([] if end is None else [end])
    return ids + [eos_token_id(tokenizer)] * (-(prompt_len + len(ids)) % block_size)


def prompt_messages(prompt: str) -> list[dict[str, Any]]:
    """Return the messages that a column `prompt` holds as JSON, or else its text as the user's."""
    if prompt.startswith("[{"):
        with suppress(json.JSONDecodeError):
            messages = json.loads(prompt)
            if all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
                return list(messages)
    return [{"role": "user", "content": prompt}]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of every token with its id, and of the chat template. Copies of a tokenizer have the same."""
    return sha256_json([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
