"""Text <-> ids: the boundary between prompt and response, the fill of the block grid, the real SDAR tokenizer."""

import copy
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.method.attention import pack_row
from dtrpo_ray.models.tokenizer import (
    Declared,
    character_tokenizer,
    declared_ids,
    encode_all,
    encode_prompt,
    encode_response,
    eos_token_id,
    load_tokenizer,
    mask_token_id,
    turn_end_id,
)

SDAR = SHARED / "tokenizer_qwen2_sdar"
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
    ids = encode_response(DIGITS, text, prompt_len, block_size, EOS if end else None)
    assert ids[: len(text)] == [int(c) for c in text]
    assert set(ids[len(text) :]) <= {EOS}
    assert (prompt_len + len(ids)) % block_size == 0
    assert end <= len(ids) - len(text) < block_size + end


def test_the_fill_by_hand() -> None:
    assert encode_response(DIGITS, "12", 3, 4, EOS) == [1, 2, EOS, EOS, EOS]
    assert encode_response(DIGITS, "1234", 4, 4, EOS) == [1, 2, 3, 4, EOS, EOS, EOS, EOS]
    assert encode_response(DIGITS, "1234", 4, 4, None) == [1, 2, 3, 4]
    assert encode_response(DIGITS, "123", 0, 4, EOS) == [1, 2, 3, EOS]
    assert encode_response(DIGITS, "12", 3, 4, end=7) == [1, 2, 7, EOS, EOS]


@pytest.mark.parametrize("text", ["1x", "1 2", "1\n", "\ud800"])
def test_text_without_tokens_is_the_users_error(text: str) -> None:
    with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
        encode_prompt(DIGITS, text)
    with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
        encode_response(DIGITS, text, 0, 4, EOS)


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
    assert encode_response(loaded, "1234567890", 3, 4, EOS) == encode_response(DIGITS, "1234567890", 3, 4, EOS)
    assert mask_token_id(loaded) == MASK


def fed(prompt: list[int], response: list[int], block_size: int) -> list[int]:
    """The ids of a packed row by position; the last block comes from a noisy stream that hides nothing."""
    row = pack_row(np.array(prompt), [(np.array(response), [np.array(response)])], block_size)
    at = dict(zip(row.position.tolist(), row.ids.tolist(), strict=True))
    return [at[position] for position in range(len(at))]


@pytest.mark.parametrize(("left", "right"), [("Hel", "lo"), ("12", "34"), ("a ", " b"), ("ca", "fé"), ("\n", "\n")])
def test_the_model_is_fed_prompt_ids_then_response_ids(sdar: PreTrainedTokenizerBase, left: str, right: str) -> None:
    prompt = encode_prompt(sdar, left)
    response = encode_response(sdar, right, len(prompt), 4, eos_token_id(sdar))
    assert fed(prompt, response, 4) == prompt + response
    assert (len(prompt) + len(response)) % 4 == 0
    assert sdar.decode(prompt) == left
    assert sdar.decode(response, skip_special_tokens=True) == right


def test_the_sides_do_not_merge_over_the_boundary(sdar: PreTrainedTokenizerBase) -> None:
    apart = encode_prompt(sdar, "Hel") + encode_response(sdar, "lo", 0, 1, None)
    assert (len(apart), len(encode_prompt(sdar, "Hello"))) == (2, 1)


def test_the_real_sdar_tokenizer_has_mask_151669(sdar: PreTrainedTokenizerBase) -> None:
    assert mask_token_id(sdar) == 151669
    assert sdar.eos_token_id == 151643
    assert encode_prompt(sdar, "<|MASK|>") == [151669]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_real_sdar_tokenizer_round_trips_text(sdar: PreTrainedTokenizerBase, text: str) -> None:
    assert sdar.decode(encode_prompt(sdar, text)) == unicodedata.normalize("NFC", text)


def test_many_texts_have_the_ids_that_the_tokenizer_gives_them(sdar: PreTrainedTokenizerBase) -> None:
    """Truncation and padding that the files or an earlier call left behind change nothing."""
    texts = ["Hello <|MASK|> world", "", "caf\u00e9 " * 50, "a\n\nb", "\U0001f600"]
    for tokenizer in (sdar, character_tokenizer("ab")):
        here = texts if tokenizer is sdar else ["ab", "", "ba" * 40]
        tokenizer(here, padding="max_length", truncation=True, max_length=4)
        assert encode_all(tokenizer, here) == tokenizer(here, add_special_tokens=False)["input_ids"]
    assert encode_all(sdar, []) == []
    sdar.split_special_tokens = True
    try:
        assert encode_all(sdar, texts) == sdar(texts, add_special_tokens=False)["input_ids"]
        assert 151669 not in encode_all(sdar, texts)[0]
    finally:
        sdar.split_special_tokens = False
    assert 151669 in encode_all(sdar, texts)[0]


def test_messages_open_the_assistants_turn(sdar: PreTrainedTokenizerBase) -> None:
    ids = encode_prompt(sdar, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    opened = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert sdar.decode(ids) == opened
    assert ids == encode_prompt(sdar, opened)


# published template -> what it ends an assistant's turn with; the last two have the token in a vocabulary not kept here
TEMPLATED = {
    "fast_dllm_v2_7b": "<|im_end|>",
    "dream_v0_instruct_7b": "<|im_end|>",
    "sdar_4b_chat": "<|im_end|>",
    "sdar_30b_a3b_chat": "<|im_end|>",
    "llada_8b_instruct": "<|eot_id|>",
    "llada2_0_mini": "<|role_end|>",
    "llada2_1_mini": "<|role_end|>",
}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # what Qwen3's template writes before an answer, and never asks for


@pytest.mark.parametrize(("layout", "end"), TEMPLATED.items())
def test_a_published_template_ends_the_prompt_where_the_answer_begins_and_the_answer_where_it_ends_a_turn(
    sdar: PreTrainedTokenizerBase, layout: str, end: str
) -> None:
    """Prompt ids, then response ids, are what the template writes of the conversation, to the same end."""
    folder = SDAR.parent / "upstream_layouts" / layout
    file = folder / "chat_template.jinja"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    published = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = copy.deepcopy(sdar)
    tokenizer.chat_template = file.read_text() if file.exists() else published["chat_template"]
    tokenizer.bos_token = published["bos_token"] or tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|eot_id|>", "<|role_end|>")])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    whole = [*messages, {"role": "assistant", "content": "Yes."}]
    conversation = str(tokenizer.apply_chat_template(whole, tokenize=False)).replace(EMPTY_THOUGHT, "")
    prompt = encode_prompt(tokenizer, messages)
    response = encode_response(tokenizer, "Yes.", len(prompt), 1, turn_end_id(tokenizer))
    assert tokenizer.convert_ids_to_tokens(response[-1]) == end
    assert conversation.startswith(tokenizer.decode(prompt + response))
    assert tokenizer.encode(conversation, add_special_tokens=False)[: len(prompt + response)] == prompt + response
    assert tokenizer.decode(prompt).count("<|startoftext|>") <= 1
    assert encode_prompt(tokenizer, tokenizer.decode(prompt)) == prompt


# the assistant's branch of each family's template, and templates that end a turn otherwise
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TURNS = {
    "Fast-dLLM v2, Dream, DiffuCoder": (CHATML, "<|im_end|>"),
    "SDAR, TraDo": (CHATML.replace("{{ m.content }}", "<think>\n\n</think>\n\n{{ m.content }}"), "<|im_end|>"),
    "LLaDA, with the next opening": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "LLaDA2": (
        "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}<|role_end|>{% endfor %}",
        "<|role_end|>",
    ),
    "a space before it": ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", "<|endoftext|>"),
    "plain text": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "no answers": ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", None),
    "one turn": ("{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}<|im_end|>", None),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_end_of_a_turn_is_read_from_the_template(name: str) -> None:
    template, end = TURNS[name]
    tokenizer = character_tokenizer("0123456789")
    assert turn_end_id(tokenizer) is None
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|eot_id|>")])
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<think>", "<|role_end|>"])
    tokenizer.chat_template = template
    assert turn_end_id(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = undeclared("a", "e", "<|mask|>")
    assert eos_token_id(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no end-of-sequence token; name one as eos_token"):
        encode_response(tokenizer, "a", 0, 4, None)


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
    assert mask_token_id(loaded) == declared_ids(tmp_path).mask == mask
    assert loaded.encode("Hello", add_special_tokens=False) == [9707]


def test_declared_ids_are_read_from_any_file_and_must_agree(tmp_path: Path) -> None:
    assert declared_ids(tmp_path) == Declared({}, None, None)
    DIGITS.save_pretrained(tmp_path)
    assert declared_ids(tmp_path) == Declared({"<|endoftext|>": EOS, "<|MASK|>": MASK}, MASK, EOS)
    added = tmp_path / "added_tokens.json"
    for tokens, complaint in (
        ({"<|mdm_mask|>": 7}, rf"give the mask token two ids: \[7, {MASK}\]"),
        ({"<|endoftext|>": 3}, r"give '<\|endoftext\|>' two ids: 3, 10"),
    ):
        added.write_text(json.dumps(tokens))
        with pytest.raises(ModelError, match=complaint):
            declared_ids(tmp_path)
    added.write_text("{")
    with pytest.raises(ModelError, match=r"added_tokens\.json: not valid JSON"):
        declared_ids(tmp_path)


@pytest.mark.parametrize("eos", ["b", {"content": "b", "special": True}])
def test_the_declared_end_may_be_a_token_written_out(tmp_path: Path, eos: object) -> None:
    record = {"eos_token": eos, "model_max_length": 8, "added_tokens_decoder": {"7": {"content": "b"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(record))
    assert declared_ids(tmp_path) == Declared({"b": 7}, None, 7)


def test_published_files_agree(tmp_path: Path) -> None:
    layouts = sorted((SDAR.parent / "upstream_layouts").glob("*"))
    if not layouts:
        pytest.skip(f"{SDAR.parent} has no upstream_layouts")
    known = {folder.name: declared_ids(folder) for folder in layouts}
    assert {name: (ids.mask, ids.eos) for name, ids in known.items() if ids.added} == {
        "dream_v0_instruct_7b": (151666, 151643),
        "fast_dllm_v2_7b": (151665, 151645),
        "llada_8b_instruct": (126336, 126081),
        "sdar_30b_a3b_chat": (151669, 151643),
        "sdar_4b_chat": (151669, 151643),
        "sdar_8b_chat": (151669, 151643),
    }
