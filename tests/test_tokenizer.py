"""Text <-> ids: the boundary between prompt and response, the fill of the block grid, the real SDAR tokenizer."""

import copy
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dtrpo_ray.attention import pack_row
from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.tokenizer import (
    character_tokenizer,
    declared_mask_id,
    encode_prompt,
    encode_response,
    load_tokenizer,
    mask_token_id,
)

SDAR = (
    Path(os.environ.get("SHARED_DATA", Path(__file__).parents[1].parent / "shared" / "data")) / "tokenizer_qwen2_sdar"
)
DIGITS = character_tokenizer("0123456789")
EOS, MASK = 10, 11


@pytest.fixture(scope="module")
def sdar() -> PreTrainedTokenizerBase:
    if not (SDAR / "vocab.json").exists():
        pytest.skip(f"{SDAR} is not here")
    return load_tokenizer(SDAR)


def test_characters_are_numbered_in_order_then_end_and_mask() -> None:
    assert encode_prompt(DIGITS, "9076") == [9, 0, 7, 6]
    assert DIGITS.decode([9, 0, 7, 6]) == "9076"
    assert (DIGITS.eos_token_id, DIGITS.pad_token_id, mask_token_id(DIGITS), len(DIGITS)) == (EOS, EOS, MASK, 12)
    assert DIGITS.decode([1, EOS, EOS], skip_special_tokens=True) == "1"


@given(st.text("0123456789", max_size=20), st.integers(0, 40), st.integers(1, 9), st.booleans())
def test_a_response_is_its_text_then_end_tokens_up_to_the_first_block_edge(
    text: str, prompt_len: int, block_size: int, end: bool
) -> None:
    ids = encode_response(DIGITS, text, prompt_len, block_size, end)
    assert ids[: len(text)] == [int(c) for c in text]
    assert set(ids[len(text) :]) <= {EOS}
    assert (prompt_len + len(ids)) % block_size == 0
    assert end <= len(ids) - len(text) < block_size + end


def test_the_fill_by_hand() -> None:
    assert encode_response(DIGITS, "12", 3, 4) == [1, 2, EOS, EOS, EOS]
    assert encode_response(DIGITS, "1234", 4, 4) == [1, 2, 3, 4, EOS, EOS, EOS, EOS]
    assert encode_response(DIGITS, "1234", 4, 4, end=False) == [1, 2, 3, 4]
    assert encode_response(DIGITS, "123", 0, 4) == [1, 2, 3, EOS]


@pytest.mark.parametrize("text", ["1x", "1 2", "1\n", "\ud800"])
def test_text_without_tokens_is_the_users_error(text: str) -> None:
    with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
        encode_prompt(DIGITS, text)
    with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
        encode_response(DIGITS, text, 0, 4)


def test_messages_need_a_chat_template_that_takes_them() -> None:
    with pytest.raises(ModelError, match="no chat template; give the prompt as text"):
        encode_prompt(DIGITS, [{"role": "user", "content": "1"}])
    strict = character_tokenizer("0123456789")
    strict.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}"
    )
    assert encode_prompt(strict, [{"role": "user", "content": "12"}]) == [1, 2]
    with pytest.raises(DataError, match=r"the chat template refuses the messages \(one turn\)"):
        encode_prompt(strict, [{"role": "user", "content": "1"}] * 2)


def undeclared(*vocabulary: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="e")


@pytest.mark.parametrize("spelling", ["<|MASK|>", "|<MASK>|", "<|mask|>", "<|mdm_mask|>"])
def test_an_undeclared_mask_token_is_found_by_its_spelling(spelling: str) -> None:
    assert mask_token_id(undeclared("a", "e", spelling)) == 2


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="has no mask token"):
        mask_token_id(undeclared("a", "e"))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{"},
        {"tokenizer.json": '{"model": {"type": "none"}}'},
        {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}', "vocab.json": "[", "merges.txt": "a"},
    ],
)
def test_a_folder_without_a_whole_tokenizer_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=f"{tmp_path}: no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_character_tokenizer_survives_its_files(tmp_path: Path) -> None:
    DIGITS.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_response(loaded, "1234567890", 3, 4) == encode_response(DIGITS, "1234567890", 3, 4)
    assert mask_token_id(loaded) == MASK


def fed(prompt: list[int], response: list[int], block_size: int) -> list[int]:
    """The ids of a packed row by position; the last block comes from a noisy stream that hides nothing."""
    row = pack_row(np.array(prompt), [(np.array(response), [np.array(response)])], block_size)
    at = dict(zip(row.position.tolist(), row.ids.tolist(), strict=True))
    return [at[position] for position in range(len(at))]


@pytest.mark.parametrize(("left", "right"), [("Hel", "lo"), ("12", "34"), ("a ", " b"), ("ca", "fé"), ("\n", "\n")])
def test_the_model_is_fed_prompt_ids_then_response_ids(sdar: PreTrainedTokenizerBase, left: str, right: str) -> None:
    prompt = encode_prompt(sdar, left)
    response = encode_response(sdar, right, len(prompt), 4)
    assert fed(prompt, response, 4) == prompt + response
    assert (len(prompt) + len(response)) % 4 == 0
    assert sdar.decode(prompt) == left
    assert sdar.decode(response, skip_special_tokens=True) == right


def test_the_sides_do_not_merge_over_the_boundary(sdar: PreTrainedTokenizerBase) -> None:
    apart = encode_prompt(sdar, "Hel") + encode_response(sdar, "lo", 0, 1, end=False)
    assert (len(apart), len(encode_prompt(sdar, "Hello"))) == (2, 1)


def test_the_real_sdar_tokenizer_has_mask_151669(sdar: PreTrainedTokenizerBase) -> None:
    assert mask_token_id(sdar) == 151669
    assert sdar.eos_token_id == 151643
    assert encode_prompt(sdar, "<|MASK|>") == [151669]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_real_sdar_tokenizer_round_trips_text(sdar: PreTrainedTokenizerBase, text: str) -> None:
    assert sdar.decode(encode_prompt(sdar, text)) == unicodedata.normalize("NFC", text)


def test_messages_open_the_assistants_turn(sdar: PreTrainedTokenizerBase) -> None:
    ids = encode_prompt(sdar, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    opened = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert sdar.decode(ids) == opened
    assert ids == encode_prompt(sdar, opened)


TEMPLATED = ("fast_dllm_v2_7b", "dream_v0_instruct_7b", "sdar_4b_chat", "llada_8b_instruct", "llada2_0_mini")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # what Qwen3's template writes before an answer, and never asks for


@pytest.mark.parametrize("layout", TEMPLATED)
def test_a_published_template_ends_the_prompt_where_the_answer_begins(
    sdar: PreTrainedTokenizerBase, layout: str
) -> None:
    """Prompt ids, then response ids, read as the template writes the whole conversation, with no token between."""
    folder = SDAR.parent / "upstream_layouts" / layout
    file = folder / "chat_template.jinja"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    published = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = copy.deepcopy(sdar)
    tokenizer.chat_template = file.read_text() if file.exists() else published["chat_template"]
    tokenizer.bos_token = published["bos_token"] or tokenizer.eos_token
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    whole = [*messages, {"role": "assistant", "content": "Yes."}]
    conversation = str(tokenizer.apply_chat_template(whole, tokenize=False)).replace(EMPTY_THOUGHT, "")
    prompt = encode_prompt(tokenizer, messages)
    response = encode_response(tokenizer, "Yes.", len(prompt), 1, end=False)
    assert conversation.startswith(tokenizer.decode(prompt + response))
    assert tokenizer.decode(prompt).count("<|startoftext|>") <= 1
    assert encode_prompt(tokenizer, tokenizer.decode(prompt)) == prompt


@pytest.mark.parametrize(("layout", "mask"), [("dream_v0_instruct_7b", 151666), ("fast_dllm_v2_7b", 151665)])
def test_the_other_qwen_tokenizers_load_without_remote_code(tmp_path: Path, layout: str, mask: int) -> None:
    """Dream ships a copy of Qwen2's class as code of its own; Fast-dLLM's mask token has the pipes outside."""
    folder = SDAR.parent / "upstream_layouts" / layout
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for source, names in ((SDAR, ("vocab.json", "merges.txt")), (folder, ("tokenizer_config.json",))):
        for name in names:
            (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "added_tokens.json").write_bytes((folder / "added_tokens.json").read_bytes())
    loaded = load_tokenizer(tmp_path)
    assert mask_token_id(loaded) == declared_mask_id(tmp_path) == mask
    assert loaded.encode("Hello", add_special_tokens=False) == [9707]


def test_the_declared_mask_is_read_from_any_file_and_must_be_one(tmp_path: Path) -> None:
    assert declared_mask_id(tmp_path) is None
    DIGITS.save_pretrained(tmp_path)
    assert declared_mask_id(tmp_path) == MASK
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|mdm_mask|>": 7}))
    with pytest.raises(ModelError, match="give the mask token two ids"):
        declared_mask_id(tmp_path)
    (tmp_path / "added_tokens.json").write_text("{")
    with pytest.raises(ModelError, match=r"added_tokens\.json: not valid JSON"):
        declared_mask_id(tmp_path)
